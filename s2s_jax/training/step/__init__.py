"""The pure functions of a step: batches, forward pass, gradients, optimizer, and the training state."""
