"""PBS's file of counters: its bytes, several processes, and when it is written."""

from pathlib import Path

import pytest
import trio

from core.errors import FormatError
from datastore.files import Owner
from datastore.names import Group
from datastore.s3.counter_file import COUNTERS_NAME, MAGIC, NAMES, CounterFile, CounterValues
from repository.local import LocalRepository
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_stores import s3_store
from tests.support.snapshots import CHUNK, write_snapshot


def test_the_layout_has_a_number_in_each_slot_of_32_bytes(tmp_path: Path) -> None:
    counts = {name: 3 * number + 1 for number, name in enumerate(NAMES)}
    thresholds = {name: 1 << (40 + number) for number, name in enumerate(NAMES)}
    data = CounterValues(counts, thresholds).pack()
    assert len(data) == 4096
    assert data[:32] == MAGIC + bytes(24)
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(32, 32 * 15, 32)]
    assert words == [1, 4, 7, 10, 13, 16, 19, *(1 << (40 + number) for number in range(7))]
    assert all(data[at + 8 : at + 32] == bytes(24) for at in range(0, 32 * 15, 32))
    assert data[32 * 15 :] == bytes(4096 - 32 * 15)
    assert NAMES == ("s3-get", "s3-delete", "s3-put", "s3-head", "s3-post", "s3-upload", "s3-download")
    assert CounterValues.parse(data, where="x") == CounterValues(counts, thresholds)


@pytest.mark.parametrize("data", [b"", bytes(4096), MAGIC, MAGIC + bytes(4089), MAGIC[::-1] + bytes(4088)])
def test_what_is_no_such_file_is_refused_and_written_over(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(FormatError):
        CounterValues.parse(data, where="x")
    (tmp_path / ".fleece").mkdir()
    (tmp_path / COUNTERS_NAME).write_bytes(data)
    file = CounterFile(tmp_path, Owner.of(tmp_path))
    assert file.add({"s3-get": 5}).counts["s3-get"] == 5
    assert file.read().counts["s3-get"] == 5


def test_several_processes_add_up_and_thresholds_stay(tmp_path: Path) -> None:
    one, two = (CounterFile(tmp_path, Owner.of(tmp_path)) for _ in range(2))
    assert one.read() == CounterValues.empty()
    one.set_thresholds({"s3-put": 100})
    one.add({"s3-put": 1, "s3-upload": 1 << 40})
    two.add({"s3-put": 2, "s3-get": 7})
    assert {name: count for name, count in one.read().counts.items() if count} == {
        "s3-put": 3,
        "s3-get": 7,
        "s3-upload": 1 << 40,
    }
    two.reset()
    assert set(one.read().counts.values()) == {0}
    assert one.read().thresholds["s3-put"] == 100
    two.add({"s3-get": (1 << 64) - 1})
    assert two.add({"s3-get": 2}).counts["s3-get"] > 0  # a number that overflows begins anew, and breaks nothing
    assert one.read().counts["s3-get"] == 1


async def test_a_store_counts_while_it_is_open_and_when_it_ends(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.s3.opening._NOTE_COUNTS_EVERY_S", 0.05)
    group = Group.parse("vm/100")
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        file = store.s3.counter_file
        await write_snapshot(LocalRepository(store, "test"), group, 1000, {"disk.img.fidx": bytes(CHUNK)})
        puts = len(s3_emulator.requests("PUT"))
        with trio.fail_after(60):
            while file.read().counts["s3-put"] != puts:  # noqa: ASYNC110 - a file tells nobody
                await trio.sleep(0.02)
        await store.client.head_bucket()
    assert file.read().counts["s3-head"] == 1
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.client.head_bucket()
    assert file.read().counts == {**file.read().counts, "s3-head": 2, "s3-put": puts}


async def test_a_threshold_is_told_once_by_whoever_passes_it(store_folder: Path, s3_emulator: S3Emulator) -> None:
    told: list[tuple[str, int, int]] = []
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        store.s3.counter_file.set_thresholds({"s3-head": 3})
    for _ in range(6):
        async with s3_store(store_folder, s3_emulator.endpoint()) as store:
            store.s3.crossed = lambda *words: told.append(words)
            await store.client.head_bucket()
    assert told == [("s3-head", 4, 3)]
    store.s3.counter_file.reset()
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        store.s3.crossed = lambda *words: told.append(words)
        for _ in range(5):
            await store.client.head_bucket()
    assert told[1:] == [("s3-head", 5, 3)]


async def test_what_is_used_of_a_bucket_is_what_the_last_garbage_collection_found(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        usage = await repo.usage()
        assert (usage.total, usage.used, usage.available) == (0, 0, 0)
        await write_snapshot(repo, Group.parse("vm/100"), 1000, {"disk.img.fidx": bytes(CHUNK)})
        report = await repo.collect_garbage()
        objects = [len(one.data) for key, one in s3_emulator.bucket.objects.items() if "/.chunks/" in key]
        assert (await repo.usage()).used == sum(objects) == report.status.disk_bytes + report.status.pending_bytes
        assert (await repo.usage_history())[-1].used == sum(objects)
