import struct
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxar.goodbye import ROW, ROW_SIZE, build_table, find, hash_name, permutation, siphash24

#: Array slot -> index in hash order, for 1 to 10 children: docs/formats.md, "File archives".
PERMUTATIONS = [
    [0],
    [1, 0],
    [1, 0, 2],
    [2, 1, 3, 0],
    [3, 1, 4, 0, 2],
    [3, 1, 5, 0, 2, 4],
    [3, 1, 5, 0, 2, 4, 6],
    [4, 2, 6, 1, 3, 5, 7, 0],
    [5, 3, 7, 1, 4, 6, 8, 0, 2],
    [6, 3, 8, 1, 5, 7, 9, 0, 2, 4],
]


def placed(count: int) -> list[int]:
    """The tree by the rule that the format gives, subtree by subtree."""
    slots = [-1] * count

    def place(first: int, size: int, slot: int, level: int) -> None:
        deepest = 1 << level
        full = deepest + deepest // 2 - 1
        left = deepest - 1 if size > full else deepest - 1 - (full - size)
        slots[slot] = first + left
        if left > 0:
            place(first, left, 2 * slot + 1, level - 1)
        if left + 1 < size:
            place(first + left + 1, size - left - 1, 2 * slot + 2, level - 1)

    if count:
        place(0, count, 0, count.bit_length() - 1)
    return slots


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"", 0x76614015F8D1BB6C),
        (b"a", 0x0C26E9067C2C7BCF),
        (b"etc", 0xD0C229EDBD411E9A),
        (b"file_0", 0xA72D4EEC8843FA66),
    ],
)
def test_hashes_of_known_names(name: bytes, value: int) -> None:
    assert hash_name(name) == siphash24(name) == value


@given(st.binary(max_size=600))
def test_both_forms_of_the_hash_agree(name: bytes) -> None:
    assert hash_name(name) == siphash24(name)


@pytest.mark.parametrize("expected", PERMUTATIONS)
def test_small_permutations(expected: list[int]) -> None:
    assert list(permutation(len(expected))) == expected


def test_permutations_follow_the_rule_and_every_element_is_found() -> None:
    for count in range(1001):
        order = list(permutation(count))
        assert order == placed(count)
        rows = b"".join(ROW.pack(10 * rank, rank, 0) for rank in order)
        for rank in range(count):
            (slot,) = find(rows, 10 * rank)
            assert order[slot] == rank
            assert find(rows, 10 * rank + 1) == []


def test_all_rows_of_equal_hashes_are_found() -> None:
    random = Random(7)
    for count in range(1, 120):
        values = sorted(random.choices(range(count // 4 + 1), k=count))
        rows = b"".join(ROW.pack(values[rank], rank, 0) for rank in permutation(count))
        for value in set(values):
            slots = find(rows, value)
            assert len(slots) == len(set(slots)) == values.count(value)
            assert {struct.unpack_from("<Q", rows, slot * ROW_SIZE)[0] for slot in slots} == {value}


def test_a_table_counts_back_from_where_it_stands() -> None:
    records = ROW.pack(5, 100, 50) + ROW.pack(3, 150, 10)
    assert build_table(records, 160, 40) == bytes.fromhex("1d73d542a64fec2f") + struct.pack(
        "<QQQQQQQQQQ", 88, 5, 60, 50, 3, 10, 10, 0xEF5EED5B753E1555, 120, 88
    )


def test_an_empty_directory_has_the_tail_only() -> None:
    assert len(build_table(b"", 100, 0)) == 40
