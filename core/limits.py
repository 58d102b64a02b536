"""How many threads do the heavy work.

One limiter for C code that fills a core (hashing, compression, checksums), one for calls that mostly wait (file and
network system calls). Both belong to the running trio loop; no other module makes a limiter for such work.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Final, TypeVar

import trio
from trio.lowlevel import RunVar

T = TypeVar("T")

#: Waiting system calls at once. Two readers and two writers per disk keep two cores busy; more only thrash caches.
IO_THREADS: Final = 16

#: Places where the C library keeps what was freed. By default that are eight for each core, with up to 32 MiB each.
_MALLOC_ARENAS: Final = 2
_M_ARENA_MAX: Final = -8  # of malloc.h

_cpu: RunVar[trio.CapacityLimiter] = RunVar("cpu limiter")
_io: RunVar[trio.CapacityLimiter] = RunVar("io limiter")


def cpu_count() -> int:
    """Cores this process may use; `FLEECE_THREADS` overrides it."""
    configured = os.environ.get("FLEECE_THREADS", "")
    return int(configured) if configured.isdigit() and int(configured) > 0 else len(os.sched_getaffinity(0))


def cpu_limiter() -> trio.CapacityLimiter:
    """The limiter for work that fills a core."""
    try:
        return _cpu.get()
    except LookupError:
        _cpu.set(trio.CapacityLimiter(cpu_count()))
        return _cpu.get()


def io_limiter() -> trio.CapacityLimiter:
    """The limiter for calls that mostly wait."""
    try:
        return _io.get()
    except LookupError:
        _io.set(trio.CapacityLimiter(IO_THREADS))
        return _io.get()


async def in_cpu_thread(work: Callable[..., T], *args: object) -> T:
    """Run `work(*args)` in a thread of its own, at most one per core at a time; cancellation waits for it."""
    return await trio.to_thread.run_sync(work, *args, limiter=cpu_limiter())


async def in_io_thread(work: Callable[..., T], *args: object) -> T:
    """Run the system calls of `work(*args)` in a thread of its own; cancellation waits for it."""
    return await trio.to_thread.run_sync(work, *args, limiter=io_limiter())


def bound_malloc() -> None:
    """Have all threads of this process share a few places for memory; for programs, before they start threads.

    `bench/detection_modes.py`, images in mode legacy: 250 MiB instead of 358, and no slower, since what is large is
    allocated rarely. Without effect where the C library is not glibc, or if `MALLOC_ARENA_MAX` is set.
    """
    import ctypes  # what opens a datastore needs it anyway

    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _MALLOC_ARENAS)
