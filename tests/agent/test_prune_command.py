"""`fleece prune`, and `list` with what prune and verify left, as a person runs them."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from datastore.names import Group, Namespace
from repository.local import open_local
from tests.support.snapshots import read_image, write_snapshot
from tests.support.upkeep import run_and_kill

from .conftest import Fleece

FILES = {"disk.img.fidx": bytes(200_000), "vm.conf.blob": b"x"}
DAY = 86400
START = 1_700_000_000


def fill(base: Path, group: str, count: int, *, ns: str = "", step: int = DAY) -> list[str]:
    """`count` snapshots, one a day; their names."""

    async def write() -> list[str]:
        repo = await open_local(base)
        try:
            wanted = Group.parse(group, Namespace.parse(ns))
            return [str(await write_snapshot(repo, wanted, START + number * step, FILES)) for number in range(count)]
        finally:
            repo.close()

    return trio.run(write)


def test_a_dry_run_says_why_and_prune_does_it(stored: Fleece, store_folder: Path) -> None:
    names = fill(store_folder, "vm/100", 4)
    stored.json("protect", names[0])
    planned = stored.json("prune", "vm/100", "--keep-last", "1", "--keep-daily", "2", "--dry-run")
    assert [(one["snapshot"], one["mark"], one["keep"], one["protected"]) for one in planned] == [
        (names[0], "protected", True, True),
        (names[1], "keep", True, False),
        (names[2], "keep", True, False),
        (names[3], "keep", True, False),
    ]
    assert [one["reason"] for one in planned] == ["protected", "daily 2 of 2", "daily 1 of 2", "last 1 of 1"]
    done = stored.json("prune", "vm/100", "--keep-last", "1")
    assert [one["removed"] for one in done] == [False, True, True, False]
    assert {"backup-type", "backup-id", "backup-time", "ns"} < set(done[0])
    assert [one["snapshot"] for one in stored.json("list")] == [names[0], names[3]]
    answer = stored("prune", "vm/100", "--keep-last", "1")
    assert answer.code == 0
    assert answer.out.splitlines()[-1] == "2 kept, 0 removed"


def test_without_options_everything_stays(stored: Fleece, store_folder: Path) -> None:
    fill(store_folder, "vm/100", 2)
    assert [one["keep"] for one in stored.json("prune", "--all")] == [True, True]
    assert len(stored.json("list")) == 2


def test_all_reaches_as_deep_as_it_is_told_and_no_filtered_group(stored: Fleece, store_folder: Path) -> None:
    for ns, group in (("", "vm/1"), ("", "ct/1"), ("a", "vm/2"), ("a/b", "vm/3")):
        fill(store_folder, group, 2, ns=ns)

    def gone(*arguments: str) -> set[str]:
        pruned = stored.json("prune", "--all", "--keep-last", "1", "--dry-run", *arguments)
        return {f"{one['ns']}:{one['backup-type']}/{one['backup-id']}" for one in pruned if not one["keep"]}

    assert gone() == {":vm/1", ":ct/1"}
    assert gone("--max-depth", "1") == {":vm/1", ":ct/1", "a:vm/2"}
    assert gone("--recursive") == {":vm/1", ":ct/1", "a:vm/2", "a/b:vm/3"}
    assert gone("--ns", "a", "--recursive") == {"a:vm/2", "a/b:vm/3"}
    assert gone("-r", "--group-filter", "type:vm", "--group-filter", "exclude:regex:3$") == {":vm/1", "a:vm/2"}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["vm/1", "--all"],
        ["vm/1", "--recursive"],
        ["vm/1", "--keep-last", "0"],
        ["--all", "--keep-daily", "-1"],
        ["--all", "--group-filter", "regex:("],
        ["vm/1/2026-01-01T00:00:00Z", "--keep-last", "1"],
        ["--all", "--max-depth", "8"],
    ],
)
def test_wrong_usage_removes_nothing(arguments: list[str], stored: Fleece) -> None:
    answer = stored("prune", *arguments, "--output", "json")
    assert (answer.code, answer.out) == (2, "")


def test_a_group_that_is_not_there_is_an_error(stored: Fleece) -> None:
    answer = stored("prune", "vm/1", "--keep-last", "1", "--output", "json")
    assert answer.code == 1
    assert answer.error["why"] == "there is no such group"
    assert stored.json("prune", "--all", "--keep-last", "1") == []


def test_what_cannot_be_removed_is_a_warning(stored: Fleece, store_folder: Path) -> None:
    names = fill(store_folder, "vm/100", 3)

    async def prune_while_reading() -> None:
        repo = await open_local(store_folder)
        try:
            async with repo.reader((await repo.snapshots())[0].snapshot):
                answer = await trio.to_thread.run_sync(
                    lambda: stored("prune", "vm/100", "--keep-last", "1", "--output", "json")
                )
        finally:
            repo.close()
        assert answer.code == 3
        assert [one["removed"] for one in answer.document] == [False, True, False]
        assert "using it" in answer.document[0]["error"]
        assert names[0] in answer.err

    trio.run(prune_while_reading)
    assert [one["snapshot"] for one in stored.json("list")] == [names[0], names[2]]


@pytest.mark.timeout(1200)
def test_killed_at_any_moment_of_its_work_prune_leaves_a_sound_store(
    store_folder: Path, long_rounds: Callable[[int], int]
) -> None:
    dice = random.Random(5)
    kills = number = between = 0
    while kills < long_rounds(50):
        number += 1
        assert number < 3 * long_rounds(50) + 20
        names = fill(store_folder, f"vm/{number}", 12)
        if run_and_kill("prune", store_folder, dice):
            kills += 1
            between += 2 < len(list((store_folder / f"vm/{number}").glob("*Z"))) < 12
        trio.run(check_and_prune, store_folder, number, names)
    assert between, "every one died before the first removal or after the last"


async def check_and_prune(base: Path, number: int, names: list[str]) -> None:
    from datastore.prune import KeepOptions

    repo = await open_local(base)
    try:
        group = Group.parse(f"vm/{number}")
        for info in await repo.snapshots(group=group):
            assert await read_image(repo, info.snapshot, "disk.img.fidx") == FILES["disk.img.fidx"]
        result = await repo.prune(group, KeepOptions(last=2))
        assert not result.failed
        left = [str(info.snapshot) for info in await repo.snapshots(group=group, unfinished=True)]
        assert left == names[-2:]
        await repo.forget_group(group)
    finally:
        repo.close()


def test_list_shows_verify_state_and_protection_and_sorts(stored: Fleece, store_folder: Path) -> None:
    old, middle, new = fill(store_folder, "vm/100", 3)
    (other,) = fill(store_folder, "ct/7", 1, step=0)

    async def mark() -> None:
        from datastore.changes import update_manifest

        repo = await open_local(store_folder)
        try:
            found = {str(info.snapshot): info.snapshot for info in await repo.snapshots()}
            for name, state in ((old, "ok"), (middle, "failed")):
                changes = {"verify_state": {"state": state, "upid": "UPID:x"}}
                await update_manifest(repo.store, found[name], changes)
        finally:
            repo.close()

    trio.run(mark)
    stored.json("protect", new)

    def order(*arguments: str) -> list[str]:
        return [one["snapshot"] for one in stored.json("list", *arguments)]

    assert order() == [other, old, middle, new]
    assert order("--reverse") == [new, middle, old, other]
    assert order("--sort", "verified") == [middle, other, new, old]
    assert order("--sort", "time") == [other, old, middle, new]
    assert order("--sort", "protected")[0] == new
    listed = {one["snapshot"]: one for one in stored.json("list")}
    assert listed[middle]["verification"] == {"state": "failed", "upid": "UPID:x"}
    assert "verification" not in listed[new]
    assert listed[new]["protected"] is True
    lines = stored("list").out.splitlines()
    assert lines[0].split() == ["snapshot", "size", "archives", "verified", "protected"]
    assert lines[3].split()[-1] == "failed"
    assert lines[4].split()[-1] == "yes"
