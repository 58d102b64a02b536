"""What `fleece find` is told about time and size."""

import time

import pytest

from agent.archive_listing import Found
from agent.cli_look import _moment
from agent.finding import Bounds
from core.errors import UsageError
from datastore.names import Snapshot

SNAPSHOT = Snapshot.parse("host/web/2026-01-01T00:00:00Z")


@pytest.mark.parametrize(
    ("bounds", "held"),
    [
        (Bounds(), {"old", "new", "large", "unknown"}),
        (Bounds(after_s=100), {"new", "large"}),
        (Bounds(after_s=101), {"large"}),
        (Bounds(before_s=100), {"old"}),
        (Bounds(least=5), {"large"}),
        (Bounds(most=5), {"old", "new"}),
        (Bounds(after_s=0, before_s=101, least=0, most=4), {"old", "new"}),
    ],
)
def test_what_has_no_time_or_size_is_within_no_bound_of_it(bounds: Bounds, held: set[str]) -> None:
    entries = {"old": (3, 99), "new": (4, 100), "large": (6, 200), "unknown": (None, None)}
    found = {
        name for name, (size, mtime) in entries.items() if bounds.hold(Found(SNAPSHOT, "a", b"/", "f", size, mtime))
    }
    assert found == held


def test_times_are_local_unless_they_name_a_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Etc/GMT-2")  # two hours before Greenwich
    time.tzset()
    try:
        assert _moment("--newer", "2026-01-02") == 1_767_304_800
        assert _moment("--newer", "2026-01-02T15:04") == 1_767_359_040
        assert _moment("--newer", "2026-01-02T15:04:00Z") == 1_767_366_240
        before = int(time.time())
        assert before - 7 * 86400 <= _moment("--older", "7d") <= int(time.time()) - 7 * 86400
    finally:
        monkeypatch.undo()
        time.tzset()
    for wrong in ("yesterday", "", "2026-13-01", "7 weeks"):
        with pytest.raises(UsageError, match="neither a time nor a duration"):
            _moment("--newer", wrong)
