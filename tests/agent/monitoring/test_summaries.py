"""What is kept of each job: counted once, whatever happened to processes and files."""

import json
from pathlib import Path
from typing import Any

from agent.job_store import JobStore, Run
from agent.monitoring.summaries import Summary, load_summary, save_summary, summary_path, uncounted

from .conftest import a_run, record

S3 = {"endpoint": "aws", "requests": {"get": 1, "put": 2}, "uploaded": 10, "downloaded": 20}


def backed_up(state: str = "ok", *, guest: str = "web", number: int = 1, **fields: Any) -> Run:
    one = {"guest": guest, "repository": "main", "ns": "a", "group": f"vm/{guest}", "state": state, "attempts": 1,
           "snapshot": f"vm/{guest}/2026-01-02T03:04:05Z", "duration-s": 1.0, "size": 100, "read": 50, "new": 5,
           "reused": 95, "stored": 4, "reasons": ["drive: no bitmap"], "error": None, "s3": S3} | fields  # fmt: skip
    return a_run(state, number=number, error=None, result={"read": 50, "new": 5, "guests": [one]})


def test_runs_figures_and_guests_are_added_up() -> None:
    summary = Summary()
    for run in (backed_up(), backed_up("failed", number=2, error="gone"), backed_up("warnings", guest="db", number=3)):
        summary.take(run)
    summary = Summary.parse(json.loads(json.dumps(summary.to_json())))
    assert {state: count for state, count in summary.runs.items() if count} == {"ok": 1, "failed": 1, "warnings": 1}
    assert (summary.totals["read"], summary.totals["new"]) == (150, 15)
    assert summary.s3 == {"aws": {"requests": {"get": 3, "put": 6}, "uploaded": 30, "downloaded": 60}}
    assert summary.last is not None
    assert summary.last["state"] == "warnings"
    assert "guests" not in summary.last["result"]
    web = summary.guests["main|a|vm/web"]
    # The failure is what is known of it, and the backup before it is still there.
    assert (web["state"], web["error"], web["backup"]["size"]) == ("failed", "gone", 100)
    assert web["backup"]["reasons"] == ["drive: no bitmap"]
    assert web["attempted"] > 0
    assert list(summary.guests) == ["main|a|vm/web", "main|a|vm/db"]
    assert summary.last_success is not None
    assert summary.last_failure is not None


def test_each_run_is_counted_once_also_one_that_was_killed(tmp_path: Path) -> None:
    record(tmp_path, a_run("ok"))
    record(tmp_path, a_run("killed"))
    store = JobStore(tmp_path, "night")
    summary = Summary()
    runs = uncounted(None, store.runs())
    assert [run.state for run in runs] == ["ok", "killed"]
    for run in runs:
        summary.take(run)
    save_summary(store, summary)
    again = load_summary(store)
    assert again is not None
    assert uncounted(again, store.runs()) == []
    record(tmp_path, a_run("ok"))
    assert [run.state for run in uncounted(again, store.runs())] == ["ok"]
    # The history has forgotten the run that was counted last.
    again.through = "night:20200101T000000Z-0000"
    assert [run.state for run in uncounted(again, store.runs())] == ["ok"]


def test_a_run_that_goes_on_is_not_counted(tmp_path: Path) -> None:
    store = JobStore(tmp_path, "night")
    with store.begin("backup"):
        assert uncounted(None, store.runs()) == []


def test_damage_costs_what_is_damaged_and_never_an_error(tmp_path: Path) -> None:
    store = JobStore(tmp_path, "night")
    assert load_summary(store) is None
    summary = Summary()
    summary.take(backed_up())
    save_summary(store, summary)
    assert summary_path(store).stat().st_mode & 0o777 == 0o640
    good = json.loads(summary_path(store).read_text())
    changes: tuple[dict[str, Any], ...] = (
        {"last": 1}, {"through": 5}, {"through-start": "x"}, {"through-start": 1e300}, {"last-success": -1},
        {"runs": []}, {"runs": {"ok": -5}}, {"totals": {"read": "x"}}, {"totals": 3}, {"s3": {"a": 1}}, {"s3": []},
        {"guests": {"a": 1}}, {"guests": None}, {"seconds": None}, {"last-failure": True},
    )  # fmt: skip
    for changed in changes:
        summary_path(store).write_text(json.dumps(good | changed))
        found = load_summary(store)
        assert found is not None
        found.take(backed_up(number=2))
        json.dumps(found.to_json())
    for raw in (b"", b"\0", b"[]", b"[" * 200_000, b'{"schema": 1}', b'{"last": NaN}'):
        summary_path(store).write_bytes(raw)
        load_summary(store)


def test_what_a_history_may_hold_is_taken_with_care() -> None:
    summary = Summary()
    for result in (
        {"read": -1, "new": True, "guests": "x", "s3": 1},
        {
            "read": float("nan"),
            "guests": [1, {"guest": 5}, {}],
            "s3": {"endpoint": "a", "requests": [], "uploaded": "x"},
        },
        {"read": 1e400, "guests": [{"guest": "g", "group": None, "state": 7, "reasons": 3}]},
    ):
        summary.take(a_run("ok", result=result))
    assert summary.totals["read"] == 0
    json.dumps(summary.to_json(), allow_nan=False)
