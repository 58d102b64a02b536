"""`fleece datastore status`: the figures, and what is not known."""

import json
import time
from pathlib import Path

import pytest

from agent.store_status import StoreStatus, status_document, status_lines
from datastore.usage_history import UsageSample
from repository.interface import StoreUsage

from .conftest import Fleece
from .test_prune_command import fill

DAY = 86400
GC = {
    "upid": "UPID:host:00000001:00000001:00000001:6553F100:garbage_collection:main:root@pam:",
    "index-data-bytes": 3000, "disk-bytes": 1000, "removed-bytes": 5, "pending-bytes": 6,
}  # fmt: skip


def test_an_empty_store_knows_little_and_says_so(stored: Fleece) -> None:
    status = stored.json("datastore", "status")
    assert status["gc-status"] is None
    assert status["deduplication-factor"] is None
    assert status["estimated-full-date"] is None
    assert 0 < status["avail"] <= status["total"]
    assert "'fleece gc'" in stored("datastore", "status").out


def test_what_is_there_is_counted_in_all_namespaces(stored: Fleece, store_folder: Path) -> None:
    fill(store_folder, "vm/100", 3)
    (name,) = fill(store_folder, "host/a", 1, ns="x/y")
    stored.json("protect", name, "--ns", "x/y")
    (store_folder / "vm/100/2026-01-01T00:00:00Z").mkdir()
    (store_folder / ".gc-status").write_text(json.dumps(GC))
    status = stored.json("datastore", "status", store_folder)
    assert status["counts"] == {
        "ct": {"groups": 0, "snapshots": 0}, "host": {"groups": 1, "snapshots": 1}, "vm": {"groups": 1, "snapshots": 3},
    }  # fmt: skip
    assert (status["namespaces"], status["unfinished"], status["protected"]) == (2, 1, 1)
    assert status["verification"] == {"ok": 0, "failed": 0, "none": 4}
    assert (status["deduplication-factor"], status["last-gc"], status["gc-status"]) == (3.0, 1_700_000_000, GC)
    assert stored("datastore", "status", store_folder, "--repo", store_folder).code == 2
    assert stored("datastore", "status", "/nowhere/at/all").code == 1


def test_a_backup_counts_as_growth(stored: Fleece) -> None:
    image = stored.home / "disk.raw"
    image.write_bytes(b"x" * (5 << 20))
    report = stored.json("backup", f"disk.img:{image}", "--backup-id", "web")
    growth = stored.json("datastore", "status")["growth"]
    assert growth["1-days"] == growth["30-days"] > 0
    assert growth["1-days"] >= report["archives"][0]["stored"]
    stored.json("backup", f"disk.img:{image}", "--backup-id", "other")
    assert stored.json("datastore", "status")["growth"] == growth  # the same chunks again


def test_the_end_of_the_space_is_estimated_from_thirty_days() -> None:
    now = float(int(time.time()))
    status = StoreStatus("main", StoreUsage(1000, 400, 600), GC, now, oldest=int(now - 100 * DAY))
    assert status.full_date is None
    status.growth[30] = 300  # ten a day, and 600 are left
    assert status.full_date == int(now + 60 * DAY)
    assert "in about 60 days, if nothing is removed" in "\n".join(status_lines(status))
    status.oldest = int(now - 10 * DAY)
    assert status.full_date == int(now + 20 * DAY)
    status.oldest = int(now - 3600)
    assert status.full_date is None


def with_history(*samples: tuple[float, int]) -> StoreStatus:
    """A status with (days ago, bytes used); 600 of 1000 bytes are left, and thirty days of backups stored 3000."""
    now = float(int(time.time()))
    status = StoreStatus("main", StoreUsage(1000, 400, 600), GC, now, oldest=int(now - 100 * DAY))
    status.growth[30] = 3000
    status.history = [UsageSample(int(now - ago * DAY), used, used) for ago, used in samples]
    return status


