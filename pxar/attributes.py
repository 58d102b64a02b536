"""Gives restored entries their owner, attributes, ACLs, permissions, times and flags, in the order that keeps them all.

chown clears setuid bits and capabilities, so it comes first; an ACL changes the group bits, so permissions come after;
IMMUTABLE and APPEND forbid everything else, so flags come last. Docs: docs/formats.md, "File metadata".
"""

import errno
import os
import stat
import struct
from collections.abc import Callable
from typing import Final

from core.errors import os_reason
from pxar.extract_report import ExtractOptions
from pxar.features import CHATTR_FLAGS, FAT_FLAGS, INITIAL_FLAGS, Features
from pxar.filesystem import UNSUPPORTED, acl_values, set_flags, set_projid
from pxar.metadata import Metadata, Stat

#: Called with what went wrong, the reason, and whether the entry is to be named.
Complain = Callable[[str, str, bool], None]
_NOT_THERE: Final = "the file system has no such thing"
_ONLY_ROOT: Final = "only root can give files away"
_FLAGS: Final = CHATTR_FLAGS | FAT_FLAGS
_ACCESS_ACL: Final = "system.posix_acl_access"
_DEFAULT_ACL: Final = "system.posix_acl_default"
#: What the kernel says of an ACL that is not there, or that cannot be.
_NO_ACL: Final = frozenset({errno.ENODATA, errno.EOPNOTSUPP})
_SET_ID: Final = stat.S_ISUID | stat.S_ISGID
_NANOSECONDS: Final = 10**9


