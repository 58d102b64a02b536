"""The tree that is backed up: opens its entries, and says what to do about those that cannot be read.

An entry that vanished or cannot be read is left out with a warning, whatever the reason: one bad file must not cost the
backup of all others. What concerns the whole run (no descriptors, no memory) ends it.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Final

from core.errors import SourceError, UsageError, os_reason
from pxar.create_report import CreateReport, Trouble, shown_path
from pxar.filesystem import (
    UNKNOWN_TYPE,
    Features,
    Opened,
    Scanned,
    describe,
    filesystem_type,
    is_virtual,
    open_entry,
    scan,
    supported_features,
)
from pxar.folders import Folder, OpenFolders

#: Errors of this process, not of an entry.
_OURS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_GONE: Final = frozenset({errno.ENOENT, errno.ESTALE})
#: Bytes of a file with patterns, and of the tag of a cache.
_MAX_PATTERNS: Final = 1 << 20
CACHE_TAG: Final = b"CACHEDIR.TAG"
_CACHE_SIGNATURE: Final = b"Signature: 8a477f597d28d172789f06886806bc55"
_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Source:
    """One tree, from `root` down. A context manager that closes what is open."""

    def __init__(self, path: str, wanted: Features, report: CreateReport, *, skip_e2big: bool) -> None:
        """`wanted`: what is read of metadata, where the file system has it.

        Raises:
            SourceError: `path` is no folder, cannot be read, or lies on a file system of the kernel's own (proc).
        """
        self.path: Final = path
        self.report: Final = report
        self._wanted = wanted
        self._skip_e2big = skip_e2big
        try:
            fd = os.open(path, _FLAGS | os.O_DIRECTORY)
        except OSError as error:
            raise SourceError("back up", path, os_reason(error)) from error
        try:
            magic = filesystem_type(fd)
            if is_virtual(magic):
                raise SourceError("back up", path, "it lies on a file system of the kernel's own, which holds no files")
            features = supported_features(magic) & wanted
            found = describe(fd, features, skip_e2big=skip_e2big)
            if isinstance(found, int):
                raise SourceError("back up", path, os.strerror(abs(found)), _hint(found))
        except OSError as error:
            os.close(fd)
            raise SourceError("back up", path, os_reason(error)) from error
        except SourceError:
            os.close(fd)
            raise
        self.root: Final = Folder(None, b"", found[3], found[4], features)
        self.root_meta: Final = found[1]
        self.folders: Final = OpenFolders(self.root, fd)

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.folders.close()

    def open(self, folder: Folder, name: bytes, kind: int = UNKNOWN_TYPE) -> Opened | None:
        """The entry `name` opened, for the caller to close; None if it is left out. `kind` is its `d_type`, a hint.

        Raises:
            SourceError: nothing can be opened any more, or its extended attributes are too large.
        """
        try:
            fd = self.folders.fd(folder)
        except OSError as error:
            self.left_out(folder.path_of(name), error.errno or errno.EIO)
            return None
        found = open_entry(fd, name, folder.features, type=kind, skip_e2big=self._skip_e2big)
        if isinstance(found, int):
            self.left_out(folder.path_of(name), found)
            return None
        if found[8]:
            self.report.warn(Trouble.ATTRIBUTES, folder.path_of(name))
        return found

    def scan(self, folder: Folder, names: Sequence[bytes], kinds: bytes) -> list[Scanned | int]:
        """Metadata of several entries of one folder, or what to tell `left_out`."""
        try:
            fd = self.folders.fd(folder)
        except OSError as error:
            return [error.errno or errno.EIO] * len(names)
        return scan(fd, names, folder.features, types=kinds, skip_e2big=self._skip_e2big)

    def left_out(self, path: bytes, code: int) -> None:
        """Warn that an entry cannot be opened (errno `code`) or its attributes cannot be read (minus errno).

        Raises:
            SourceError: it is no matter of this entry.
        """
        number = abs(code)
        if number in _OURS or code == -errno.E2BIG:
            raise SourceError("read", shown_path(path), os.strerror(number), _hint(code))
        if number in _GONE:
            self.report.warn(Trouble.VANISHED, path)
        else:
            self.report.warn(Trouble.UNREADABLE, path, os.strerror(number))

    def mounted(self, folder: Folder, found: Opened, allowed: frozenset[int] | None) -> tuple[bool, Features, bytes]:
        """A folder in `folder` that lies on another device: whether it is entered, what is read there, its metadata.

        `allowed`: devices that are entered; None: all, except file systems of the kernel's own.

        Raises:
            OSError: it does not answer.
        """
        magic = filesystem_type(found[9])
        features = supported_features(magic) & self._wanted
        enter = not is_virtual(magic) and (allowed is None or found[3] in allowed)
        meta = found[1]
        if features != folder.features:
            again = describe(found[9], features, skip_e2big=self._skip_e2big)
            if isinstance(again, int):
                raise OSError(abs(again), os.strerror(abs(again)))
            meta = again[1]
        return enter, features, meta

    def is_at(self, path: bytes, key: tuple[int, int]) -> bool:
        """Whether the file `key` (device, inode) lies at `path`, from the root, now."""
        try:
            found = os.stat(path, dir_fd=self.folders.fd(self.root), follow_symlinks=False)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == key

    def patterns(self, folder: Folder, name: bytes) -> bytes | None:
        """The text of a file with patterns, symlinks followed; None, with a warning, if it cannot be used."""
        try:
            dir_fd = self.folders.fd(folder)
            # Asked first: opening a device may do something.
            if not S_ISREG(os.stat(name, dir_fd=dir_fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            fd = os.open(name, _FLAGS, dir_fd=dir_fd)
            with os.fdopen(fd, "rb") as file:
                if not S_ISREG(os.fstat(fd).st_mode):
                    raise OSError(errno.EINVAL, "not a regular file")
                text = file.read(_MAX_PATTERNS + 1)
        except OSError as error:
            self.report.warn(Trouble.PATTERNS, folder.path_of(name), os_reason(error))
            return None
        if len(text) > _MAX_PATTERNS:
            self.report.warn(Trouble.PATTERNS, folder.path_of(name), f"it has more than {_MAX_PATTERNS} bytes")
            return None
        return text

    def is_cache(self, folder: Folder) -> bool:
        """Whether the `CACHEDIR.TAG` of `folder` is one (https://bford.info/cachedir/)."""
        try:
            fd = os.open(CACHE_TAG, _FLAGS | os.O_NOFOLLOW, dir_fd=self.folders.fd(folder))
        except OSError:
            return False
        try:
            return S_ISREG(os.fstat(fd).st_mode) and os.read(fd, len(_CACHE_SIGNATURE)) == _CACHE_SIGNATURE
        except OSError:
            return False
        finally:
            os.close(fd)


def devices_of(paths: Sequence[str]) -> set[int]:
    """The devices that `paths` lie on.

    Raises:
        UsageError: one is not there.
    """
    devices = set()
    for path in paths:
        try:
            devices.add(Path(path).stat().st_dev)
        except OSError as error:
            raise UsageError("include the device of", path, os_reason(error)) from error
    return devices


def _hint(code: int) -> str:
    return "--skip-e2big-xattr leaves them out" if code == -errno.E2BIG else ""
