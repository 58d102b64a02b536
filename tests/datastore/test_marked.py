"""The packed set of marked digests, against a Python set."""

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from datastore.marked import MarkedDigests
from datastore.upid import Upid


def packed(digests: list[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(digests), np.uint64).reshape(len(digests), 4)


def unpacked(data: bytes) -> list[bytes]:
    return [data[at : at + 32] for at in range(0, len(data), 32)]


@pytest.mark.parametrize("prefix", [0, 7, 8, 31])
def test_new_ones_come_out_once_and_in_order(prefix: int) -> None:
    """Digests that share eight bytes and more are made up, but must not be taken for each other."""
    dice = random.Random(prefix)
    pool = [b"p" * prefix + dice.randbytes(32 - prefix) for _ in range(300)]
    marked, model = MarkedDigests(), set[bytes]()
    total = 0
    for _ in range(20):
        for _ in range(dice.randrange(3)):
            some = dice.choices(pool, k=dice.randrange(1, 60))
            marked.add(packed(some), repeated=1)
            total += len(some) + 1
        wanted = set().union(*(unpacked(batch.tobytes()) for batch in marked._added)) - model
        fresh = unpacked(marked.take())
        assert len(fresh) == len(set(fresh))
        assert set(fresh) == wanted
        assert [one[:8] for one in fresh] == sorted(one[:8] for one in fresh)
        model |= wanted
        assert len(marked) == len(model) == marked.taken
    assert all((one in marked) == (one in model) for one in pool)
    assert (marked.total, marked.waiting, marked.complete) == (total, 0, True)
    assert b"short" not in marked
    assert 5 not in marked


def test_beyond_its_limit_it_forgets_and_says_so() -> None:
    marked = MarkedDigests(limit=10)
    dice = random.Random(1)
    first, second = ([dice.randbytes(32) for _ in range(8)] for _ in range(2))
    for some in (first, second, first):
        marked.add(packed(some))
        assert len(unpacked(marked.take())) == 8
    assert not marked.complete
    assert len(marked) == 8


def test_memory_is_32_bytes_a_digest() -> None:
    marked = MarkedDigests()
    marked.add(np.random.default_rng(1).integers(0, 1 << 63, (100_000, 4), dtype=np.uint64))
    marked.take()
    assert sum(part.keys.nbytes + part.rests.nbytes for part in marked._parts) == 32 * 100_000


@pytest.mark.parametrize(
    "text",
    [
        "UPID:vm:00002E34:00014943:00000028:6B00F317:garbage_collection:gold:root@pam:",
        "UPID:a-1:00000001:123456789:0000000000000001:00000000:verify:store\\x3avm-100:user@pbs!token:",
    ],
)
def test_upid_goes_round(text: str) -> None:
    assert Upid.parse(text).node in ("vm", "a-1")
    assert Upid.parse(text).start in (0x6B00F317, 0)


@pytest.mark.parametrize(
    "text", ["", "UPID:", "UPID:vm:1:2:3:4:a:b:c:", "UPID:-:00000001:00000001:00000001:00000001:a:b:c:"]
)
def test_what_is_no_upid_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="form"):
        Upid.parse(text)


def test_new_upid_is_one() -> None:
    one, two = Upid.new("verify", "store:vm/100"), Upid.new("verify", "x")
    assert Upid.parse(str(one)) == one
    assert one.number != two.number
