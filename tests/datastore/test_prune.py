"""Prune's decisions: against the example of the documentation, a real PBS, and a model that was written apart."""

import datetime
import json
import os
import time
import zoneinfo
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UsageError
from core.progress import Progress
from datastore.names import PROTECTED_NAME, Group, Snapshot
from datastore.prune import Decision, KeepOptions, Mark, decide, prune_group
from datastore.store import Datastore
from repository.local import LocalRepository
from tests.support.snapshots import write_snapshot

GROUP = Group.parse("vm/100")
KINDS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


@dataclass(frozen=True)
class One:
    snapshot: Snapshot
    finished: bool = True
    protected: bool = False


@contextmanager
def in_zone(name: str) -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = name
    time.tzset()
    try:
        yield
    finally:
        if before is None:
            del os.environ["TZ"]
        else:
            os.environ["TZ"] = before
        time.tzset()


def options(given_options: dict[str, int]) -> KeepOptions:
    return KeepOptions(**{name.removeprefix("keep-"): count for name, count in given_options.items()})


def test_the_example_of_the_documentation() -> None:
    rows = """\
2024-01-10T12:00:00Z unfinished keep-partial
2024-01-10T06:00:00Z - keep last 1 of 1
2024-01-09T18:00:00Z - keep daily 1 of 2
2024-01-09T06:00:00Z - remove the same day as 2024-01-09T18:00:00Z
2024-01-08T06:00:00Z protected protected
2024-01-08T03:00:00Z unfinished remove unfinished
2024-01-07T06:00:00Z - keep daily 2 of 2
2024-01-03T06:00:00Z - remove no keep option covers it
2024-01-02T06:00:00Z - remove no keep option covers it
2023-12-31T06:00:00Z - keep weekly 1 of 2
2023-12-24T06:00:00Z - keep weekly 2 of 2
2023-11-30T06:00:00Z - keep monthly 1 of 1
2022-06-01T06:00:00Z - keep yearly 1 of 1""".splitlines()
    candidates, expected = [], []
    for row in rows:
        stamp, state, marked, *words = row.split(" ")
        snapshot = Snapshot.parse(f"{GROUP}/{stamp}")
        candidates.append(One(snapshot, state != "unfinished", state == "protected"))
        expected.append((snapshot, Mark(marked), " ".join(words)))
    with in_zone("UTC"):
        decisions = decide(candidates, KeepOptions(last=1, daily=2, weekly=2, monthly=1, yearly=1))
    for decision, (snapshot, mark, reason) in zip(reversed(decisions), expected, strict=True):
        assert (decision.snapshot, decision.mark) == (snapshot, mark)
        assert not reason or decision.reason == reason


def test_every_decision_of_a_real_pbs_is_ours_too(golden: Path) -> None:
    cases = json.loads((golden / "prune.json").read_text())
    assert len(cases) == 240
    assert len({case["zone"] for case in cases}) == 3
    for number, case in enumerate(cases):
        candidates = [One(GROUP.at(one["time"]), not one["incomplete"], one["protected"]) for one in case["snapshots"]]
        with in_zone(case["zone"]):
            keep = {decision.snapshot: decision.keep for decision in decide(candidates, options(case["options"]))}
        assert [keep[one.snapshot] for one in candidates] == case["keep"], f"case {number}"


def brute_force(candidates: list[One], keep: dict[str, int], zone: str) -> set[int]:
    """The times that stay, found another way: slot by slot over the whole list for each kind, with zoneinfo's clock."""
    clock = zoneinfo.ZoneInfo(zone)

    def period(kind: str, ctime: int) -> tuple[int, ...]:
        when = datetime.datetime.fromtimestamp(ctime, clock)
        return {
            "last": (ctime,),
            "hourly": (when.year, when.month, when.day, when.hour),
            "daily": (when.year, when.month, when.day),
            "weekly": tuple(when.isocalendar()[:2]),
            "monthly": (when.year, when.month),
            "yearly": (when.year,),
        }[kind]

    if not keep:
        return {one.snapshot.ctime for one in candidates}
    ordered = sorted(candidates, key=lambda one: -one.snapshot.ctime)
    stays = {one.snapshot.ctime for one in ordered if one.protected}
    if ordered and not ordered[0].finished:
        stays.add(ordered[0].snapshot.ctime)
    # `open_` are those that nobody has decided about, newest first; protected ones leave it when a pass meets them.
    open_ = [one.snapshot.ctime for one in ordered if one.finished]
    shielded = {one.snapshot.ctime for one in ordered if one.protected}
    chosen: list[int] = []
    for kind in KINDS:
        if kind not in keep:
            continue
        old = {period(kind, ctime) for ctime in chosen}
        slots: list[tuple[int, ...]] = []
        left = []
        for position, ctime in enumerate(open_):
            if ctime in shielded:
                continue
            slot = period(kind, ctime)
            if slot in old:
                left.append(ctime)
            elif slot not in slots:
                if len(slots) == keep[kind]:
                    left += open_[position:]
                    break
                slots.append(slot)
                chosen.append(ctime)
        open_ = left
    return stays | set(chosen)


