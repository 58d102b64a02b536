"""Partition tables: what sfdisk writes, and what nobody should."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from diskfs.blocks import Disk
from diskfs.errors import DiskFsError
from diskfs.image import DiskImage
from diskfs.tables import Table, read_table
from tests.support.cache import Unavailable
from tests.support.file_systems import run_tool

_MIB = 1 << 20
_TABLES = {
    "gpt": "label: gpt\nsize=1M,type=21686148-6449-6E6F-744E-656564454649\nsize=3M,name=root\nstart=20480,size=2M\n",
    "dos": "label: dos\nsize=1M,type=83\nsize=2M,type=c\nsize=20M,type=5\nsize=1M,type=83\nsize=2M\nsize=3M\nsize=4M\n",
    "gap": "label: dos\n2 : size=1M,type=83\n3 : start=10240,size=20M,type=f\n7 : start=20480,size=1M\n",
}  # fmt: skip


def table_of(data: bytes | bytearray) -> Table | None:
    return read_table(Disk(0, len(data), lambda _, offset, length: bytes(data[offset : offset + length])))


@pytest.fixture
def disk(tmp_path: Path) -> Callable[[str], tuple[bytearray, list[dict[str, int]]]]:
    """A disk of 40 MiB with a table that sfdisk wrote, and its partitions as sfdisk lists them."""

    def make(kind: str) -> tuple[bytearray, list[dict[str, int]]]:
        path = tmp_path / kind
        with path.open("wb") as file:
            file.truncate(40 * _MIB)
        try:
            # It is no device: there is no kernel to tell, and no file system of this machine to flush for that.
            run_tool(["sfdisk", "-q", "--no-reread", "--no-tell-kernel", path], stdin=_TABLES[kind])
            found = json.loads(run_tool(["sfdisk", "--json", path]))["partitiontable"]["partitions"]
        except Unavailable as reason:  # neither the package nor a network to get it by
            pytest.skip(f"no partition tables to test with: {reason}")
        return bytearray(path.read_bytes()), [
            {"number": int(one["node"].removeprefix(str(path)).lstrip("p")), "start": one["start"], "size": one["size"]}
            for one in found
        ]

    return make


@pytest.mark.parametrize("kind", list(_TABLES))
def test_partitions_have_the_numbers_and_places_that_sfdisk_lists(
    kind: str, disk: Callable[[str], tuple[bytearray, list[dict[str, int]]]]
) -> None:
    data, wanted = disk(kind)
    table = table_of(data)
    assert table is not None
    assert table.problem == ""
    # The extended partition is a place for others.
    listed = [one for one in wanted if not (kind != "gpt" and one["number"] == 3)]
    assert [(one.number, one.offset, one.size) for one in table.partitions] == [
        (one["number"], one["start"] * 512, one["size"] * 512) for one in listed
    ]


def test_the_second_copy_of_a_gpt_is_used_where_the_first_is_damaged(
    disk: Callable[[str], tuple[bytearray, list[dict[str, int]]]],
) -> None:
    data, _ = disk("gpt")
    whole = table_of(data)
    assert whole is not None
    for place in (512 + 40, 1024 + 40):  # the header, its rows
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        table = table_of(damaged)
        assert table is not None
        assert table.partitions == whole.partitions
        assert "second" in table.problem
    data[512:1024] = data[-512:] = bytes(512)
    with pytest.raises(DiskFsError, match="the GPT is damaged: its header is missing"):
        table_of(data)


def test_the_second_copy_of_a_gpt_is_found_where_the_first_one_says_on_a_disk_that_has_grown(
    disk: Callable[[str], tuple[bytearray, list[dict[str, int]]]],
) -> None:
    data, _ = disk("gpt")
    whole = table_of(data)
    assert whole is not None
    data[1024 + 40] ^= 0xFF  # its rows
    table = table_of(data + bytes(4 * _MIB))
    assert table is not None
    assert table.partitions == whole.partitions


def looked_at(data: bytes | bytearray) -> tuple[list[tuple[bytes, str]], list[str]]:
    """Volumes and their kinds, and what is said of the table."""
    image = DiskImage([len(data)], 0, lambda _, offset, length: bytes(data[offset : offset + length]))
    return [(one.name, one.kind) for one in image.volumes()], [one.text for one in image.remarks()]


def test_what_is_wrong_with_a_table_that_is_read_is_said(
    disk: Callable[[str], tuple[bytearray, list[dict[str, int]]]],
) -> None:
    data, _ = disk("gpt")
    volumes, said = looked_at(data)
    assert said == []
    damaged = bytearray(data)
    damaged[512 + 40] ^= 0xFF
    assert looked_at(damaged) == (
        volumes,
        ["the partition table is damaged: the first copy of its GPT is damaged, the second one is used"],
    )
    damaged = bytearray(data)
    damaged[:512] = bytes(512)
    assert looked_at(damaged) == (
        volumes, ["the partition table is damaged: the MBR that announces its GPT is missing"],
    )  # fmt: skip
    damaged[512:1024] = bytes(512)  # a disk that was emptied
    assert looked_at(damaged) == ([(b"raw", "unknown")], [])
    data, wanted = disk("dos")
    data[wanted[2]["start"] * 512 + 510] = 0
    volumes, said = looked_at(data)
    assert [name for name, _ in volumes] == [b"part1", b"part2", b"part4"]
    assert said == [
        "the partition table is damaged: the chain of logical partitions is broken; partitions may be missing"
    ]
    data, _ = disk("gap")
    struct.pack_into("<I", data, 446 + 16 + 12, 1 << 20)
    assert looked_at(data)[1] == ["part2 ends behind the end of the disk, and is cut off there"]


@pytest.mark.parametrize("kind", ["gpt", "dos"])
def test_a_boot_sector_of_fat_that_was_left_behind_does_not_hide_a_table(
    kind: str, disk: Callable[[str], tuple[bytearray, list[dict[str, int]]]]
) -> None:
    data, _ = disk(kind)
    wanted = looked_at(data)
    # What mkfs.fat leaves of it: jump, name and geometry.
    data[:36] = b"\xebX\x90mkfs.fat" + struct.pack("<HBHBHHBH4xII", 512, 1, 32, 2, 0, 0, 0xF8, 0, 0, 81920)[:25]
    assert looked_at(data) == wanted
    # As a disk that is FAT as a whole has them: no rows, or rows that are no partitions.
    for rows in (bytes(64), b"\0\1\1\0\6\1\1\0" + struct.pack("<II", 0, 81920) + bytes(48), b"Invalid".ljust(64)):
        data[446:510] = rows
        assert looked_at(data) == ([(b"raw", "fat")], [])


def test_an_mbr_counts_in_sectors_of_4096_bytes_where_only_that_leads_to_something() -> None:
    data = bytearray(8 * _MIB)
    data[510:512] = b"\x55\xaa"
    data[446:462] = struct.pack("<B3xB3xII", 0, 0x83, 256, 512)
    data[462:478] = struct.pack("<B3xB3xII", 0, 0x05, 1024, 512)
    chain = 1024 * 4096
    data[chain + 446 : chain + 462] = struct.pack("<B3xB3xII", 0, 0x83, 64, 128)
    data[chain + 510 : chain + 512] = b"\x55\xaa"
    assert [name for name, _ in looked_at(data)[0]] == [b"part1"]
    at = 256 * 4096
    data[at + 0x438 : at + 0x43A] = b"\x53\xef"
    assert looked_at(data) == ([(b"part1", "ext2"), (b"part5", "empty")], [])
    # Where there is something with 512 as well, that is meant.
    at = 256 * 512
    data[at + 0x438 : at + 0x43A] = b"\x53\xef"
    assert (b"part1", "ext2") in looked_at(data)[0]
    assert (b"part5", "empty") not in looked_at(data)[0]


def test_what_has_its_signs_far_behind_is_named() -> None:
    for place, sign, kind in (
        (0x20000 + 5 * 1024, b"\x0c\xb1\xba\0\0\0\0\0", "ZFS member"),
        (3 * _MIB - (64 << 10), b"\xfc\x4e\x2b\xa9", "MD RAID member"),  # form 0.90
        (3 * _MIB + (24 << 10), b"\xfc\x4e\x2b\xa9", "MD RAID member"),  # form 1.0
    ):
        data = bytearray(3 * _MIB + (32 << 10))
        data[place : place + len(sign)] = sign
        assert looked_at(data) == ([(b"raw", kind)], [])


def test_a_file_system_that_is_larger_than_its_volume_is_said_to_be_so() -> None:
    data = bytearray(8 * _MIB)
    data[:4] = b"XFSB"
    struct.pack_into(">IQ", data, 4, 4096, 8 * _MIB // 4096)
    assert looked_at(data) == ([(b"raw", "xfs")], [])
    struct.pack_into(">IQ", data, 4, 4096, 3 * 8 * _MIB // 4096)
    said = f"raw has {8 * _MIB} bytes, its file system {24 * _MIB}: it is cut off, or one of the disks of an array"
    assert looked_at(data) == ([(b"raw", "xfs")], [said])


def test_logical_partitions_that_lead_to_themselves_are_shown_once(
    disk: Callable[[str], tuple[bytearray, list[dict[str, int]]]],
) -> None:
    data, wanted = disk("dos")
    extended = wanted[2]["start"]
    # The link of the first logical partition leads to its own sector.
    struct.pack_into("<II", data, extended * 512 + 446 + 16 + 8, 0, 2048)
    table = table_of(data)
    assert table is not None
    assert [one.number for one in table.partitions] == [1, 2, 4, 5]
    assert table.problem == "the chain of logical partitions does not end"


def test_a_partition_behind_the_end_of_the_disk_is_said_to_be_so_and_harms_no_other(
    disk: Callable[[str], tuple[bytearray, list[dict[str, int]]]],
) -> None:
    data, _ = disk("dos")
    struct.pack_into("<II", data, 446 + 16 + 8, 1 << 31, 2048)
    image = DiskImage([len(data)], 0, lambda _, offset, length: bytes(data[offset : offset + length]))
    volumes = {volume.name: volume for volume in image.volumes()}
    assert volumes[b"part2"].problem == "it lies behind the end of the disk"
    assert volumes[b"part1"].problem == "there is nothing in it"
    with pytest.raises(DiskFsError, match="behind the end"):
        image.file_system(b"part2")


def test_a_disk_without_a_table_is_one_volume() -> None:
    image = DiskImage([_MIB], 0, lambda _, offset, length: b"\x11" * length)
    assert [(one.name, one.kind) for one in image.volumes()] == [(b"raw", "unknown")]
    with pytest.raises(DiskFsError, match="nothing that is known is in it"):
        image.file_system(b"raw")


@pytest.mark.parametrize("kind", list(_TABLES))
def test_damaged_tables_are_errors_or_tables_and_end(
    kind: str, disk: Callable[[str], tuple[bytearray, list[dict[str, int]]]]
) -> None:
    data, wanted = disk(kind)
    places = [*range(440, 512), *range(512, 2048)]
    places += [one["start"] * 512 + at for one in wanted for at in range(440, 512)]
    draw = random.Random(7)
    for _ in range(150):
        changed = {draw.choice(places): 1 << draw.randrange(8) for _ in range(draw.choice((1, 2, 8)))}

        def fetch(_: int, offset: int, length: int, changed: dict[int, int] = changed) -> bytes:
            found = data[offset : offset + length]
            for place, mask in changed.items():
                if offset <= place < offset + length:
                    found[place - offset] ^= mask
            return bytes(found)

        image = DiskImage([len(data)], 0, fetch)
        try:
            assert len(image.volumes()) <= 300
        except DiskFsError:
            continue


def test_what_looks_like_a_qcow2_with_a_backing_file_is_bytes_like_any_others(tmp_path: Path) -> None:
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 112, 11, 16, 1 << 30, 0, 1, 1 << 16, 1 << 17, 1, 0, 0)
    data = header.ljust(112, b"\0") + b"/etc/passwd"
    image = DiskImage([_MIB], 0, lambda _, offset, length: data.ljust(_MIB, b"\0")[offset : offset + length])
    assert [(one.name, one.size, one.kind) for one in image.volumes()] == [(b"raw", _MIB, "unknown")]