class Attributes:
    """Sets metadata as the options of one restore say; nothing of it raises, what is refused is complained about."""

    def __init__(self, options: ExtractOptions) -> None:
        self.features: Final = options.features
        self._drop_setuid = options.drop_setuid
        self._is_root = os.geteuid() == 0
        # Nothing of this process makes files meanwhile but this thread.
        self._umask = os.umask(0o077)
        os.umask(self._umask)

    @property
    def mode_mask(self) -> int:
        """The permission bits of a file that may be set."""
        return 0o7777 & ~_SET_ID if self._drop_setuid else 0o7777

    @property
    def plain_mode(self) -> int:
        """The permissions of a file if those of the archive are not wanted."""
        return 0o666 & ~self._umask

    def start(self, fd: int, flags: int, complain: Complain) -> None:
        """Set on a new, empty file those `flags` that have no effect later."""
        mask = self.features & INITIAL_FLAGS
        if flags & mask:
            self._attempt(complain, "flags", set_flags, fd, flags & mask, mask & flags)

    def apply(self, where: int | str, metadata: Metadata, complain: Complain, *, inherited: bool) -> None:
        """Give everything but flags to `where`: an open file or folder, else a path in /proc/self/fd.

        `inherited`: it may have ACLs, its own or those that new entries get from their folder.
        """
        features, found = self.features, metadata.stat
        kind = stat.S_IFMT(found.mode)
        owned = self._owner(where, found, complain)
        self._xattrs(where, kind, metadata, complain)
        self._acl(where, kind, metadata, complain, inherited)
        if metadata.projid is not None and features & Features.QUOTA_PROJID and isinstance(where, int):
            try:
                set_projid(where, metadata.projid)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    complain("project id", os_reason(error), True)
            except struct.error as error:
                complain("project id", str(error), True)
        if kind != stat.S_IFLNK:
            self._attempt(complain, "permissions", os.chmod, where, self._mode(kind, found.mode, owned))
        self._time(where, found, complain)

    def finish(self, fd: int, flags: int, complain: Complain) -> None:
        """Set the flags of a file or folder that nobody will change any more."""
        mask = self.features & _FLAGS
        if flags & mask:
            self._attempt(complain, "flags", set_flags, fd, flags & mask, mask)

    def refused(self, number: int, complain: Complain) -> None:
        """Complain about a chown that failed with errno `number`."""
        if number == errno.EPERM and not self._is_root:
            complain("owner", _ONLY_ROOT, False)
        else:
            self._complain_of(complain, "owner", OSError(number, os.strerror(number)))

    def _owner(self, where: int | str, found: Stat, complain: Complain) -> bool:
        if not self.features & Features.OWNER:
            return False
        try:
            os.chown(where, found.uid, found.gid)
        except OSError as error:
            self.refused(error.errno or 0, complain)
            return False
        except OverflowError as error:
            complain("owner", str(error), True)
            return False
        return True

    def _mode(self, kind: int, mode: int, owned: bool) -> int:
        if not self.features & Features.PERMISSIONS:
            return (0o777 if kind == stat.S_IFDIR else 0o666) & ~self._umask
        # A program that runs as its owner must not become one that runs as somebody else.
        keep = kind == stat.S_IFDIR or (owned and not self._drop_setuid)
        return mode & 0o7777 if keep else mode & 0o7777 & ~_SET_ID

    def _xattrs(self, where: int | str, kind: int, metadata: Metadata, complain: Complain) -> None:
        if self.features & Features.XATTRS:
            self._stored_xattrs(where, metadata, complain)
        if metadata.fcaps is None or not self.features & Features.FCAPS or self._drop_setuid:
            return
        if kind == stat.S_IFREG:
            self._attempt(complain, "file capabilities", os.setxattr, where, "security.capability", metadata.fcaps)

    def _stored_xattrs(self, where: int | str, metadata: Metadata, complain: Complain) -> None:
        told = set()
        for name, value in metadata.xattrs:
            if not _is_restored(name):
                complain("extended attributes", "one is of a kind that is not restored", True)
                continue
            try:
                os.setxattr(where, name, value)
            except OSError as error:
                # One that is too large, or of a kind that the file system has not, says nothing about the others.
                if error.errno not in told:
                    told.add(error.errno)
                    self._complain_of(complain, "extended attributes", error)

    def inherits(self, folder: int, *, made: bool) -> bool:
        """Whether new entries of an open folder get ACLs from it; one that was `made` here loses its default ACL."""
        if not self.features & Features.ACL:
            return False
        try:
            if made:
                os.removexattr(folder, _DEFAULT_ACL)
            else:
                os.getxattr(folder, _DEFAULT_ACL)
        except OSError as error:
            return error.errno not in _NO_ACL
        return not made

    def _acl(self, where: int | str, kind: int, metadata: Metadata, complain: Complain, inherited: bool) -> None:
        if not self.features & Features.ACL or kind == stat.S_IFLNK:
            return
        access = default = None
        if metadata.acl:
            values = acl_values(metadata.stat.mode, metadata.acl)
            if values.guessed:
                complain("ACL", "it is not complete; what is missing was taken from the permissions", True)
            access, default = values.access, values.default
        for name, value in ((_ACCESS_ACL, access), (_DEFAULT_ACL, default)):
            if name == _DEFAULT_ACL and kind != stat.S_IFDIR:
                continue
            if value is not None:
                self._attempt(complain, "ACL", os.setxattr, where, name, value)
            elif inherited:
                # Else it would give rights that nobody had.
                self._attempt(complain, "ACL", _remove_acl, where, name)

    def _time(self, where: int | str, found: Stat, complain: Complain) -> None:
        try:
            atime = os.stat(where).st_atime_ns  # noqa: PTH116 - a descriptor, or a handle in /proc
            os.utime(where, ns=(atime, found.mtime_s * _NANOSECONDS + found.mtime_ns))
        except OSError as error:
            self._complain_of(complain, "time", error)
        except OverflowError as error:
            complain("time", str(error), True)

    def _attempt(self, complain: Complain, what: str, call: Callable[..., object], *arguments: object) -> bool:
        try:
            call(*arguments)
        except OSError as error:
            self._complain_of(complain, what, error)
            return False
        return True

    @staticmethod
    def _complain_of(complain: Complain, what: str, error: OSError) -> None:
        if error.errno == errno.EOPNOTSUPP:
            complain(what, _NOT_THERE, False)
        else:
            complain(what, os_reason(error), True)


def _is_restored(name: bytes) -> bool:
    """Whether it is an extended attribute that archives hold: nothing that a kernel or a security module acts on."""
    return len(name) <= 255 and (name.startswith((b"user.", b"trusted.")) or name == b"security.NTACL")


def _remove_acl(where: int | str, name: str) -> None:
    try:
        os.removexattr(where, name)
    except OSError as error:
        if error.errno not in _NO_ACL:
            raise
