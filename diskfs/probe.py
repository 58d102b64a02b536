"""What the first blocks of a volume say that it holds."""

from typing import Final, Literal

from diskfs.blocks import Blocks

#: Bytes that are looked at: the superblock of btrfs lies at 64 KiB.
_LOOKED_AT: Final = 68 << 10
#: Offset, bytes there, what it is.
_SIGNS: Final = (
    (0, b"LUKS\xba\xbe", "LUKS"),
    (3, b"-FVE-FS-", "BitLocker"),
    (3, b"NTFS    ", "ntfs"),
    (3, b"EXFAT   ", "exfat"),
    (3, b"ReFS", "refs"),
    (0, b"XFSB", "xfs"),
    (0x10040, b"_BHRfS_M", "btrfs"),
    (0x438, b"\x53\xef", "ext"),
    (4086, b"SWAPSPACE2", "swap"),
    (65526, b"SWAPSPACE2", "swap"),
    (0x8001, b"CD001", "iso9660"),
    (0x400, b"\x10\x20\xf5\xf2", "f2fs"),
    (0, b"hsqs", "squashfs"),
    (0x400, b"H+", "hfsplus"),
    (0x400, b"HX", "hfsplus"),
    (32, b"NXSB", "apfs"),
    (4096, b"\xfc\x4e\x2b\xa9", "MD RAID member"),
    (0, b"\xfc\x4e\x2b\xa9", "MD RAID member"),
    (4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "bcache"),
    (4120, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", "bcachefs"),
    (516, b"!Stra0tis\x86\xff\x02^\x41rh", "Stratis"),
    (0, b"dmvdo001", "VDO"),
    (0, b"integrt\0", "dm-integrity"),
    (0, b"verity\0\0", "dm-verity"),
    (0x8000, b"JFS1", "jfs"),
    (0x10034, b"ReIsEr", "reiserfs"),
    (0x2000, b"OCFSV2", "ocfs2"),
    (0x10000, b"\x01\x16\x19\x70", "gfs2"),
    (0x8001, b"BEA01", "udf"),
    (0x400, b"\xe2\xe1\xf5\xe0", "erofs"),
    (0x1055C, b"\x19\x01\x54\x19", "ufs"),
)  # fmt: skip
#: Offset and length of the label.
_LABELS: Final = {
    "ext2": (0x478, 16), "ext3": (0x478, 16), "ext4": (0x478, 16), "xfs": (108, 12), "btrfs": (0x1012B, 256),
    "swap": (0x41C, 16),
}  # fmt: skip
_LVM_SECTORS: Final = 4
#: Uberblocks of ZFS lie in the last half of its labels of 256 KiB, one every KiB or more.
_ZFS_UBERBLOCKS: Final = range(0x20000, 0x40000, 1024)
_ZFS_SIGNS: Final = (b"\x0c\xb1\xba\0\0\0\0\0", b"\0\0\0\0\0\xba\xb1\x0c")
_FAT_EXTENDED: Final = 0x29
_MD_SIGN: Final = b"\xfc\x4e\x2b\xa9"
#: File systems that can be looked into.
READABLE: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "ntfs", "fat"})
LVM: Final = "LVM2 member"


def probe(blocks: Blocks) -> tuple[str, str]:
    """What `blocks` hold: one of `READABLE`, `LVM`, the name of something else, `empty` or `unknown`; and its label."""
    head = blocks.read_at(0, _LOOKED_AT)
    for sector in range(_LVM_SECTORS):
        if head[sector * 512 : sector * 512 + 8] == b"LABELONE":
            return LVM, ""
    for offset, sign, kind in _SIGNS:
        if head[offset : offset + len(sign)] == sign:
            if kind == "ext":
                kind = _ext_version(head)
            place = _LABELS.get(kind)
            return kind, "" if place is None else _text(head[place[0] : place[0] + place[1]])
    if _is_fat(head):
        return "fat", _fat_label(head)
    found = _elsewhere(blocks)
    if found:
        return found, ""
    return "unknown" if any(head) else "empty", ""


def _elsewhere(blocks: Blocks) -> str:
    """What has its signs behind the first blocks: ZFS, and MD RAID of the forms 0.90 and 1.0; empty if nothing has."""
    data = blocks.read_at(_ZFS_UBERBLOCKS.start, len(_ZFS_UBERBLOCKS) * _ZFS_UBERBLOCKS.step)
    if any(data[at : at + 8] in _ZFS_SIGNS for at in range(0, len(data), _ZFS_UBERBLOCKS.step)):
        return "ZFS member"
    for place in (blocks.size // (64 << 10) * (64 << 10) - (64 << 10), (blocks.size // 512 - 16) // 8 * 4096):
        if blocks.read_at(place, 4) == _MD_SIGN:
            return "MD RAID member"
    return ""


def stated_size(kind: str, blocks: Blocks) -> int:
    """Bytes of the file system of a kind that can be read, as its first blocks say; 0 if they do not."""
    head = blocks.read_at(0, _LOOKED_AT)

    def number(at: int, length: int, order: Literal["little", "big"] = "little") -> int:
        return int.from_bytes(head[at : at + length], order)

    match kind:
        case "ext2" | "ext3" | "ext4":
            high = number(0x550, 4) if number(0x460, 4) & 0x80 else 0
            return (high << 32 | number(0x404, 4)) << 10 + min(number(0x418, 4), 6)
        case "xfs":
            return number(8, 8, "big") * number(4, 4, "big")
        case "btrfs":
            return number(0x10070, 8)
        case "ntfs":
            return number(0x28, 8) * number(11, 2)
        case "fat":
            return (number(19, 2) or number(32, 4)) * number(11, 2)
    return 0


def btrfs_devices(blocks: Blocks) -> int:
    """Of how many devices a btrfs is made, one of which is `blocks`."""
    return int.from_bytes(blocks.exactly(0x10088, 8), "little")


def _ext_version(head: bytes) -> str:
    compatible, incompatible = (int.from_bytes(head[at : at + 4], "little") for at in (0x45C, 0x460))
    if incompatible & 0x40:  # extents
        return "ext4"
    return "ext3" if compatible & 0x4 else "ext2"  # a journal


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "replace")


def _fat_label(head: bytes) -> str:
    at = 43 if any(head[17:19]) else 71  # FAT32 has no fixed root directory, and more before the label
    if head[at - 5] != _FAT_EXTENDED:
        return ""
    label = head[at : at + 11].decode("cp437").rstrip(" \0")
    return "" if label == "NO NAME" else label


def _is_fat(head: bytes) -> bool:
    """Whether it begins with a boot sector as FAT has it."""
    if len(head) < 512 or head[0] not in (0xEB, 0xE9) or head[510:512] != b"\x55\xaa":
        return False
    sector, cluster, reserved, tables = (
        int.from_bytes(head[11:13], "little"), head[13], int.from_bytes(head[14:16], "little"), head[16],
    )  # fmt: skip
    return (
        sector in (512, 1024, 2048, 4096)
        and cluster in (1, 2, 4, 8, 16, 32, 64, 128)
        and reserved > 0
        and tables in (1, 2)
        and (head[21] == 0xF0 or head[21] >= 0xF8)
    )
