"""Errors that a user can fix."""


class UserError(Exception):
    """A mistake in the configuration, the command or the data, described in one sentence.

    The sentence says where the mistake is (dotted config path, or file, stripe, row and column), what
    was expected, what was found, and how to fix it.
    """


class UnknownItemError(UserError):
    """There is no such item."""


class MachineError(UserError):
    """Data could not be read because of this machine, not because of the data.

    Examples are too little memory, a missing permission, too many open files, missing time zones, or a
    file that changes while it is read. Other files would fail in the same way, so nothing is skipped,
    whatever `io.on_error` says.
    """
