"""PBS's file of counters: its bytes, several processes, and when it is written."""

from pathlib import Path

import pytest
import trio

from core.errors import FormatError
from datastore.files import Owner
from datastore.names import Group
from datastore.s3.counter_file import (
    COUNTERS_NAME,
    MAGIC,
    NAMES,
    PERIOD_NAME,
    CounterFile,
    CounterValues,
    CountingPeriod,
)
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


class Clock:
    """Unix seconds that tests set, and schedules that are a number of seconds: due at all multiples of it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.reckoned = 0

    def __call__(self) -> float:
        return self.now

    def next_time(self, schedule: str, moment: float) -> int | None:
        self.reckoned += 1
        return int(moment // int(schedule) + 1) * int(schedule)

    def file(self, folder: Path) -> CounterFile:
        return CounterFile(folder, Owner.of(folder), next_time=self.next_time, now=self)


def test_counters_are_set_back_when_their_schedule_is_due_by_whoever_adds_to_them_next(tmp_path: Path) -> None:
    clock = Clock()
    file = clock.file(tmp_path)
    assert file.period() == CountingPeriod()
    file.set_thresholds({"s3-get": 5})
    file.add({"s3-get": 3})
    assert file.period() == CountingPeriod(since=1000)
    clock.now = 1450.0
    file.set_schedule("100")
    assert file.period() == CountingPeriod(1000, "100", 1500), "not at once, although much time has passed"
    assert file.read().counts["s3-get"] == 3
    clock.now = 1500.0
    assert clock.file(tmp_path).read().counts["s3-get"] == 0, "also before anybody has written it"
    assert file.period() == CountingPeriod(1500, "100", 1600)
    clock.now = 1744.0  # nobody was there for two of them
    values = clock.file(tmp_path).add({"s3-get": 2})
    assert (values.counts["s3-get"], values.thresholds["s3-get"]) == (2, 5)
    assert file.period() == CountingPeriod(1744, "100", 1800)
    assert file.add({"s3-get": 1}).counts["s3-get"] == 3
    file.reset()
    assert (file.read().counts["s3-get"], file.period()) == (0, CountingPeriod(1744, "100", 1800))
    file.add({"s3-get": 1})
    file.set_schedule(None)
    clock.now = 9000.0
    assert (file.read().counts["s3-get"], file.period()) == (1, CountingPeriod(1744))


def test_who_cannot_reckon_a_schedule_leaves_that_to_the_next_one(tmp_path: Path) -> None:
    clock = Clock()
    clock.file(tmp_path).set_schedule("100")
    clock.now = 1100.0
    plain = CounterFile(tmp_path, Owner.of(tmp_path), now=clock)
    plain.add({"s3-get": 1})
    assert plain.period() == CountingPeriod(1100, "100", None)
    assert plain.add({"s3-get": 1}).counts["s3-get"] == 2
    clock.now = 1250.0
    assert clock.file(tmp_path).add({"s3-get": 1}).counts["s3-get"] == 3
    assert plain.period() == CountingPeriod(1100, "100", 1300)


def test_a_clock_that_is_set_back_sets_no_counters_back(tmp_path: Path) -> None:
    clock = Clock()
    file = clock.file(tmp_path)
    file.set_schedule("100")
    file.add({"s3-get": 1})
    clock.now = 10.0
    assert file.add({"s3-get": 1}).counts["s3-get"] == 2
    assert clock.reckoned == 1, "a schedule is reckoned when it is set or was due"


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"nonsense", b'{"since": "x"}', b'{"until": -5}', b'{"until": true}', b'{"schedule": 7}', b"[" * 4000],
)
def test_a_damaged_file_of_the_period_says_nothing_and_is_written_over(tmp_path: Path, data: bytes) -> None:
    clock = Clock()
    file = clock.file(tmp_path)
    file.add({"s3-get": 7})
    (tmp_path / PERIOD_NAME).write_bytes(data)
    assert file.period() == CountingPeriod()
    assert file.add({"s3-get": 1}).counts["s3-get"] == 8
    file.set_schedule("500")
    assert file.period() == CountingPeriod(None, "500", 1500)


def test_a_process_that_dies_between_the_two_files_loses_no_setting_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    file = clock.file(tmp_path)
    file.set_schedule("100")
    file.add({"s3-get": 7})
    clock.now = 1100.0

    def die(*_words: object, **_more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("datastore.s3.counter_file.replace_file", die)
        with pytest.raises(KeyboardInterrupt):
            file.add({"s3-get": 1})
    assert file.add({"s3-get": 1}).counts["s3-get"] == 1


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
