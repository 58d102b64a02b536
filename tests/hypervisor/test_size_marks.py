"""Marks of sizes: how fine they are, and what they say of the bitmaps beside them."""

from typing import Any

import pytest

from hypervisor.bitmaps import GRANULARITY, BitmapName, disk_id
from hypervisor.block_graph import BlockNode
from hypervisor.errors import QmpAnswerError
from hypervisor.size_marks import CUT, MISSING, granularity, mark_name, unsure

TARGET = "0badcafe"
GIB = 1 << 30


@pytest.mark.parametrize(
    ("size", "bit"),
    [(512, 512), (4 * GIB, 512), (4 * GIB + 512, 1024), (1024 * GIB, 131072), ((1 << 63) - 512, 1 << 31)],
)
def test_a_mark_has_bits_as_fine_as_a_mebibyte_of_memory_allows(size: int, bit: int) -> None:
    assert granularity(size) == bit


def node(*bitmaps: dict[str, Any]) -> BlockNode:
    return BlockNode("fmt0", "raw", False, GIB, None, bitmaps)


def entry(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "count": 512, "granularity": GRANULARITY, "recording": False, "busy": False, **changes}


BITMAP = entry(str(BitmapName(TARGET, disk_id("drive-a.img"), 5)), recording=True)
MARK = entry(mark_name(TARGET), granularity=512)


@pytest.mark.parametrize(
    ("bitmaps", "why"),
    [
        ([], None),
        ([MARK], None),
        ([BITMAP, MARK], None),
        ([BITMAP], MISSING),
        ([BITMAP, entry(mark_name("0badf00d"))], MISSING),
        ([BITMAP, {**MARK, "count": 0}], CUT),
        ([BITMAP, {**MARK, "recording": True}], MISSING),
        ([BITMAP, {**MARK, "count": 0, "inconsistent": True}], MISSING),
    ],
)
def test_bitmaps_are_trusted_beside_a_whole_mark_of_their_target_only(
    bitmaps: list[dict[str, Any]], why: str | None
) -> None:
    assert unsure([node(*bitmaps)], TARGET) == ({} if why is None else {"fmt0": why})


def test_a_mark_that_is_nonsense_is_an_error() -> None:
    with pytest.raises(QmpAnswerError):
        unsure([node(BITMAP, {**MARK, "count": "many"})], TARGET)