def test_what_was_removed_counts_once_there_is_a_history() -> None:
    status = with_history(*((30 - day, 300 + 10 * day) for day in range(0, 30, 2)))
    assert status.net_growth == pytest.approx(10)
    document = status_document(status)
    assert document["estimated-full-date"] == pytest.approx(status.now + 60 * DAY, abs=2)
    assert (document["net-growth-per-day"], document["estimate-basis"]) == (10, "history")
    text = "\n".join(status_lines(status))
    assert "in about 60 days\n" in f"{text}\n"
    assert "10 B a day over 28 days, between 15 garbage collections" in text


@pytest.mark.parametrize(("slope", "words"), [(0, "0 B a day"), (-3, "-3 B a day")])
def test_a_store_that_does_not_grow_is_never_full(slope: int, words: str) -> None:
    status = with_history(*((20 - day, 500 + slope * day) for day in range(15)))
    document = status_document(status)
    assert (document["net-growth-per-day"], document["estimated-full-date"]) == (slope, None)
    assert document["estimate-basis"] == "history"
    text = "\n".join(status_lines(status))
    assert words in text
    assert "not within ten years" in text


def test_a_few_odd_days_do_not_change_the_estimate() -> None:
    odd = {3: 900, 4: 950, 11: 0, 19: 700}  # at the end, too, where end points would follow it
    status = with_history(*((20 - day, odd.get(day, 100 + 10 * day)) for day in range(20)))
    assert status.net_growth == pytest.approx(10, abs=1)


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [(20, 1), (10, 2), (1, 3)],  # three
        [(6, 1), (5, 2), (3, 3), (0.5, 4)],  # not a week
        [(40, 1), (30, 2), (20, 3), (15, 4)],  # the last one is old
        [(200, 1), (150, 2), (100, 3), (1, 4)],  # one of the last sixty days
        [(20, 1), (10, 2), (1, 3), (-5, 4)],  # one of the future
        [(1, 1), (1, 2), (1, 3), (1, 4)],
    ],
)
def test_without_enough_history_the_estimate_is_as_if_nothing_were_removed_and_says_so(
    samples: list[tuple[float, int]],
) -> None:
    status = with_history(*samples)
    document = status_document(status)
    assert document["estimated-full-date"] == int(status.now + 6 * DAY)
    assert (document["net-growth-per-day"], document["estimate-basis"]) == (None, "manifests")
    text = "\n".join(status_lines(status))
    assert "in about 6 days, if nothing is removed" in text
    assert "net growth" not in text


def test_garbage_collections_of_the_real_command_make_the_history(stored: Fleece, store_folder: Path) -> None:
    now = int(time.time())
    assert stored.json("datastore", "status")["estimate-basis"] is None
    stored.json("gc")
    path = store_folder / ".fleece/usage-history"
    (line,) = path.read_text().splitlines()
    end, used, _chunks = map(int, line.split())
    assert now <= end <= time.time()
    assert used >= 0
    # Figures of our own from here: the real ones are what other tests leave on the same file system.
    used = 1_000_000
    earlier = [f"{end - day * DAY} {used - day * 1000} 0\n" for day in (28, 21, 14, 7)]
    path.write_text("".join([*earlier, "damaged\n", f"{end} {used} 0\n"]))
    status = stored.json("datastore", "status")
    assert status["estimate-basis"] == "history"
    assert status["net-growth-per-day"] == pytest.approx(1000, abs=5)
    assert status["estimated-full-date"] == pytest.approx(now + status["avail"] / 1000 * DAY, rel=0.01)
    stored.json("gc")
    assert len(path.read_text().splitlines()) == 5


def test_a_status_file_of_nonsense_is_shown_but_not_believed() -> None:
    for gc in ({"disk-bytes": "x"}, {"upid": 5, "disk-bytes": -1, "index-data-bytes": 1}, {}):
        status = StoreStatus("main", StoreUsage(0, 0, 0), gc, time.time())
        assert status_document(status)["deduplication-factor"] is None
        assert list(status_lines(status))
