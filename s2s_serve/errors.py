"""Errors that a user can fix."""


class UserError(Exception):
    """A mistake in the configuration, the command or the data, described in one sentence.

    The sentence says where the mistake is (dotted config path, or file, stripe, row and column), what
    was expected, what was found, and how to fix it.
    """


class UnknownItemError(UserError):
    """There is no such item."""
