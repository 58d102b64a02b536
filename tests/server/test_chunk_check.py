"""Uploaded chunks are checked in batches, whoever does it."""

import hashlib
import threading
from collections.abc import Callable

import pytest
import trio

from core.errors import FleeceError
from core.limits import in_cpu_thread
from datastore.blob import Blob
from datastore.codec import ChunkCodec
from server import chunk_check
from server.chunk_check import ChunkChecker, _Item
from tests.support.waiting import PATIENCE_S, until


def chunk(number: int) -> tuple[Blob, bytes, int]:
    plain = b"%d" % number * 100
    return ChunkCodec().encode(plain), hashlib.sha256(plain).digest(), len(plain)


class Gates:
    """Batches wait in their thread until they are let through."""

    def __init__(self, checker: ChunkChecker) -> None:
        self.batches: list[tuple[int, threading.Event]] = []
        self._run: Callable[[list[_Item]], None] = checker._run
        checker._run = self  # type: ignore[method-assign]

    def __call__(self, batch: list[_Item]) -> None:
        gate = threading.Event()
        self.batches.append((len(batch), gate))
        assert gate.wait(PATIENCE_S)
        self._run(batch)

    async def begun(self, count: int) -> None:
        await until(lambda: len(self.batches) >= count)


@pytest.fixture
def checker(monkeypatch: pytest.MonkeyPatch) -> ChunkChecker:
    monkeypatch.setattr(chunk_check, "cpu_count", lambda: 2)
    return ChunkChecker()


async def settle() -> None:
    for _ in range(5):
        await trio.sleep(0.005)


async def test_a_chunk_in_another_batch_is_waited_for(checker: ChunkChecker) -> None:
    gates = Gates(checker)
    done: list[int] = []

    async def check(number: int) -> None:
        blob, digest, size = chunk(number)
        await checker.check(blob, digest, size)
        done.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(2):
            nursery.start_soon(check, number)
            await gates.begun(number + 1)
        for number in range(2, 5):
            nursery.start_soon(check, number)
        await settle()
        # One worker takes all three; the other comes free while their batch is on its way.
        gates.batches[0][1].set()
        await gates.begun(3)
        gates.batches[1][1].set()
        await until(lambda: len(done) >= 2)
        await settle()
        assert sorted(done) == [0, 1]
        assert [size for size, _ in gates.batches] == [1, 1, 3]
        gates.batches[2][1].set()
    assert sorted(done) == [0, 1, 2, 3, 4]


async def test_what_a_cancelled_one_took_is_done_by_others(
    checker: ChunkChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    real = in_cpu_thread
    first = True

    async def slow(work: Callable[..., None], *arguments: object) -> None:
        nonlocal first
        if first:
            first = False
            await trio.sleep_forever()
        await real(work, *arguments)

    async def check(number: int, scope: trio.CancelScope) -> None:
        blob, digest, size = chunk(number)
        with scope:
            await checker.check(blob, digest, size)
            done.append(number)

    monkeypatch.setattr(chunk_check, "in_cpu_thread", slow)
    workers = trio.Semaphore(1)
    monkeypatch.setattr(checker, "_workers", workers)
    scopes = [trio.CancelScope() for _ in range(4)]
    with trio.fail_after(PATIENCE_S):
        await workers.acquire()
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(check, number, scopes[number])
                await settle()
            workers.release()
            await settle()
            # The first has all of them in its batch.
            assert not checker._waiting
            scopes[0].cancel()
    assert sorted(done) == [1, 2, 3]
    assert not checker._waiting


async def test_wrong_ones_of_a_batch_do_not_harm_the_others(checker: ChunkChecker) -> None:
    outcomes: dict[int, str] = {}

    async def check(number: int) -> None:
        blob, digest, size = chunk(number)
        if number % 3 == 0:
            digest = bytes(32)
        try:
            outcomes[number] = "ok" if (await checker.check(blob, digest, size)).payload == blob.payload else "other"
        except FleeceError:
            outcomes[number] = "refused"

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(check, number)
    assert outcomes == {number: "refused" if number % 3 == 0 else "ok" for number in range(50)}


async def test_beside_others_a_chunk_waits_for_company(checker: ChunkChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_check, "LINGER_S", 10 * PATIENCE_S)
    gates = Gates(checker)
    async with trio.open_nursery() as nursery:
        for number in range(2):
            nursery.start_soon(checker.check, *chunk(number))
            if not number:
                await gates.begun(1)
        await settle()
        assert len(gates.batches) == 1
        nursery.start_soon(checker.check, *chunk(2))
        await gates.begun(2)
        assert [size for size, _ in gates.batches] == [1, 2]
        for _, gate in gates.batches:
            gate.set()


async def test_company_that_does_not_come_is_waited_for_briefly(checker: ChunkChecker) -> None:
    gates = Gates(checker)
    async with trio.open_nursery() as nursery:
        for number in range(2):
            nursery.start_soon(checker.check, *chunk(number))
            await gates.begun(number + 1)
        for _, gate in gates.batches:
            gate.set()


async def test_who_sends_one_after_the_other_waits_for_nobody(
    checker: ChunkChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_check, "LINGER_S", 10 * PATIENCE_S)
    for number in range(3):
        with trio.fail_after(PATIENCE_S):
            await checker.check(*chunk(number))


async def test_a_chunk_that_waits_for_company_can_be_cancelled(
    checker: ChunkChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_check, "LINGER_S", 10 * PATIENCE_S)
    gates = Gates(checker)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(checker.check, *chunk(0))
        await gates.begun(1)
        with trio.move_on_after(0.01) as scope:
            await checker.check(*chunk(1))
        assert scope.cancelled_caught
        gates.batches[0][1].set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(checker.check, *chunk(1))
        await gates.begun(2)
        gates.batches[1][1].set()
    assert [size for size, _ in gates.batches] == [1, 1]
