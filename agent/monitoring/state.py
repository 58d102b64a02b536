"""Small JSON files in the state folder that are replaced as a whole, and locks beside them."""

import fcntl
import json
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from core.errors import BusyError, FleeceError, os_reason

#: Bytes of a file that are read.
MAX_SIZE: Final = 16 << 20
#: Permission bits: members of the group `fleece` may read, as histories.
MODE: Final = 0o640
#: Seconds between two tries for a lock.
_RETRY_S: Final = 0.05
#: Seconds after which a temporary file belongs to nobody any more.
_STALE_S: Final = 3600.0


def read_document(path: Path) -> dict[str, Any] | None:
    """The object in the file; None if it is not there, cannot be read, or is damaged: then it is made anew."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_SIZE + 1))
    except (OSError, ValueError, RecursionError):
        return None
    return finite(found) if isinstance(found, dict) else None


def finite(value: Any) -> Any:
    """`value` of a JSON document without what Python takes for numbers and nobody else does: NaN and infinity."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Replace the file, at once; its folder is made if it is missing.

    Raises:
        FleeceError: it cannot be written; the old one stays.
    """
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        replace_file(path, json.dumps(document).encode(), MODE)
    except OSError as error:
        raise FleeceError("write", str(path), os_reason(error)) from error


def replace_file(path: Path, data: bytes, mode: int) -> None:
    """Replace the file with `data` at once, for readers; after a power cut it may be empty.

    The temporary file beside it begins with a dot and ends in `.tmp`. What killed writers left goes.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    # A folder that others can write too holds whatever they like: nothing is followed, nothing opened that is there.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > _STALE_S:
                left.unlink()


@contextmanager
def locked(path: Path, *, patience_s: float = 10.0) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; call it in a thread, it may wait.

    Raises:
        BusyError: another process holds it for too long.
        FleeceError: the folder cannot be used.
    """
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, MODE)
    except OSError as error:
        raise FleeceError("use", str(path), os_reason(error)) from error
    try:
        end = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise BusyError("use", str(path), "another process holds it for too long") from None
                time.sleep(_RETRY_S)
        yield
    finally:
        os.close(descriptor)
