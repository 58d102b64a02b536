"""The inner loops of change detection: both forms do the same, and stop where the caller must decide."""

import random
from typing import Any

import pytest

from pxar.encoder import ArchiveEncoder
from pxar.goodbye import hash_name
from pxar.metadata import Metadata, Stat, encode_metadata
from pxar.runs import compare_in_python, encode_in_python

_runs = pytest.importorskip("pxar._runs", reason="no compiler where it was installed")

META = encode_metadata(Metadata(Stat(0o100644, 0, 1, 2, 3, 4)))
NAMES = [
    b"a",
    b"b" * 255,
    b"c" * 256,
    b"d\xff",
    b".e",
    b"..",
    b"",
    b"f/g",
    b"h\0",
    b"i",
    b"j" * 4096,
    b"k" * 4097,
    b"l",
]


def entries(choose: random.Random) -> list[Any]:
    made: list[Any] = []
    place = 0
    for name in choose.choices(NAMES, [9, 3, 3, 3, 1, 1, 1, 1, 1, 9, 1, 1, 9], k=12):
        size = choose.choice([0, 1, 5000, 1 << 40])
        meta = choose.choice([META] * 9 + [META[:20], META * 3])
        key = choose.choice([None] * 15 + [(1, 2)])
        made.append((name, meta, size, place, key))
        place += 16 + size + choose.choice([0] * 9 + [3, -15])
    return made


@pytest.mark.parametrize("seed", range(300))
def test_both_forms_encode_the_same(seed: int) -> None:
    choose = random.Random(seed)
    made = entries(choose)
    for first in range(len(made) + 1):
        base = choose.choice([16, 100, (1 << 63) - 20])
        wanted = encode_in_python(made, first, base, 1000, 16)
        assert _runs.encode(made, first, base, 1000, 16) == wanted


def test_a_run_of_references_makes_the_archive_that_one_by_one_makes() -> None:
    class Sink:
        def __init__(self) -> None:
            self.data = b""

        @property
        def position(self) -> int:
            return len(self.data)

        def write(self, data: Any) -> None:
            self.data += bytes(data)

        def reserve(self, size: int) -> memoryview:
            return memoryview(bytearray(size))

        def commit(self, size: int) -> None:
            self.data += bytes(size)

        def suggest(self) -> None:
            raise AssertionError

        def inject(self, chunks: object) -> None:
            raise AssertionError

    made = [(b"%04d" % number, META, number, 10_000 * number, None) for number in range(3000)]
    archives = []
    for together in (False, True):
        archive, payload = Sink(), Sink()
        encoder = ArchiveEncoder(archive, payload)
        encoder.begin(META)
        index = 0
        while together and index < len(made):
            index += (taken := encoder.references(made, index, 16))
            assert taken
        for name, meta, size, place, _ in made[index:]:
            encoder.reference(name, meta, 16 + place, size)
        payload.data = bytes(40_000_000)
        encoder.finish()
        archives.append(archive.data)
    assert archives[0] == archives[1]


def old_folder(choose: random.Random, made: list[Any]) -> tuple[bytes, list[int]]:
    """Entries as an archive has them, some of them with other bytes."""
    data, positions = b"", []
    for entry in made:
        name, meta, size, place, _ = entry
        positions.append(len(data))
        item = bytearray(encode_in_python([(name, meta, size, place, None)], 0, 16, 0, 0)[1])
        if choose.random() < 0.1:
            item[choose.randrange(len(item))] ^= 1 << choose.randrange(8)
        data += item
    return data, positions


@pytest.mark.parametrize("seed", range(300))
def test_both_forms_compare_the_same(seed: int) -> None:
    choose = random.Random(seed)
    made = [entry for entry in entries(choose) if encode_in_python([entry], 0, 16, 0, 0)[0]]
    data, positions = old_folder(choose, made)
    names = [entry[0] for entry in made]
    scanned: list[Any] = []
    for entry in made:
        found = [0o100644, entry[1], entry[2], 1, 2, 1, 0, None, 0]
        if choose.random() < 0.05:
            found[choose.choice([0, 2, 5, 8])] = choose.choice([0, 2, 7])
        scanned.append(choose.choice([5]) if choose.random() < 0.03 else tuple(found))
    cut = choose.choice([len(data)] * 3 + [choose.randrange(len(data) + 1)])
    base = choose.choice([0, 0, 70])
    for index in range(len(made) + 1):
        for start, end in ((16, 16 + made[index][3] if index < len(made) else 0), (-1, -1)):
            results = []
            for form in (compare_in_python, _runs.compare):
                cache: list[Any] = []
                positions_now = [position + base for position in positions]
                answer = form(names, scanned, index, positions_now, index, data[:cut], base, cache, start, end)
                results.append((answer, cache))
            assert results[0] == results[1]


def test_hashes_of_names_are_those_of_the_table() -> None:
    for length in range(1, 70):
        name = bytes(range(60, 60 + length))
        _, _, row, _ = _runs.encode([(name, META, 0, 0, None)], 0, 16, 0, 0)
        assert int.from_bytes(row[:8], "little") == hash_name(name)
