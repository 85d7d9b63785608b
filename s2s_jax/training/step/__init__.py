"""The pure functions of a step: what they take, what they compute, and the state that they change."""
