"""What a source that lies can make a sync hold."""

import os
from typing import Any

import pytest

from datastore.names import CLIENT_LOG_NAME, Group
from repository.remote.http2 import Http2Client
from repository.sync.transfer import MAX_BATCHES
from tests.repository.sync.conftest import Pair
from tests.support.pbs_double import PbsDouble
from tests.support.pbs_store import make_blob
from tests.support.remote import remote
from tests.support.snapshots import CHUNK, write_snapshot
from tests.support.syncs import Faults, Faulty, Said, pull, times

MIB = 1 << 20


class Held:
    """Bytes of answers that are held at a time, over all connections."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._held: dict[int, tuple[Any, int]] = {}
        self.most = 0
        take = Http2Client._take_body

        def watched(client: Http2Client, number: int, exchange: Any, data: Any) -> None:
            take(client, number, exchange, data)
            # The exchange is kept, so that no other one gets its id.
            self._held[id(exchange)] = exchange, sum(map(len, exchange.body))
            self.most = max(self.most, sum(size for _, size in self._held.values()))

        monkeypatch.setattr(Http2Client, "_take_body", watched)


async def test_no_more_of_a_blob_is_held_than_the_manifest_lists(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    double = PbsDouble()
    groups = [f"host/g{number:02}" for number in range(2 * MAX_BATCHES)]
    async with remote(double) as source:
        for group in groups:
            await write_snapshot(source, group, 1000, {"x.blob": b"x"})
        for folder in double.folders.values():
            folder.files["x.blob"] += bytes(MIB // 4)
        held = Held(monkeypatch)
        report = await pull(source, pair.target, parallel=len(groups))
    assert sorted(report.failed) == groups
    assert {why.partition(": ")[2] for why in report.failed.values()} == {"the answer has more than 13 bytes"}
    # Of 5 MiB; manifests and small files are all of it.
    assert held.most < MIB // 8
    assert await pair.target.snapshots() == []


async def test_a_log_that_is_too_long_is_left_out_and_not_held(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repository.sync.transfer.MAX_ENCODED_CHUNK", MIB)
    double, said = PbsDouble(), Said()
    async with remote(double) as source:
        await write_snapshot(source, "host/one", 1000, {"x.blob": b"x"})
        double.folders["", "host", "one", 1000].files[CLIENT_LOG_NAME] = make_blob(bytes(2 * MIB))
        held = Held(monkeypatch)
        report = await pull(source, pair.target, said)
    assert (report.failed, await times(pair.target, "host/one")) == ({}, [1000])
    assert any("client log" in line and "left out" in line for line in said.warnings)
    assert held.most <= MIB + MIB // 8


async def test_no_more_of_a_chunk_is_held_than_its_index_lists(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    double = PbsDouble()
    groups = [f"host/g{number:02}" for number in range(MAX_BATCHES)]
    async with remote(double) as source:
        for group in groups:
            await write_snapshot(source, group, 1000, {"x.img.fidx": group.encode()}, chunk_size=4 << 20)
        double.lie = lambda name, parameters, body: body + bytes(MIB) if name == "chunk" else body
        held = Held(monkeypatch)
        report = await pull(source, pair.target, parallel=len(groups))
    assert sorted(report.failed) == groups
    assert all("the answer has more than" in why for why in report.failed.values())
    assert held.most < MIB // 2
    assert await pair.target.snapshots() == []


async def test_chunks_of_the_largest_size_come_one_by_one(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repository.sync.transfer._BATCH_BYTES", 3 * CHUNK)
    sizes: list[int] = []

    async def watched(inner: Any, digests: Any) -> Any:
        blobs = await inner.read_chunks(digests)
        sizes.append(sum(len(blob.payload) for blob in blobs))
        return blobs

    await write_snapshot(pair.source, "host/one", 1000, {"x.img.fidx": os.urandom(24 * CHUNK)}, chunk_size=2 * CHUNK)
    await write_snapshot(pair.source, "host/two", 1000, {"x.img.fidx": os.urandom(24 * CHUNK)}, chunk_size=CHUNK)
    report = await pull(Faulty(pair.source, Faults(), {"reader.read_chunks": watched}), pair.target)
    assert not report.failed
    assert sorted(sizes) == [2 * CHUNK] * 12 + [3 * CHUNK] * 8


async def test_a_file_that_has_grown_is_not_read(pair: Pair) -> None:
    await write_snapshot(pair.source, "host/one", 1000, {"x.blob": b"x"})
    path = pair.source.store.base / Group.parse("host/one").at(1000).path / "x.blob"
    with path.open("r+b") as file:
        file.truncate(100 * MIB)
    report = await pull(pair.source, pair.target)
    (why,) = report.failed.values()
    assert "wrong size (104857600 bytes, at most 13 are possible)" in why
