import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import FleeceError
from datastore import digests as module
from datastore.digests import DigestSet
from datastore.dynamic_index import DynamicIndex, DynamicIndexWriter
from datastore.fixed_index import FixedIndex, FixedIndexWriter


def name(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "big")).digest()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge into the packed arrays after a few entries already."""
    monkeypatch.setattr(module, "_PENDING", 8)


def test_an_empty_set_holds_nothing() -> None:
    known = DigestSet()
    assert (len(known), name(1) in known, known.size_of(name(1))) == (0, False, None)
    known.add_packed(b"", 5)
    assert len(known) == 0


@pytest.mark.usefixtures("small_steps")
def test_single_additions_are_found_before_and_after_they_are_packed() -> None:
    known = DigestSet()
    for number in range(100):
        assert name(number) not in known
        known.add(name(number), number + 1)
        assert [known.size_of(name(other)) for other in range(number + 1)] == list(range(1, number + 2))
    assert len(known) == 100
    assert name(100) not in known


@pytest.mark.usefixtures("small_steps")
def test_bulk_takes_one_size_for_all_or_one_each() -> None:
    known = DigestSet()
    known.add_packed(b"".join(name(number) for number in range(1000)), 4 << 20)
    known.add_packed(memoryview(b"".join(name(number) for number in range(1000, 2000))), list(range(1000)))
    assert len(known) == 2000
    assert known.size_of(name(999)) == 4 << 20
    assert [known.size_of(name(number)) for number in range(1000, 2000)] == list(range(1000))


@pytest.mark.usefixtures("small_steps")
def test_a_digest_counts_once_and_keeps_its_first_size() -> None:
    known = DigestSet()
    known.add(name(0), 7)
    known.add_packed(name(0) * 50 + name(1) * 50 + name(0), 9)
    known.add(name(1), 11)
    known.add_packed(name(1) * 3 + name(2), 13)
    assert len(known) == 3
    assert [known.size_of(name(number)) for number in range(3)] == [7, 9, 13]


@pytest.mark.usefixtures("small_steps")
def test_made_up_digests_with_one_prefix_are_told_apart() -> None:
    rng = random.Random(5)
    prefixes = [rng.randbytes(8) for _ in range(3)]
    made_up = [prefixes[number % 3] + rng.randbytes(24) for number in range(600)]
    known = DigestSet()
    known.add_packed(b"".join(made_up[:400]), list(range(400)))
    for number in range(400, 600):
        known.add(made_up[number], number)
    assert [known.size_of(digest) for digest in made_up] == list(range(600))
    for digest in made_up[:30]:
        assert digest[:31] + bytes([digest[31] ^ 1]) not in known
    assert len(known) == 600


def test_digests_of_zeros_and_ones_are_like_any_other(small_steps: None) -> None:
    edges = [bytes(32), b"\xff" * 32, bytes(31) + b"\1", b"\x80" + bytes(31), b"\x7f" + b"\xff" * 31]
    known = DigestSet()
    known.add_packed(b"".join(edges) * 4, 3)
    assert len(known) == 5
    assert all(digest in known for digest in edges)
    assert bytes(30) + b"\1\0" not in known


@pytest.mark.parametrize("digest", [b"", bytes(31), bytes(33)])
def test_what_is_no_digest_is_refused_and_never_in_the_set(digest: bytes) -> None:
    known = DigestSet()
    known.add(name(1), 1)
    with pytest.raises(FleeceError):
        known.add(digest, 1)
    assert digest not in known
    assert "text" not in known
    with pytest.raises(FleeceError, match="lengths do not fit"):
        known.add_packed(bytes(33), 1)
    with pytest.raises(FleeceError, match="lengths do not fit"):
        known.add_packed(bytes(64), [1])


@pytest.mark.parametrize("size", [-1, 1 << 32])
def test_what_is_no_size_is_refused(size: int) -> None:
    with pytest.raises(FleeceError, match="is no size"):
        DigestSet().add(name(1), size)
    with pytest.raises(FleeceError, match="no size"):
        DigestSet().add_packed(name(1) * 20_000, size)


def test_indexes_are_added_with_the_length_of_each_chunk(tmp_path: Path) -> None:
    with FixedIndexWriter(tmp_path / "f", 3 * 4096 + 10, 4096) as fixed:
        fixed.set_many((number, name(number)) for number in range(4))
        fixed.close()
    with DynamicIndexWriter(tmp_path / "d") as dynamic:
        for number in range(4, 8):
            dynamic.append(dynamic.size, number, name(number))
        dynamic.close()
    known = DigestSet()
    known.add_index(FixedIndex.open(tmp_path / "f"))
    known.add_index(DynamicIndex.open(tmp_path / "d"))
    assert [known.size_of(name(number)) for number in range(9)] == [4096, 4096, 4096, 10, 4, 5, 6, 7, None]


def test_an_index_of_one_chunk_is_added(tmp_path: Path) -> None:
    with FixedIndexWriter(tmp_path / "f", 10, 4096) as writer:
        writer.set(0, name(0))
        writer.close()
    known = DigestSet()
    known.add_index(FixedIndex.open(tmp_path / "f"))
    assert (len(known), known.size_of(name(0))) == (1, 10)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 40), st.integers(0, 1 << 24)),
            st.lists(st.tuples(st.integers(0, 40), st.integers(0, 1 << 24)), max_size=30),
        ),
        max_size=30,
    )
)
def test_it_behaves_like_a_dict_that_keeps_the_first_value(
    steps: list[tuple[int, int] | list[tuple[int, int]]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PENDING", 8)
        known, model = DigestSet(), dict[bytes, int]()
        for step in steps:
            if isinstance(step, tuple):
                known.add(name(step[0]), step[1])
                model.setdefault(name(step[0]), step[1])
            else:
                known.add_packed(b"".join(name(number) for number, _ in step), [size for _, size in step])
                for number, size in step:
                    model.setdefault(name(number), size)
            assert len(known) == len(model)
        assert {name(number): known.size_of(name(number)) for number in range(41)} == {
            name(number): model.get(name(number)) for number in range(41)
        }


def test_a_million_digests_load_quickly_and_take_36_bytes_each() -> None:
    import numpy as np

    count = 1_000_000
    packed = np.random.default_rng(1).integers(0, 256, (count, 32), np.uint8)
    start = time.thread_time()
    known = DigestSet()
    known.add_packed(packed.data.cast("B"), 4 << 20)
    assert time.thread_time() - start < 5
    assert len(known) == count
    arrays = [known._keys, known._rests, known._sizes]
    assert sum(array.nbytes for array in arrays if array is not None) == 36 * count
    assert all(array is None or array.base is None for array in arrays), "a view would keep the larger array alive"
    start = time.thread_time()
    for number in range(0, count, 97):
        assert packed[number].tobytes() in known
    for number in range(70_000):  # more than one merge
        known.add(name(number), 1)
    assert time.thread_time() - start < 5
    assert len(known) == count + 70_000


def test_a_small_set_does_not_import_numpy() -> None:
    code = (
        "import sys\n"
        "from datastore.digests import DigestSet\n"
        "known = DigestSet()\n"
        "known.add(bytes(32), 1)\n"
        "known.add_packed(bytes(range(32)) * 100, 5)\n"
        "assert len(known) == 2 and bytes(range(32)) in known\n"
        "assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digests_come_in_ascending_order_with_their_sizes() -> None:
    import os

    few = {os.urandom(32): number for number in range(100)}
    many = {os.urandom(32): number for number in range(40_000)}
    made_up = {bytes(8) + os.urandom(24): number for number in range(50)}
    for wanted in (few, {**many, **made_up}, {}):
        found = DigestSet()
        for digest, size in wanted.items():
            found.add(digest, size)
        assert list(found.ascending()) == sorted(wanted.items())
