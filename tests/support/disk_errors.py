"""One error of the disk, at the N-th call that changes or locks something: full, broken, or suddenly read-only."""

import ctypes
import errno
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

import datastore.files
from core.errors import FleeceError

#: Calls of `os` that change a file system or make a change last; `open` counts if it may write, touches count too.
CALLS = (
    "write", "writev", "pwrite", "rename", "link", "fsync", "unlink", "mkdir", "rmdir", "ftruncate", "chmod", "fchmod",
    "chown",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class _Libc:
    """The C library whose `utimensat` and `syncfs` may fail."""

    def __init__(self, real: Any, count: Callable[[str], int]) -> None:
        self._real, self._count = real, count

    def _call(self, name: str, *arguments: Any) -> int:
        if code := self._count(name):
            ctypes.set_errno(code)
            return -1
        return int(getattr(self._real, name)(*arguments))

    def utimensat(self, *arguments: Any) -> int:
        """See utimensat(2)."""
        return self._call("utimensat", *arguments)

    def syncfs(self, *arguments: Any) -> int:
        """See syncfs(2)."""
        return self._call("syncfs", *arguments)


#: For tests with a parameter `codes`: at each call one of the errors, in turn; in `make test-long` each at every call.
each_in_turn = pytest.mark.parametrize(
    "codes",
    [
        pytest.param([errno.ENOSPC, errno.EIO, errno.EROFS], id="in turn"),
        *(
            pytest.param([code], id=errno.errorcode[code], marks=pytest.mark.long)
            for code in (errno.ENOSPC, errno.EIO, errno.EROFS)
        ),
    ],
)


@contextmanager
def failing_call(number: int, code: int) -> Iterator[list[str]]:
    """Let the `number`-th call fail with `code`, once; gives the list of calls so far, in whatever thread."""
    calls: list[str] = []
    guard = threading.Lock()
    real = {name: getattr(os, name) for name in (*CALLS, "open")}
    real_libc = datastore.files._LIBC

    def count(name: str) -> int:
        with guard:
            calls.append(name)
            return code if len(calls) == number else 0

    def patched(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            writes = name != "open" or (len(arguments) > 1 and arguments[1] & _WRITING)
            if writes and count(name):
                raise OSError(code, os.strerror(code), str(arguments[0]))
            return real[name](*arguments, **more)

        return call

    for name in real:
        setattr(os, name, patched(name))
    datastore.files._LIBC = _Libc(real_libc, count)  # type: ignore[misc, assignment]
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        datastore.files._LIBC = real_libc  # type: ignore[misc]


async def at_every_call(
    codes: Sequence[int],
    prepare: Callable[[int], Awaitable[Any]],
    act: Callable[[Any], Awaitable[Any]],
    check: Callable[[Any, bool], Awaitable[None]],
    *,
    most: int = 200,
) -> list[str]:
    """Run `act` with its first call failing, its second, ... until it makes no more; returns the calls of a whole run.

    Args:
        codes: the errors, one for each round in turn.
        prepare: makes what `act` works on, given the number of the round.
        act: may raise a `FleeceError`, and nothing else.
        check: looks at what is left; True: `act` ended well.
        most: rounds after which something is wrong.
    """
    for number in range(1, most):
        subject = await prepare(number)
        ended_well = True
        code = codes[number % len(codes)]
        with failing_call(number, code) as calls:
            try:
                await act(subject)
            except FleeceError as error:
                ended_well = False
                if os.strerror(code) not in str(error):
                    raise AssertionError(f"call {number}, {calls[number - 1]}: it hides the reason: {error}") from error
        await check(subject, ended_well)
        if len(calls) < number:
            assert ended_well
            return calls
    raise AssertionError(f"more than {most} calls")
