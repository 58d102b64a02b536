"""What the first blocks of a volume say that it holds."""

from typing import Final

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
)  # fmt: skip
#: Offset and length of the label.
_LABELS: Final = {
    "ext2": (0x478, 16), "ext3": (0x478, 16), "ext4": (0x478, 16), "xfs": (108, 12), "btrfs": (0x1012B, 256),
    "swap": (0x41C, 16),
}  # fmt: skip
_LVM_SECTORS: Final = 4
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
        return "fat", ""
    return "unknown" if any(head) else "empty", ""


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