@settings(max_examples=400, deadline=None)
@given(
    times=st.lists(
        st.integers(1, 60).flatmap(lambda unit: st.integers(0, 400).map(lambda n: 1_600_000_000 + n * unit * 1801)),
        max_size=40,
        unique=True,
    ),
    states=st.lists(st.sampled_from(["", "", "", "", "unfinished", "protected", "both"]), min_size=40, max_size=40),
    keep=st.dictionaries(st.sampled_from(KINDS), st.integers(1, 6)),
    zone=st.sampled_from(["UTC", "America/New_York", "Pacific/Auckland", "Asia/Kolkata"]),
)
def test_an_independent_model_decides_alike(
    times: list[int], states: list[str], keep: dict[str, int], zone: str
) -> None:
    candidates = [
        One(GROUP.at(ctime), state not in ("unfinished", "both"), state in ("protected", "both"))
        for ctime, state in zip(times, states, strict=False)
    ]
    with in_zone(zone):
        decisions = decide(candidates, KeepOptions(**keep))
    assert {one.snapshot.ctime for one in decisions if one.keep} == brute_force(candidates, keep, zone)
    assert [one.snapshot.ctime for one in decisions] == sorted(times)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, -1])
def test_keeping_none_of_a_kind_is_refused(kind: str, count: int) -> None:
    with pytest.raises(UsageError, match=rf"keep-{kind} is {count}; it must be at least 1"):
        KeepOptions(**{kind: count})


def test_without_options_everything_stays() -> None:
    candidates = [One(GROUP.at(10)), One(GROUP.at(20), finished=False), One(GROUP.at(30))]
    assert [decision.keep for decision in decide(candidates, KeepOptions())] == [True, True, True]
    assert decide([], KeepOptions(last=1)) == []


def test_a_folder_with_an_impossible_date_is_another_snapshot_than_the_day_it_stands_for() -> None:
    odd, real = (Snapshot.parse(f"{GROUP}/{stamp}") for stamp in ("2026-02-31T00:00:00Z", "2026-03-03T00:00:00Z"))
    with in_zone("UTC"):
        decisions = decide([One(odd), One(real)], KeepOptions(last=2))
        assert [decision.keep for decision in decisions] == [True, True]
        assert sum(decision.keep for decision in decide([One(odd), One(real)], KeepOptions(daily=2))) == 1


@pytest.fixture
async def store(store_folder: Path) -> AsyncIterator[Datastore]:
    opened = await Datastore.open(store_folder)
    yield opened
    opened.close()


async def fill(store: Datastore, *times: int) -> list[Snapshot]:
    repo = LocalRepository(store, "test")
    return [await write_snapshot(repo, GROUP, ctime, {"a.conf.blob": b"x"}) for ctime in times]


async def test_the_oldest_goes_first_and_a_dry_run_removes_nothing(store: Datastore) -> None:
    snapshots = await fill(store, 1000, 2000, 3000, 4000)
    result = await prune_group(store, GROUP, KeepOptions(last=1), dry_run=True)
    assert [decision.keep for decision in result.decisions] == [False, False, False, True]
    assert (result.removed, store.snapshots(GROUP)) == (set(), snapshots)

    lines: list[str] = []

    class Log(Progress):
        def log(self, text: str) -> None:
            lines.append(text)

    result = await prune_group(store, GROUP, KeepOptions(last=1), progress=Log())
    assert lines == [f"removed {snapshot}" for snapshot in snapshots[:3]]
    assert result.removed == set(snapshots[:3])
    assert store.snapshots(GROUP) == snapshots[3:]


async def test_what_is_in_use_or_protected_meanwhile_stays_with_a_warning(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third, _ = await fill(store, 1000, 2000, 3000, 4000)

    def late(*arguments: object) -> list[Decision]:
        decisions = decide(*arguments)  # type: ignore[arg-type]
        (store.base / third.path / PROTECTED_NAME).touch()
        return decisions

    monkeypatch.setattr("datastore.prune.decide", late)
    progress = Progress()
    async with store.locks.snapshot(second, shared=True):
        result = await prune_group(store, GROUP, KeepOptions(last=1), progress=progress)
    assert result.removed == {first}
    assert set(result.failed) == {second, third}
    assert [warning.split(" stays: ")[0] for warning in progress.warnings] == [str(second), str(third)]
    assert store.exists(second)
    assert store.exists(third)


async def test_an_unfinished_one_that_is_finished_meanwhile_stays(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, _ = await fill(store, 1000, 2000)
    manifest = store.base / old.path / "index.json.blob"
    manifest.rename(manifest.with_name("elsewhere"))

    def late(*arguments: object) -> list[Decision]:
        decisions = decide(*arguments)  # type: ignore[arg-type]
        manifest.with_name("elsewhere").rename(manifest)
        return decisions

    monkeypatch.setattr("datastore.prune.decide", late)
    result = await prune_group(store, GROUP, KeepOptions(last=1))
    assert list(result.failed.values()) == ["it was finished meanwhile"]
    assert store.is_finished(old)
    monkeypatch.undo()
    assert (await prune_group(store, GROUP, KeepOptions(last=1))).removed == {old}


async def test_an_old_unfinished_one_goes_and_the_newest_stays(store: Datastore) -> None:
    old, _, new = await fill(store, 1000, 2000, 3000)
    for snapshot in (old, new):
        (store.base / snapshot.path / "index.json.blob").unlink()
    result = await prune_group(store, GROUP, KeepOptions(last=5))
    assert result.removed == {old}
    assert store.snapshots(GROUP, unfinished=True)[-1] == new
