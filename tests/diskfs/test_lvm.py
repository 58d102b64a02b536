"""Volume groups that LVM made, and descriptions of them that nobody made."""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diskfs.blocks import Blocks, Disk, Slice
from diskfs.errors import DiskFsError
from diskfs.image import DiskImage
from diskfs.lvm import PhysicalVolume, VolumeGroup, parse
from tests.diskfs.reading import Files, walk
from tests.support.cache import Unavailable
from tests.support.disk_images import MadeImage
from tests.support.volume_groups import made_group

_MIB = 1 << 20


@pytest.fixture
def group() -> tuple[list[Path], list[dict[str, str]]]:
    """The physical volumes, and the segments as LVM lists them."""
    try:
        return made_group()
    except Unavailable as reason:  # not root, or neither packages nor a network to get them by
        pytest.skip(f"no volume group to test with: {reason}")


def test_logical_volumes_lie_where_lvm_says(
    group: tuple[list[Path], list[dict[str, str]]], files: Callable[..., Files]
) -> None:
    paths, segments = group
    image = files(*paths).image()
    assert [(one.name, one.kind) for one in image.volumes()] == [
        (b"raw", "LVM2 member"), (b"guest/root", "empty"), (b"guest/stripe", "empty"), (b"guest/span", "empty"),
    ]  # fmt: skip
    assert image.volumes()[0].problem == "it is a part of the volume group guest"
    parts = image._found()
    extents = {0: 1 * _MIB, 1: 1 * _MIB}  # LVM puts the first extent 1 MiB from the beginning
    offsets: dict[str, int] = {}
    for segment in segments:  # in the order in which they follow each other
        name = segment["lv_name"]
        blocks = parts[f"guest/{name}".encode()].blocks
        ranges = [re.fullmatch(r"(\d):(\d+)-(\d+)", one) for one in segment["seg_le_ranges"].split(",")]
        places = [(int(one[1]), int(one[2]), int(one[3]) - int(one[2]) + 1) for one in ranges if one]
        assert len(places) == len(ranges)
        start = offsets.get(name, 0)
        if len(places) == 1:
            (disk, first, count) = places[0]
            runs = list(blocks.places(start, count * _MIB, 0))
            assert [(run.disk, run.position, run.length) for run in runs] == [
                (disk, extents[disk] + first * _MIB, count * _MIB)
            ]
        else:
            for row in (0, 1, 2, 700):
                for column, (disk, first, _) in enumerate(places):
                    (run,) = blocks.places((row * 2 + column) * 65536, 65536, 0)
                    assert (run.disk, run.position) == (disk, extents[disk] + first * _MIB + row * 65536)
        offsets[name] = start + sum(count for _, _, count in places) * _MIB
    assert sorted(offsets) == ["root", "span", "stripe"]
    assert all(parts[f"guest/{name}".encode()].volume.size == size for name, size in offsets.items())


