"""Digests of bodies, many at once."""

import hashlib
import random

import pytest
import trio

from datastore.s3 import hashing
from datastore.s3.hashing import BodyHasher, content_md5


@pytest.mark.parametrize("lanes", [True, False])
async def test_digests_are_those_of_hashlib_whatever_the_pieces(lanes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_has_lanes", lambda: lanes)
    numbers = random.Random(1)
    hasher = BodyHasher()
    bodies = [numbers.randbytes(numbers.choice([0, 1, 40_000, 300_000])) for _ in range(60)]
    found: dict[int, str] = {}

    async def one(number: int) -> None:
        body, cut = bodies[number], numbers.randrange(len(bodies[number]) + 1)
        found[number] = await hasher.sha256([body[:cut], memoryview(body)[cut:]])

    async with trio.open_nursery() as nursery:
        for number in range(len(bodies)):
            nursery.start_soon(one, number)
    assert [found[number] for number in range(60)] == [hashlib.sha256(body).hexdigest() for body in bodies]


async def test_bodies_that_wait_are_hashed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = hashing._hash_batch

    def watched(bodies: list[list[bytes]]) -> list[str]:
        sizes.append(len(bodies))
        return real(bodies)

    monkeypatch.setattr(hashing, "_hash_batch", watched)
    monkeypatch.setattr(hashing, "cpu_count", lambda: 1)
    monkeypatch.setattr(hashing, "_has_lanes", lambda: True)
    hasher = BodyHasher()
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(hasher.sha256, [bytes([number]) * 100_000])
    assert sum(sizes) == 20
    assert max(sizes) > 1
    assert max(sizes) <= 16


@pytest.mark.parametrize("seed", range(10))
async def test_cancelled_bodies_do_not_hold_up_others(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_has_lanes", lambda: seed % 2 == 0)
    numbers = random.Random(seed)
    hasher = BodyHasher()
    done: list[int] = []

    async def one(number: int, cancelled: bool) -> None:
        body = bytes([number]) * 200_000
        with trio.move_on_after(numbers.random() * 0.002 if cancelled else 60):
            assert await hasher.sha256([body]) == hashlib.sha256(body).hexdigest()
            done.append(number)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(one, number, number % 2 == 0)
    assert {number for number in range(40) if number % 2} <= set(done)


@pytest.mark.parametrize("size", [0, 6, 100_000])
async def test_md5_is_base64(size: int) -> None:
    import base64

    body = b"f" * size
    expected = base64.b64encode(hashlib.md5(body).digest()).decode()
    assert await content_md5([body[:3], body[3:]]) == expected
