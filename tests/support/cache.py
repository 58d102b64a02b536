"""Things that are costly to fetch or build and are kept between test runs, below `.cache/`.

An entry is a folder that is either complete or absent: it is built beside its place and renamed. A lock file makes
several processes that want the same entry build it once.
"""

import fcntl
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")
ROOT: Final = Path(__file__).resolve().parents[2]


class Unavailable(Exception):  # noqa: N818 - a fact about the machine, not a fault
    """Something a test needs cannot be had on this machine; the text is the reason to skip, in one line."""


def once(get: Callable[[], T]) -> Callable[[], T]:
    """`get` asked once a process; that something is unavailable is remembered too, since finding out takes time."""
    answer: list[T] = []
    refusal: list[Unavailable] = []

    @functools.wraps(get)
    def remembered() -> T:
        if refusal:
            raise Unavailable(str(refusal[0]))
        if not answer:
            try:
                answer.append(get())
            except Unavailable as reason:
                refusal.append(reason)
                raise
        return answer[0]

    return remembered


def cache_folder() -> Path:
    """Where entries lie: `FLEECE_CACHE`, else `.cache` in the checkout."""
    return Path(os.environ.get("FLEECE_CACHE") or ROOT / ".cache")


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """Hold the lock of the entry `name` (waits for it); gives the entry's path, which may not exist."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / name


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache; if absent, `build` fills an empty folder that is then put in place.

    Raises:
        Unavailable: `build` says so; nothing is kept then.
    """
    final = cache_folder() / name
    if final.exists():
        return final
    with locked(name) as place:
        if not place.exists():
            half = place.with_name(f".{name}.{os.getpid()}.half")
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            try:
                build(half)
                half.rename(place)
            finally:
                shutil.rmtree(half, ignore_errors=True)
        return place
