"""Errors of the top floor, and what becomes of all errors at its edge.

FleeceError
├── UsageError                 the command line or the configuration is wrong (core)
├── HookError                  a script of the user failed
└── InterruptedBySignalError   SIGINT, SIGTERM or SIGHUP ended the work; everything was cleaned up
"""

from collections.abc import Iterator

import trio

from core.errors import FleeceError


class HookError(FleeceError):
    """A script of the user cannot be run, failed, or took too long."""


class InterruptedBySignalError(FleeceError):
    """A signal ended the work; everything was cleaned up."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The single exceptions of a group of groups, in their order; cancellations left out."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    elif not isinstance(error, trio.Cancelled):
        yield error


def first_cause(error: BaseException) -> BaseException:
    """The one exception of a group that tells most: the first FleeceError, else the first of any kind.

    A nursery raises a group also for a single failed task, and the tasks that it cancelled may fail in turn.
    """
    found = list(leaves(error))
    for candidate in found:
        if isinstance(candidate, FleeceError):
            return candidate
    return found[0] if found else error
