"""Checks of a configuration, with messages that name the dotted path of the wrong key."""
