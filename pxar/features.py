"""What of a file's metadata is read or restored, and what each file system has of it.

Layout: docs/formats.md, "File metadata". The low bits of these flags are also the `flags` word of an ENTRY item: the
inode attributes that `chattr` and FAT know.
"""

from enum import IntFlag
from typing import Final


class Features(IntFlag):
    """What a backup reads or a restore sets; the first group are the bits that are stored."""

    HIDDEN = 0x2000
    SYSTEM = 0x4000
    ARCHIVE = 0x8000
    APPEND = 0x1_0000
    NOATIME = 0x2_0000
    COMPR = 0x4_0000
    NOCOW = 0x8_0000
    NODUMP = 0x10_0000
    DIRSYNC = 0x20_0000
    IMMUTABLE = 0x40_0000
    SYNC = 0x80_0000
    NOCOMP = 0x100_0000
    PROJINHERIT = 0x200_0000

    TWO_SECOND_TIME = 0x40
    READ_ONLY = 0x80
    PERMISSIONS = 0x100
    SYMLINKS = 0x200
    DEVICE_NODES = 0x400
    FIFOS = 0x800
    SOCKETS = 0x1000
    SUBVOLUME = 0x400_0000
    SUBVOLUME_RO = 0x800_0000
    XATTRS = 0x1000_0000
    ACL = 0x2000_0000
    SELINUX = 0x4000_0000
    FCAPS = 0x8000_0000
    QUOTA_PROJID = 0x1_0000_0000
    OWNER = 0x2_0000_0000


_F = Features
#: Attributes of FAT, read and set by ioctls of their own.
FAT_FLAGS: Final = _F.HIDDEN | _F.SYSTEM | _F.ARCHIVE
CHATTR_FLAGS: Final = (
    _F.APPEND | _F.NOATIME | _F.COMPR | _F.NOCOW | _F.NODUMP | _F.DIRSYNC | _F.IMMUTABLE | _F.SYNC | _F.NOCOMP
    | _F.PROJINHERIT
)  # fmt: skip
#: Everything the `flags` word of an ENTRY may hold.
STORED_FLAGS: Final = FAT_FLAGS | CHATTR_FLAGS
#: Set on a file while it is empty: some have no effect later.
INITIAL_FLAGS: Final = _F.NOATIME | _F.COMPR | _F.NOCOW | _F.NOCOMP | _F.PROJINHERIT

#: Bits of FS_IOC_GETFLAGS and FAT_IOCTL_GET_ATTRIBUTES by what they are stored as.
CHATTR_BITS: Final = {
    _F.APPEND: 0x20,
    _F.NOATIME: 0x80,
    _F.COMPR: 0x04,
    _F.NOCOW: 0x0080_0000,
    _F.NODUMP: 0x40,
    _F.DIRSYNC: 0x0001_0000,
    _F.IMMUTABLE: 0x10,
    _F.SYNC: 0x08,
    _F.NOCOMP: 0x400,
    _F.PROJINHERIT: 0x2000_0000,
}
FAT_BITS: Final = {_F.HIDDEN: 0x02, _F.SYSTEM: 0x04, _F.ARCHIVE: 0x20}

#: What is wanted unless somebody says otherwise. Restored files shall be dumped, even if the originals were not.
DEFAULT: Final = _F(sum(_F)) & ~(_F.TWO_SECOND_TIME | _F.READ_ONLY | _F.NODUMP)

_POSIX = _F.PERMISSIONS | _F.SYMLINKS | _F.DEVICE_NODES | _F.FIFOS | _F.SOCKETS | _F.OWNER
_DISK_FLAGS = _F.APPEND | _F.NOATIME | _F.NODUMP | _F.DIRSYNC | _F.IMMUTABLE | _F.SYNC | _F.PROJINHERIT
_DISK = _POSIX | _F.XATTRS | _F.ACL | _F.FCAPS | _F.SELINUX | _F.QUOTA_PROJID | _DISK_FLAGS
_BTRFS_FLAGS = CHATTR_FLAGS & ~_F.PROJINHERIT
_SUPPORTED: Final = {
    0x4D44: FAT_FLAGS,  # msdos, vfat
    0xEF53: _DISK,  # ext4
    0x5846_5342: _DISK,  # XFS
    0x2FC1_2FC1: _DISK,  # ZFS
    0x9123_683E: _POSIX | _F.XATTRS | _F.ACL | _F.FCAPS | _F.SELINUX | _F.SUBVOLUME | _F.SUBVOLUME_RO | _BTRFS_FLAGS,
    # No XATTRS, so that nothing of this is read: what PBS does.
    0x0102_1994: _POSIX | _F.ACL | _F.SELINUX,  # tmpfs
    0x6573_5546: _POSIX | _F.XATTRS | FAT_FLAGS | CHATTR_FLAGS,  # FUSE
}
_OTHERS: Final = _POSIX | _F.XATTRS | _F.ACL | _F.FCAPS

#: Types of file systems whose files are views of the kernel.
_VIRTUAL: Final = frozenset(
    {
        0x4249_4E4D,  # binfmt_misc
        0x0027_E0EB,  # cgroup
        0x6367_7270,  # cgroup2
        0x6265_6570,  # configfs
        0x6462_6720,  # debugfs
        0x1CD1,  # devpts
        0xDE5E_81E4,  # efivarfs
        0x6573_5543,  # fusectl
        0x9584_58F6,  # hugetlbfs
        0x1980_0202,  # mqueue
        0x6E66_7364,  # nfsd
        0x9FA0,  # proc
        0x6165_676C,  # pstore
        0x6759_6969,  # rpcauth
        0x7363_6673,  # securityfs
        0xF97C_FF8C,  # selinuxfs
        0x4341_5D53,  # smack
        0x6265_6572,  # sysfs
    }
)


def supported_features(magic: int) -> Features:
    """What the file system of type `magic` (see `filesystem_type`) has; the inode flags are read on all of them."""
    return _SUPPORTED.get(magic & 0xFFFF_FFFF, _OTHERS)


def is_virtual(magic: int) -> bool:
    """True for file systems that hold no files of anybody: proc, sysfs, cgroup and the like."""
    return magic & 0xFFFF_FFFF in _VIRTUAL


def stored_flags(chattr: int, fat: int = 0) -> int:
    """The `flags` word of an ENTRY for the bits of the two ioctls."""
    stored = sum(flag for flag, bit in CHATTR_BITS.items() if chattr & bit)
    return stored + sum(flag for flag, bit in FAT_BITS.items() if fat & bit)
