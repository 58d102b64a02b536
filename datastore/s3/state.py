"""What a cache folder remembers about its bucket: `.fleece/s3.json`.

The file says whose cache the folder is, and whether its copy of the metadata is complete: a folder that was set up for
a bucket with content, or whose refresh was cut off in the middle of the exchange, must not be written to, and no
garbage collection may take it for the truth (R36).
"""

import fcntl
import json
import os
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Self

import trio

from core.errors import FormatError
from datastore.creation import S3_STATE
from datastore.errors import LockedError, StoreError
from datastore.files import FILE_MODE, Owner, make_folders, read_file, replace_file, store_errors, temporary_path

_REFRESH_LOCK: Final = ".fleece/s3-refresh.lock"
_CHANGE_LOCK: Final = ".fleece/s3-changes.lock"
_MAX_SIZE: Final = 1 << 16
_TRIES: Final = 10
#: Seconds between two looks whether changes have ended.
_POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class CacheState:
    """Whose cache a folder is."""

    store: str  #: name of the datastore, the first part of all keys
    bucket: str
    endpoint: str  #: id of the endpoint when it was set up, for people
    complete: bool  #: the metadata is all that the bucket has

    @classmethod
    def read(cls, base: Path) -> Self | None:
        """The state of the folder `base`; None if it is no cache of a bucket.

        Raises:
            FormatError: the file is damaged.
            StoreError: unreadable.
        """
        path = base / S3_STATE
        with store_errors("read", path):
            try:
                data = read_file(path, limit=_MAX_SIZE)
            except FileNotFoundError:
                return None
        try:
            document = json.loads(data)
            return cls(
                str(document["store"]),
                str(document["bucket"]),
                str(document["endpoint"]),
                document["complete"] is True,
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError("read", str(path), f"it is damaged ({error})") from error

    def write(self, base: Path, owner: Owner) -> None:
        """Replace the state of the folder `base`, durably.

        Raises:
            StoreError: it cannot be written.
        """
        with store_errors("write", base / S3_STATE):
            make_folders(base, ".fleece/tmp", owner)
            temporary = temporary_path(base / ".fleece/tmp/s3.json")
            text = json.dumps(asdict(self)).encode()
            replace_file(base / S3_STATE, (text,), owner, sync=True, temporary=temporary)

    def completed(self, complete: bool) -> Self:
        """The same with another `complete`."""
        return replace(self, complete=complete)


@contextmanager
def refreshing(base: Path, owner: Owner) -> Iterator[None]:
    """Keep everybody from writing to the store while the block runs, in this and other processes.

    Raises:
        LockedError: it is being refreshed already.
        StoreError: no rights.
    """
    fd = _open_lock(base, owner, _REFRESH_LOCK, "refresh")
    try:
        with store_errors("refresh", base):
            if not _lock(fd):
                raise LockedError("refresh", str(base), "it is being refreshed already")
        yield
    finally:
        os.close(fd)


def begin_change(base: Path, owner: Owner, what: str) -> int:
    """Keep a refresh from comparing bucket and folder until `os.close` of the descriptor that is returned.

    A change of metadata is made in the bucket and then in the folder. A refresh that saw one of them only would undo
    the other: a snapshot would lose its protection here.

    Raises:
        StoreError: a refresh is just doing so; or no rights.
    """
    fd = _open_lock(base, owner, _CHANGE_LOCK, what)
    try:
        with store_errors(what, base):
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _being_refreshed(base, what) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


@asynccontextmanager
async def no_changes(base: Path, owner: Owner, *, wait_s: float) -> AsyncIterator[None]:
    """Wait for changes of metadata that are under way, and refuse others while the block runs.

    Raises:
        LockedError: one goes on for longer than `wait_s`.
        StoreError: no rights.
    """
    fd = _open_lock(base, owner, _CHANGE_LOCK, "refresh")
    try:
        give_up = trio.current_time() + wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if trio.current_time() >= give_up:
                    why = "something in it is being changed"
                    raise LockedError("refresh", str(base), why, "try again later") from None
                await trio.sleep(_POLL_S)
            else:
                break
        yield
    finally:
        os.close(fd)


def _open_lock(base: Path, owner: Owner, name: str, what: str) -> int:
    with store_errors(what, base):
        make_folders(base, ".fleece", owner)
        fd = os.open(base / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            found = os.fstat(fd)
            if stat.S_IMODE(found.st_mode) != FILE_MODE:
                os.fchmod(fd, FILE_MODE)
            if (found.st_uid, found.st_gid) != (owner.uid, owner.gid):
                owner.own(fd)
        except BaseException:
            os.close(fd)
            raise
    return fd


def _being_refreshed(base: Path, what: str) -> StoreError:
    return StoreError(what, str(base), "it is being refreshed from the bucket", "try again when that has ended")


def _lock(fd: int) -> bool:
    for _ in range(_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)  # somebody may just be asking
        else:
            return True
    return False


def is_refreshing(base: Path) -> bool:
    """True if somebody refreshes the store now; one that was killed does not count.

    Raises:
        StoreError: no rights.
    """
    with store_errors("look at", base / _REFRESH_LOCK):
        try:
            fd = os.open(base / _REFRESH_LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
    return False


def check_complete(base: Path, what: str) -> None:
    """See to it that the local metadata is what the bucket has.

    Raises:
        StoreError: it is not, or may not be.
    """
    hint = "'fleece datastore refresh' fetches it"
    state = CacheState.read(base)
    if state is None:
        raise StoreError(what, str(base), "it is no cache of a bucket")
    if is_refreshing(base):
        raise _being_refreshed(base, what)
    if not state.complete:
        raise StoreError(what, str(base), "its copy of the bucket's metadata is not complete", hint)
