"""The root of Fleece's errors and the exit codes.

    FleeceError                 exit code 1
    ├── UsageError              exit code 2: the command line or the configuration is wrong
    ├── FormatError             (ValueError) bytes that no writer makes
    ├── NotFoundError           (LookupError) a store, snapshot, archive, disk or chunk that is not there
    ├── BusyError               somebody else holds it: a lock, a VM, a device
    ├── SourceError             the thing to be backed up cannot be read
    └── TargetError             the thing to be restored to cannot be written

Rooms add their few in their own `errors.py`.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the command `fleece` returns."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    WARNINGS = 3  #: done, but with warnings, listed at the end


class FleeceError(Exception):
    """Something could not be done: `what`, on which thing (`where`), `why`, and a `hint` for the reader.

    `where` is written the way the command line takes it. The text reads
    "cannot WHAT WHERE: WHY; HINT".
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, what: str, where: str, why: str, hint: str = "") -> None:
        self.what, self.where, self.why, self.hint = what, where, why, hint
        super().__init__(what, where, why, hint)

    def __str__(self) -> str:
        return f"cannot {self.what} {self.where}: {self.why}" + (f"; {self.hint}" if self.hint else "")


class UsageError(FleeceError):
    """The command line or the configuration asks for something that makes no sense."""

    exit_code = ExitCode.USAGE


class FormatError(FleeceError, ValueError):
    """Bytes from outside that no writer makes."""


class NotFoundError(FleeceError, LookupError):
    """A store, snapshot, archive, disk or chunk that is not there."""


class BusyError(FleeceError):
    """Somebody else holds it: a lock, a VM, a device."""


class SourceError(FleeceError):
    """The thing to be backed up cannot be read."""


class TargetError(FleeceError):
    """The thing to be restored to cannot be written."""


def os_reason(error: OSError) -> str:
    """The operating system's own words for `error`, without the path (the message names it already)."""
    return error.strerror or str(error)
