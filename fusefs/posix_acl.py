"""POSIX ACLs in the form that the kernel has them: the values of `system.posix_acl_access` and `..._default`.

Layout: linux/posix_acl_xattr.h. What an archive stores of them: docs/formats.md, "File archives".
"""

from collections.abc import Iterable
from struct import Struct
from typing import Final

from pxar.metadata import NO_PERMISSIONS, Acl

ACCESS: Final = b"system.posix_acl_access"
DEFAULT: Final = b"system.posix_acl_default"

_VERSION: Final = Struct("<I")
_ENTRY: Final = Struct("<HHI")  #: tag, permissions, user or group
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32
_NOBODY: Final = 0xFFFFFFFF


def access_acl(acl: Acl, mode: int) -> bytes | None:
    """The access ACL; None if the permissions in `mode` say everything."""
    if not acl.users and not acl.groups and acl.group_obj is None:
        return None
    # With an ACL the group bits are its mask.
    group = mode >> 3 if acl.group_obj is None else acl.group_obj
    return _packed([
        (_USER_OBJ, mode >> 6, _NOBODY),
        *_named(_USER, acl.users),
        (_GROUP_OBJ, group, _NOBODY),
        *_named(_GROUP, acl.groups),
        (_MASK, mode >> 3, _NOBODY),
        (_OTHER, mode, _NOBODY),
    ])  # fmt: skip


def default_acl(acl: Acl) -> bytes | None:
    """What new files in a directory get; None if it has none."""
    default = acl.default
    if default is None:
        return None
    entries = [
        (_USER_OBJ, default.user_obj, _NOBODY),
        *_named(_USER, acl.default_users),
        (_GROUP_OBJ, default.group_obj, _NOBODY),
        *_named(_GROUP, acl.default_groups),
        (_MASK, default.mask, _NOBODY),
        (_OTHER, default.other, _NOBODY),
    ]
    return _packed(entry for entry in entries if entry[1] != NO_PERMISSIONS)


def _named(tag: int, pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    # No user has a larger number; an archive that says so is forged.
    return [(tag, permissions, number) for number, permissions in sorted(pairs) if number < _NOBODY]


def _packed(entries: Iterable[tuple[int, int, int]]) -> bytes:
    return _VERSION.pack(2) + b"".join(_ENTRY.pack(tag, perm & 7, number) for tag, perm, number in entries)
