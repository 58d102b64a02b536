"""`fleece datastore status`: the figures, and what is not known."""

import json
import time
from pathlib import Path

from agent.store_status import StoreStatus, status_document, status_lines
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


def test_a_status_file_of_nonsense_is_shown_but_not_believed() -> None:
    for gc in ({"disk-bytes": "x"}, {"upid": 5, "disk-bytes": -1, "index-data-bytes": 1}, {}):
        status = StoreStatus("main", StoreUsage(0, 0, 0), gc, time.time())
        assert status_document(status)["deduplication-factor"] is None
        assert list(status_lines(status))
