"""Small files that hold keys: read within bounds, written whole, for their owner alone."""

import errno
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from core.errors import FleeceError, FormatError, NotFoundError, os_reason

#: Bytes that such a file may have; PBS's key files have about 450.
MAX_KEY_FILE_SIZE: Final = 64 << 10

#: How a file system says that it has no modes, or no hard links: FAT on a stick, some network file systems.
_UNSUPPORTED: Final = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


def read_small(path: Path, *, what: str, limit: int = MAX_KEY_FILE_SIZE) -> bytes:
    """The content of the regular file or pipe `path`, at most `limit` bytes.

    Raises:
        NotFoundError: there is none.
        FormatError: it is larger.
        FleeceError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise NotFoundError(what, str(path), "there is no such file") from None
    except (OSError, ValueError) as error:
        why = os_reason(error) if isinstance(error, OSError) else str(error)
        raise FleeceError(what, str(path), why) from error
    if len(data) > limit:
        raise FormatError(what, str(path), f"it has more than {limit} bytes")
    return data


def write_new(path: Path, data: bytes, *, what: str, mode: int = 0o600) -> None:
    """Write the new file `path`, whole or not at all, durable, and never over one that is there.

    Folders above it are made if they are missing, for nobody else to look into. A file system without modes gives the
    file its own: `readable_by_others` tells.

    Raises:
        FleeceError: there is a file already, or it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = _temporary(path, data, mode)
        try:
            _publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except FileExistsError:
        raise FleeceError(
            what, str(path), "there is a file already, and it may be the only one with its key",
            "name another file, or move that one away",
        ) from None  # fmt: skip
    except OSError as error:
        raise FleeceError(what, str(path), os_reason(error)) from error


def readable_by_others(path: Path) -> bool:
    """True if the mode of the file `path` lets group or others read it."""
    try:
        return bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
    except OSError:
        return False


def replace(path: Path, data: bytes, *, what: str) -> None:
    """Replace the file `path` (of a link: what it points to), at once and durably; mode 0600, the owner stays.

    Raises:
        FleeceError: it cannot be written; the old file is there as before.
    """
    try:
        path = path.resolve(strict=True)
        before = path.stat()
        if not stat.S_ISREG(before.st_mode):
            raise FleeceError(what, str(path), "it is no regular file")
        temporary = _temporary(path, data, 0o600)
        try:
            if os.geteuid() == 0:
                os.chown(temporary, before.st_uid, before.st_gid)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise FleeceError(what, str(path), os_reason(error)) from error


def _publish(temporary: Path, path: Path) -> None:
    """Give the file `temporary` the new name `path`; `temporary` may be there still."""
    try:
        # Unlike a rename, a link never replaces.
        os.link(temporary, path, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        # The name is taken first, then what it stands for is exchanged.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _temporary(path: Path, data: bytes, mode: int) -> Path:
    """A file beside `path` with `data` on the disk."""
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            _set_mode(descriptor, mode)
            os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def _set_mode(descriptor: int, mode: int) -> None:
    try:
        os.fchmod(descriptor, mode)
    except OSError as error:
        # The file is ours, so that it is not a matter of rights.
        if error.errno not in _UNSUPPORTED:
            raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
