"""The history of a job beside the good case: clocks that are set, damaged and huge files, a disk that fills up."""

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent import job_store
from agent.job_store import JobStore
from core.errors import FleeceError

from .conftest import Fleece


def begin_and_end(store: JobStore, state: str = "ok", **how: Any) -> str:
    with store.begin("gc") as recording:
        recording.end(state, **how)
        return recording.run.id


def test_a_clock_that_is_set_changes_neither_duration_nor_order(
    fleece: Fleece, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(fleece.home / "state", "x")
    now, up = [1_800_000_000.0], [100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(job_store, "_uptime", lambda: up[0])
    ids = []
    for jump in (-86_400.0, 7 * 86_400.0):
        with store.begin("gc") as recording:
            now[0] += jump
            up[0] += 5
            recording.end("ok")
            ids.append(recording.run.id)
    ids.append(begin_and_end(store))
    assert [run.id for run in store.runs()] == ids
    assert [run.to_json()["duration-s"] for run in store.runs()] == [5, 5, 0]
    shown = fleece.json("job", "history", "x")
    assert [run["run"] for run in shown] == ids
    assert fleece.json("job", "history", "x", "--limit", "1")[0]["run"] == ids[-1]


def test_a_run_that_begins_while_somebody_looks_was_not_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, looked = JobStore(tmp_path, "x"), JobStore.running
    with ExitStack() as stack:
        begun: list[str] = []

        def running(self: JobStore) -> bool:
            found = looked(self)
            if not begun:
                begun.append(stack.enter_context(JobStore(tmp_path, "x").begin("gc")).run.id)
            return found

        monkeypatch.setattr(JobStore, "running", running)
        assert [(run.id, run.state) for run in store.runs()] == [(begun[0], "running")]
    assert [run.state for run in store.runs()] == ["killed"]


@pytest.mark.parametrize(
    "changes",
    [
        {"start": float("nan")}, {"start": float("inf")}, {"start": -1}, {"start": 1e300}, {"start": None},
        {"end": float("nan")}, {"end": []}, {"error": "text"}, {"error": {"what": "x"}}, {"result": 3}, {"warnings": 3},
        {"pid": float("inf")},
    ],
)  # fmt: skip
def test_damaged_entries_are_passed_over(fleece: Fleece, changes: dict[str, Any]) -> None:
    store = JobStore(fleece.home / "state", "x")
    first, second, third = (begin_and_end(store) for _ in range(3))
    path = store.folder / "history.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        if entry["run"] == second:
            entry.update({name: value for name, value in changes.items() if name in entry})
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    shown = {run["run"]: run["state"] for run in fleece.json("job", "history")}
    assert (shown[first], shown[third]) == ("ok", "ok")
    # Of a run whose end is damaged, nobody knows how it ended.
    assert shown.get(second, "killed") == "killed"
    assert fleece("job", "history").code == 0


def test_long_texts_do_not_push_new_runs_out_of_a_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_store, "_MAX_HISTORY", 1 << 20)
    store = JobStore(tmp_path, "x")
    error = FleeceError("w" * 5000, "x" * 5000, "y" * 5000, "z" * 5000)
    # 600 KB each, as JSON writes such letters.
    warnings = ["\u2020" * 5000] * 200
    ids = [begin_and_end(store, "failed", warnings=warnings, error=error) for _ in range(10)]
    assert store.runs()[-1].id == ids[-1]
    assert (store.folder / "history.jsonl").stat().st_size < 3 << 20
    kept = store.runs()[-1]
    assert (len(kept.warnings), len(kept.warnings[0])) == (100, 1000)
    assert kept.error is not None
    assert {len(text) for text in kept.error.values()} == {1000}


def test_a_line_that_fits_only_in_part_is_told_and_costs_nothing_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(tmp_path, "x")
    first = begin_and_end(store)
    real = os.write
    with store.begin("gc") as recording:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:20]))
            with pytest.raises(FleeceError, match="No space left"):
                recording.end("ok")
        second = recording.run.id
    third = begin_and_end(store)
    assert [(run.id, run.state) for run in store.runs()] == [(first, "ok"), (second, "killed"), (third, "ok")]