def test_a_file_system_in_a_volume_over_two_disks_is_read_from_either(
    group: tuple[list[Path], list[dict[str, str]]],
    made: Callable[[str], MadeImage],
    files: Callable[..., Files],
) -> None:
    paths, _ = group
    ext4 = made("ext4")
    data = ext4.path.read_bytes()
    plain = files(*paths)
    stripe = plain.image()._found()[b"guest/stripe"].blocks
    changed: list[dict[int, bytes]] = [{}, {}]  # by block of 64 KiB
    for run in stripe.places(0, len(data), 0):
        assert run.position % 65536 == 0
        changed[run.disk][run.position // 65536] = data[run.offset : run.offset + run.length]

    def fetch(disk: int, offset: int, length: int) -> bytes:
        block = changed[disk].get(offset // 65536)
        return plain.fetch(disk, offset, length) if block is None else block[offset % 65536 :][:length]

    for number in (0, 1):
        image = DiskImage(plain.sizes, number, fetch)
        assert {one.name: one.kind for one in image.volumes()}[b"guest/stripe"] == "ext4"
        found = dict(walk(image.file_system(b"guest/stripe")))
        assert sorted(found) == sorted(ext4.entries)


def test_a_group_without_one_of_its_disks_says_which_is_missing(
    group: tuple[list[Path], list[dict[str, str]]], files: Callable[..., Files]
) -> None:
    paths, _ = group
    problems = {one.name: one.problem for one in files(paths[0]).image().volumes()}
    assert problems[b"guest/root"] == "there is nothing in it"
    assert re.fullmatch(r"the physical volume [\w-]+ is not in the snapshot", problems[b"guest/span"])


_PV = Slice(Disk(0, 64 * _MIB, lambda _, offset, length: bytes(length)), 0, 64 * _MIB)


def volumes_of(volumes: str, pv: Blocks = _PV) -> dict[str, Any]:
    text = f"""guest {{ id = "G" seqno = 3 status = ["RESIZEABLE"] extent_size = 2048
        physical_volumes {{ pv0 {{ id = "A-B" pe_start = 2048 pe_count = 60 }} }}
        logical_volumes {{ {volumes} }} }}"""
    found = parse(text)["guest"]
    return dict(VolumeGroup([PhysicalVolume("AB", pv, found, "guest")]).volumes())


def lv(name: str, segment: str) -> str:
    return f'{name} {{ status = ["READ", "VISIBLE"] segment1 {{ start_extent = 0 extent_count = 4 {segment} }} }}'


@pytest.mark.parametrize(
    ("volumes", "why"),
    [
        (lv("a", 'type = "striped" stripe_count = 1 stripes = ["a", 0]'), "the volume is made of itself"),
        (
            lv("a", 'type = "mirror" mirrors = ["b", 0]') + lv("b", 'type = "raid1" raids = ["x", "a"]'),
            "the volume is made of itself",
        ),
        (lv("a", 'type = "striped" stripes = ["pv0", 100]'), "a part of it lies behind the end of its disk"),
        (lv("a", 'type = "thin" thin_pool = "p"'), "volumes of type thin are not read"),
        (lv("a", 'type = "striped" stripes = ["pv9", 0]'), "the group has no such volume"),
        (
            lv("a", 'type = "striped" stripes = ["pv0", 0, "pv0", 8] stripe_size = 0'),
            "it is damaged: a size of stripes",
        ),
        (lv("a", 'type = "striped" stripes = []'), "it is damaged: stripes that do not fit a segment"),
        (
            lv("a", 'type = "striped" stripes = ["pv0", 0]').replace("start_extent = 0", "start_extent = 5"),
            "a part begins at",
        ),
    ],
)
def test_volumes_that_cannot_be_are_said_to_be_so_and_harm_no_other(volumes: str, why: str) -> None:
    found = volumes_of(volumes + lv("good", 'type = "striped" stripes = ["pv0", 0]'))
    assert isinstance(found["good"], Slice)
    assert isinstance(found["a"], DiskFsError)
    assert why in found["a"].why


def test_a_volume_that_a_snapshot_is_merged_into_is_not_read() -> None:
    origin = lv("origin", 'type = "striped" stripes = ["pv0", 0]')
    store = lv("new", 'type = "striped" stripes = ["pv0", 8]')
    hidden = 'snapshot0 { status = ["READ"] segment1 { type = "snapshot" start_extent = 0 extent_count = 4 '
    found = volumes_of(f'{origin} {store} {hidden} origin = "origin" cow_store = "new" }} }}')
    assert isinstance(found["origin"], Slice)
    found = volumes_of(f'{origin} {store} {hidden} origin = "origin" merging_store = "new" }} }}')
    assert "a snapshot is being merged into it" in found["origin"].why
    assert "it is a snapshot volume" in found["new"].why


def test_groups_of_the_same_name_hide_nothing_of_each_other() -> None:
    """As on a disk onto which a system was copied, or that came from another machine."""
    text = """guest {{ id = "{}" seqno = 3 extent_size = 2048
        physical_volumes {{ pv0 {{ id = "A-B" pe_start = 2048 pe_count = 60 }} }} logical_volumes {{ {} }} }}"""
    image = DiskImage([64 * _MIB], 0, lambda _, offset, length: bytes(length))
    found: dict[bytes, Any] = {}
    for id in ("G", "H"):
        description = parse(text.format(id, lv("root", 'type = "striped" stripes = ["pv0", 0]')))["guest"]
        image._add_group(VolumeGroup([PhysicalVolume("AB", _PV, description, "guest")]), found)
    assert sorted(found) == [b"guest/root", b"guest~/root"]


@pytest.mark.parametrize(
    ("supers", "wanted"),
    [
        ([(5, 0, -1), (5, 0, -1)], 0),
        ([(5, 0, -1), (9, 0b01, -1)], 1),  # the first one had failed, and does not know it
        ([(9, 0b10, -1), (5, 0, -1)], 0),
        ([(9, 0, 4096), (9, 0, -1)], 1),  # the first one is being filled
        ([None, (5, 0, -1)], 1),
        ([None, None], 0),
        ([(9, 0b11, -1), (9, 0b11, -1)], None),
    ],
)
def test_of_a_raid_1_a_copy_is_read_that_is_up_to_date(
    supers: list[tuple[int, int, int] | None], wanted: int | None
) -> None:
    data = bytearray(64 * _MIB)
    for number, one in enumerate(supers):
        if one is not None:
            events, failed, filled = one
            struct.pack_into("<4s12xQQq", data, (1 + 20 + number) * _MIB, b"DmRd", events, failed, filled)
    pv = Slice(Disk(0, len(data), lambda _, offset, length: bytes(data[offset : offset + length])), 0, len(data))
    parts = "".join(lv(name, f'type = "striped" stripes = ["pv0", {at}]') for name, at in (("m0", 20), ("m1", 21)))
    parts += "".join(lv(name, f'type = "striped" stripes = ["pv0", {at}]') for name, at in (("i0", 30), ("i1", 40)))
    found = volumes_of(parts + lv("a", 'type = "raid1" raids = ["m0", "i0", "m1", "i1"]'), pv)["a"]
    if wanted is None:
        assert "no copy of it is there that is up to date" in found.why
    else:
        (run,) = found.places(0, 512, 0)
        assert run.position == (1 + (30, 40)[wanted]) * _MIB


@pytest.mark.parametrize(
    "text",
    ["a {", "}", "a = ", "a = [1, 2", "{ }", "a = { }", 'a = "', "a { " * 40, "a b", "= 3", "a = [[1]]", "\x00"],
)
def test_a_text_that_lvm_does_not_write_is_refused(text: str) -> None:
    with pytest.raises(DiskFsError, match="it is damaged"):
        parse(text)


def test_damage_to_the_description_of_a_group_is_found_by_its_checksum(
    group: tuple[list[Path], list[dict[str, str]]], files: Callable[..., Files]
) -> None:
    source = files(group[0][0])
    head = bytearray(source.fetch(0, 0, 1 << 20))
    text = head.rindex(b"guest {")  # the newest of several
    for place in (512 + 30, 512 + 60, 4096 + 8, 4096 + 50, text):
        damaged = bytearray(head)
        damaged[place] ^= 4

        def fetch(disk: int, offset: int, length: int, damaged: bytearray = damaged) -> bytes:
            end = offset + length
            return bytes(damaged[offset:end]) if end <= len(damaged) else source.fetch(disk, offset, length)

        (volume,) = DiskImage(source.sizes, 0, fetch).volumes()
        assert volume.kind == "LVM2 member"
        assert "damaged" in volume.problem
