"""Memory of answers' bodies: used again, but never while somebody sees it."""

import pytest
import trio

from datastore.s3.bodies import LARGEST, SMALLEST, BodyMemory
from datastore.s3.client import S3Client
from tests.support.s3_emulator import S3Emulator

SIZE = 1 << 20


def test_memory_is_used_again_once_its_last_view_is_gone() -> None:
    memory = BodyMemory(4)
    first = memory.take(SIZE)
    first[:5] = b"first"
    kept = memoryview(first)[:5]
    del first
    second = memory.take(SIZE)
    second[:5] = b"other"
    assert bytes(kept) == b"first"
    del kept
    third = memory.take(SIZE)
    third[:5] = b"third"
    assert bytes(second[:5]) == b"other"
    assert len(memory._areas) == 2


def test_more_bodies_than_it_keeps_are_served_and_stay_apart() -> None:
    memory = BodyMemory(2)
    bodies = [memory.take(SIZE) for _ in range(5)]
    for number, body in enumerate(bodies):
        body[:] = bytes([number]) * SIZE
    assert [bytes(body[:1]) + bytes(body[-1:]) for body in bodies] == [bytes([number] * 2) for number in range(5)]
    assert len(memory._areas) == 2


@pytest.mark.parametrize("size", [0, 1, SMALLEST - 1, SMALLEST, LARGEST, LARGEST + 1, 4 * LARGEST])
def test_every_size_is_served_exactly(size: int) -> None:
    memory = BodyMemory(1)
    body = memory.take(size)
    assert len(body) == size
    assert len(memory._areas) == (SMALLEST <= size <= LARGEST)


async def test_objects_read_at_once_and_kept_do_not_share_memory(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    content = {f"key-{number}": bytes([number]) * (SIZE + number) for number in range(12)}
    for key, data in content.items():
        s3_emulator.bucket.put(key, data)
    found: dict[str, object] = {}

    async def read(key: str) -> None:
        fetched = await emulated.get(key)
        assert fetched is not None
        found[key] = fetched.data

    for _ in range(2):
        async with trio.open_nursery() as nursery:
            for key in content:
                nursery.start_soon(read, key)
        assert found == content
