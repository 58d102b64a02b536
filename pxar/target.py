"""The folder that is restored to: where its folders are open, and how entries are made in them.

An archive may be forged, and others may write where it is restored to. So every name is taken relative to an open
folder, nothing follows a symlink, and what is made is made new: an older file is replaced by renaming, never opened.
A hard link leads to the very inode that was made for its file, or to nothing.
"""

import errno
import os
import stat
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from core.buffers import Buffer
from core.errors import TargetError, os_reason
from pxar.accessor import FileNode
from pxar.attributes import Attributes, Complain
from pxar.extract_report import ExtractOptions, ExtractReport
from pxar.features import Features
from pxar.filesystem import list_folder, set_flags
from pxar.metadata import Metadata
from pxar.target_open import OpenFile, OpenFolder
from pxar.writing import SET_MODE, SET_OWNER, Written, write_files, write_sparse

#: Folders on the way to the current one that stay open, besides the target itself.
MAX_OPEN: Final = 64
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
_PATH: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
#: What concerns the whole target, not the one entry.
_FATAL: Final = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESTALE,
        errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    }
)  # fmt: skip
_UNLINKABLE: Final = Features.IMMUTABLE | Features.APPEND
_LOST_AND_FOUND: Final = b"lost+found"


class Target:
    """Makes entries in the current folder, which `enter` and `leave` change. A context manager.

    All methods belong to one thread. Entries that cannot be made are complained about in the report.

    Raises, all of them:
        TargetError: the file system is full, read-only or gone, or this process lacks something.
    """

    def __init__(self, path: str, options: ExtractOptions, report: ExtractReport, *, prefix: bytes = b"") -> None:
        """Open the folder `path`, or make it with those above it. `prefix`: its path in the archive, without slashes.

        Raises:
            TargetError: it is no folder, or has entries and `options` do not allow that, or cannot be opened.
        """
        self.path = path
        self._options, self._report = options, report
        self._attributes = Attributes(options)
        self._prefix = prefix
        self.made = not os.path.lexists(path)  #: it was not there before
        try:
            if self.made:
                Path(path).mkdir(0o700, parents=True)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise TargetError("restore to", path, os_reason(error)) from error
        inherits = self._attributes.inherits(fd, made=self.made)
        self._folders = [OpenFolder(b"", fd, None, inherits=inherits, inherited=True)]
        self._first_open = 1  # folders before it are closed, except for the first
        self._lost = 0  # levels below the current folder, none of which is there
        self._file: OpenFile | None = None
        #: Of every file that was made, in order: where its FILENAME is in the archive, and its inode.
        self._positions, self._inos = array("Q"), array("Q")
        self._copies: dict[int, tuple[int, bytes]] = {}  # of hard links whose file is not there: inode, path
        self._serial = 0
        self._how = SET_OWNER * bool(options.features & Features.OWNER)
        self._how |= SET_MODE * bool(options.features & Features.PERMISSIONS)
        try:
            if not options.allow_existing and list_folder(fd)[0] not in ([], [_LOST_AND_FOUND]):
                raise TargetError(
                    "restore to", path, "the folder is not empty", "use another one, or --force to replace files in it"
                )
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> "Target":
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the file that is not complete; the folders on the way stay without their metadata."""
        if self._file is not None:
            self.drop_file()
        for folder in self._folders:
            if folder.fd >= 0:
                os.close(folder.fd)
        self._folders.clear()

    # --- folders -----------------------------------------------------------------------------------------------------

    def enter(self, name: bytes, metadata: Metadata, taken: bool) -> None:
        """Make the folder `name` and go into it; if it was there and is not `taken`, its metadata stay."""
        if self._lost:
            self._lost += 1
            return
        parent = self._folders[-1].fd
        made = True
        try:
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
                self._report.folders += 1
            except FileExistsError:
                at_root = len(self._folders) == 1 and name == _LOST_AND_FOUND
                if not self._options.allow_existing and not at_root:
                    raise
                made = False
            fd = os.open(name, _FOLDER, dir_fd=parent)
        except OSError as error:
            if error.errno == errno.ENOTDIR or error.errno == errno.ELOOP:
                error = OSError(errno.ENOTDIR, "what is there is no folder")
            self._failed(name, error, "the folder, with all that is in it, is missing")
            self._lost = 1
            return
        above, attributes = self._folders[-1], self._attributes
        folder = OpenFolder(
            name, fd, metadata if made or taken else None, inherited=above.inherits or not made,
            inherits=(above.inherits or not made) and attributes.inherits(fd, made=made),
        )  # fmt: skip
        # Its flags come at its end: what is made in it would inherit them, and in a quota project not take hard links.
        self._folders.append(folder)
        while len(self._folders) - self._first_open > MAX_OPEN:
            closed = self._folders[self._first_open]
            os.close(closed.fd)
            closed.fd = -1
            self._first_open += 1

    def leave(self) -> None:
        """Give the current folder its metadata, and go back to the one above it."""
        if self._lost:
            self._lost -= 1
            return
        folder, parent = self._folders[-1], self._folders[-2]
        try:
            if parent.fd < 0:
                parent.fd = self._reopened(folder.fd, parent)
                self._first_open -= 1
            self._settle_folder(folder)
        finally:
            os.close(folder.fd)
            folder.fd = -1
            self._folders.pop()

    def finish(self, metadata: Metadata | None) -> None:
        """Give the target itself its metadata, unless None."""
        self._folders[0].metadata = metadata
        self._settle_folder(self._folders[0])

    def _settle_folder(self, folder: OpenFolder) -> None:
        if folder.metadata is not None:
            complain = self._complain_of(None)
            self._attributes.apply(folder.fd, folder.metadata, complain, inherited=folder.inherited)
            self._attributes.finish(folder.fd, folder.metadata.stat.flags, complain)

    def _reopened(self, below: int, parent: OpenFolder) -> int:
        try:
            fd = os.open(b"..", _FOLDER, dir_fd=below)
        except OSError as error:
            raise TargetError("restore to", self.path, os_reason(error)) from error
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) != (parent.dev, parent.ino):
            os.close(fd)
            raise TargetError("restore to", self.path, "somebody moves folders in it at the same time")
        return fd

    # --- files -------------------------------------------------------------------------------------------------------

    def files(self, files: list[tuple[bytes, bytes, Buffer]], positions: Sequence[int]) -> None:
        """Make small files without attributes: name, ENTRY item, content; `positions` of their FILENAMEs."""
        report = self._report
        if self._lost:
            return
        attributes = self._attributes
        fd = self._folders[-1].fd
        if self._folders[-1].inherits:
            for (name, entry, content), position in zip(files, positions, strict=True):
                self._written(name, entry, content, position)
            return
        made = write_files(fd, files, self._how, attributes.mode_mask, attributes.plain_mode)
        for number, written in enumerate(made):
            if written.created:
                self._not_written(files[number], positions[number], written)
                continue
            report.files += 1
            report.size += len(files[number][2])
            self._positions.append(positions[number])
            self._inos.append(written.ino)
            if written.owner or written.mode or written.time:
                self._not_settled(files[number][0], written)

    def begin_file(self, name: bytes, metadata: Metadata, position: int, copy: bool = False) -> None:
        """Begin the file `name`, whose FILENAME is at `position`; `copy`: of a hard link without its file."""
        if self._lost:
            return
        fd = self._folders[-1].fd
        temporary = name
        try:
            try:
                opened = os.open(name, _CREATE, 0o600, dir_fd=fd)
            except FileExistsError:
                allowed = self._options.overwrite_hardlinks if copy else self._options.overwrite_files
                temporary = self._temporary(name, allowed)
                opened = os.open(temporary, _CREATE, 0o600, dir_fd=fd)
        except OSError as error:
            self._failed(name, error)
            return
        self._file = OpenFile(name, temporary, opened, metadata, position, copy)
        self._attributes.start(opened, metadata.stat.flags, self._complain_of(name))

    def content(self, data: Buffer) -> None:
        """More of the file's content."""
        file = self._file
        if file is None:
            return
        try:
            write_sparse(file.fd, data, file.written)
        except OSError as error:
            self._failed(file.name, error)
            self.drop_file()
            return
        file.written += len(data)

    def end_file(self) -> None:
        """The file is complete."""
        file = self._file
        if file is None:
            return
        complain = self._complain_of(file.name)
        try:
            os.ftruncate(file.fd, file.written)
            ino = os.fstat(file.fd).st_ino
            self._attributes.apply(file.fd, file.metadata, complain, inherited=self._folders[-1].inherits)
            self._settle(file.temporary, file.name)
        except OSError as error:
            self._failed(file.name, error)
            self.drop_file()
            return
        self._attributes.finish(file.fd, file.metadata.stat.flags, complain)
        os.close(file.fd)
        self._file = None
        self._report.files += 1
        self._report.size += file.written
        if file.copy:
            self._copies[file.position] = ino, self._path_of(file.name)
        else:
            self._positions.append(file.position)
            self._inos.append(ino)

    def drop_file(self) -> None:
        """The file cannot be completed; what there is of it is removed."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file.fd)
            with suppress(OSError):
                os.unlink(file.temporary, dir_fd=self._folders[-1].fd)

    # --- everything else ---------------------------------------------------------------------------------------------

    def symlink(self, name: bytes, metadata: Metadata, target: bytes) -> None:
        """Make a symbolic link."""
        if not self._lost:
            self._other(name, metadata, self._options.overwrite_symlinks, target=target)

    def node(self, name: bytes, metadata: Metadata, device: int) -> None:
        """Make a device, FIFO or socket."""
        if not self._lost:
            self._other(name, metadata, self._options.overwrite_others, device=device)

    def hardlink(self, name: bytes, target: bytes, node: FileNode) -> None:
        """Make `name` another name of `node`, which the archive says lies at the path `target`.

        If `node` was not restored, or is not at that path any more, it becomes one of `take_unlinked`.
        """
        if self._lost:
            return
        found = self._find(target, node)
        if found < 0:
            self._folders[-1].unlinked.append((name, node))
            return
        try:
            self._link(found, name, node)
            self._report.hardlinks += 1
        except OSError as error:
            if error.errno in (errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP, errno.EPERM):
                # Not every file system has hard links, or enough of them.
                self._folders[-1].unlinked.append((name, node))
            else:
                self._failed(name, error)
        finally:
            os.close(found)

    def take_unlinked(self) -> list[tuple[bytes, FileNode]]:
        """The hard links of the current folder for which no file was found; they are forgotten."""
        if self._lost:
            return []
        folder = self._folders[-1]
        unlinked, folder.unlinked = folder.unlinked, []
        return unlinked

    def complain(self, path: bytes, what: str, why: str, alike: str | None = None) -> None:
        """Note that the entry at `path` (from the root) is missing, or not complete."""
        if not self._lost:
            self._report.failed += 1
            self._report.complain(what, path, why, alike=alike)

    def _other(
        self, name: bytes, metadata: Metadata, overwrite: bool, target: bytes | None = None, device: int = 0
    ) -> None:
        fd = self._folders[-1].fd
        mode = metadata.stat.mode

        def make(path: bytes) -> None:
            if target is not None:
                os.symlink(target, path, dir_fd=fd)
            else:
                os.mknod(path, stat.S_IFMT(mode) | 0o600, device, dir_fd=fd)

        temporary = name
        try:
            try:
                make(name)
            except FileExistsError:
                temporary = self._temporary(name, overwrite)
                make(temporary)
            try:
                handle = os.open(temporary, _PATH, dir_fd=fd)
                try:
                    found = os.fstat(handle)
                    # Somebody may have put something else in its place, whose owner must not be changed.
                    if stat.S_IFMT(found.st_mode) != stat.S_IFMT(mode) or found.st_nlink != 1:
                        raise OSError(errno.EEXIST, "somebody changes the folder at the same time")
                    self._attributes.apply(
                        f"/proc/self/fd/{handle}", metadata, self._complain_of(name),
                        inherited=self._folders[-1].inherits,
                    )  # fmt: skip
                finally:
                    os.close(handle)
                self._settle(temporary, name)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=fd)
                raise
        except OSError as error:
            self._failed(name, error)
            return
        self._report.others += 1

    def _find(self, target: bytes, node: FileNode) -> int:
        """A handle of what was made for `node`; -1 if it cannot be found."""
        position = node.filename_position
        copy = self._copies.get(position)
        if copy is not None:
            ino, path = copy
        else:
            index = bisect_left(self._positions, position)
            if index == len(self._positions) or self._positions[index] != position:
                return -1
            ino, path = self._inos[index], target
        prefix = self._prefix + b"/" if self._prefix else b""
        names = path.removeprefix(prefix).split(b"/")
        if not path.startswith(prefix) or not all(names) or b"." in names or b".." in names:
            return -1
        fd = self._folders[0].fd
        try:
            for name in names[:-1]:
                below = os.open(name, _PATH | os.O_DIRECTORY, dir_fd=fd)
                if fd != self._folders[0].fd:
                    os.close(fd)
                fd = below
            handle = os.open(names[-1], _PATH, dir_fd=fd)
        except OSError:
            return -1
        finally:
            if fd != self._folders[0].fd:
                os.close(fd)
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_ino != ino:
            os.close(handle)
            return -1
        return handle

    def _link(self, handle: int, name: bytes, node: FileNode) -> None:
        flags = node.stat.flags & self._attributes.features & _UNLINKABLE
        source = f"/proc/self/fd/{handle}"
        if flags:
            # Nobody may link to such a file, so for a moment it is none.
            changed = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                set_flags(changed, 0, flags)
                try:
                    self._link_as(source, name)
                finally:
                    set_flags(changed, flags, flags)
            finally:
                os.close(changed)
        else:
            self._link_as(source, name)

    def _link_as(self, source: str, name: bytes) -> None:
        fd = self._folders[-1].fd
        try:
            os.link(source, name, dst_dir_fd=fd, follow_symlinks=True)
        except FileExistsError:
            temporary = self._temporary(name, self._options.overwrite_hardlinks)
            os.link(source, temporary, dst_dir_fd=fd, follow_symlinks=True)
            try:
                self._settle(temporary, name)
            finally:
                # Renaming one name of a file to another one of the same file leaves both.
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=fd)

    # --- names, and what goes wrong ----------------------------------------------------------------------------------

    def _temporary(self, name: bytes, allowed: bool) -> bytes:
        """A new name for what is to replace `name`; only within a call that handles FileExistsError."""
        if not allowed:
            raise FileExistsError(errno.EEXIST, "something is there already, and was kept")
        found = os.stat(name, dir_fd=self._folders[-1].fd, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, "a folder is there already, and was kept")
        self._serial += 1
        return b".fleece-%d-%d.tmp" % (os.getpid(), self._serial)

    def _settle(self, temporary: bytes, name: bytes) -> None:
        if temporary != name:
            fd = self._folders[-1].fd
            os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)

    def _path_of(self, name: bytes | None) -> bytes:
        names = [folder.name for folder in self._folders[1:]]
        if name is not None:
            names.append(name)
        if self._prefix:
            names.insert(0, self._prefix)
        return b"/".join(names)

    def _complain_of(self, name: bytes | None) -> Complain:
        """What notes that the metadata of an entry of the current folder, or its own (None), are not complete."""

        def complain(what: str, why: str, name_it: bool) -> None:
            self._report.complain(what, self._path_of(name), why, name_it=name_it)

        return complain

    def _failed(self, name: bytes, error: OSError, what: str = "not restored") -> None:
        if error.errno in _FATAL:
            hint = "what was restored so far stays" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise TargetError("restore to", self.path, os_reason(error), hint) from error
        why = os_reason(error)
        if error.errno == errno.EEXIST and why == os.strerror(errno.EEXIST):
            why = "something is there already, and was kept"
        self.complain(self._path_of(name), what, why)

    def _not_written(self, file: tuple[bytes, bytes, Buffer], position: int, written: Written) -> None:
        name, entry, content = file
        if written.created == errno.EEXIST and self._options.overwrite_files:
            self._written(name, entry, content, position)
        else:
            self._failed(name, OSError(written.created, os.strerror(written.created)))

    def _written(self, name: bytes, entry: bytes, content: Buffer, position: int) -> None:
        self.begin_file(name, Metadata.parse(entry), position)
        self.content(content)
        self.end_file()

    def _not_settled(self, name: bytes, written: Written) -> None:
        complain = self._complain_of(name)
        if written.owner:
            self._attributes.refused(written.owner, complain)
        for what, number in (("permissions", written.mode), ("time", written.time)):
            if number:
                complain(what, os.strerror(number), True)
