"""What vanished at the source, and everything that keeps it at the target."""

from typing import Any

import pytest

from core.errors import FleeceError
from datastore.filters import GroupFilter
from datastore.names import ROOT, Group, Namespace
from repository.sync import AllRights
from tests.repository.sync.conftest import Pair
from tests.support.syncs import Faults, Faulty, Said, pull, push, times, write

A = Namespace.parse("a")
AB = Namespace.parse("a/b")


def group(text: str, ns: Namespace = ROOT) -> Group:
    return Group.parse(text, ns)


async def twice(pair: Pair) -> None:
    """The same groups and namespaces on both sides."""
    for repo in (pair.source, pair.target):
        for one in (group("vm/1"), group("vm/2"), group("host/x", A), group("host/y", AB)):
            await write(repo, one, 1000, 2000)


async def test_nothing_goes_unless_it_is_asked_for(pair: Pair) -> None:
    await twice(pair)
    await pair.source.delete_namespace(A, groups=True)
    await pair.source.forget_group(group("vm/2"))
    await push(pair.source, pair.target)
    assert len(await pair.target.groups()) == 2
    assert len(await pair.target.namespaces()) == 3


async def test_vanished_snapshots_groups_and_namespaces_go_and_are_counted(pair: Pair) -> None:
    await twice(pair)
    await pair.source.delete_namespace(A, groups=True)
    await pair.source.forget_group(group("vm/2"))
    await pair.source.forget(group("vm/1").at(1000))
    report = await push(pair.source, pair.target, remove_vanished=True)
    assert await times(pair.target, "vm/1") == [2000]
    assert [str(info.group) for info in await pair.target.groups()] == ["vm/1"]
    assert await pair.target.namespaces() == [ROOT]
    assert report.removed_snapshots == 1 + 2 + 4
    assert sorted(map(str, report.removed_groups)) == ["host/x", "host/y", "vm/2"]
    assert report.removed_namespaces == [AB, A]


async def test_protected_snapshots_keep_their_group_and_namespace(pair: Pair) -> None:
    await twice(pair)
    for one in (group("vm/1").at(1000), group("vm/2").at(1000), group("host/y", AB).at(1000)):
        await pair.target.set_protected(one, protected=True)
    await pair.source.delete_namespace(A, groups=True)
    await pair.source.forget_group(group("vm/2"))
    await pair.source.forget(group("vm/1").at(1000))
    said = Said()
    report = await push(pair.source, pair.target, said, remove_vanished=True)
    assert await times(pair.target, "vm/1") == [1000, 2000]
    assert await times(pair.target, "vm/2") == [1000]
    assert await times(pair.target, group("host/y", AB)) == [1000]
    assert await pair.target.namespaces() == [ROOT, A, AB]
    assert len(report.protected) == 3
    assert report.failed == {}
    assert any("kept 1 protected snapshots of the vanished group vm/2" in one for one in said.warnings)


async def test_only_what_is_ours_and_passes_the_filter_goes(pair: Pair) -> None:
    await twice(pair)
    await write(pair.target, "ct/7", 1000)
    await write(pair.target, "vm/3", 1000)
    await pair.target.set_owner(group("vm/3"), "other@pbs")
    await pair.source.forget_group(group("vm/2"))
    await push(pair.source, pair.target, remove_vanished=True, filters=(GroupFilter.parse("type:vm"),))
    assert [str(info.group) for info in await pair.target.groups()] == ["ct/7", "vm/1", "vm/3"]


async def test_a_namespace_with_a_group_of_somebody_else_stays_and_so_does_what_it_is_in(pair: Pair) -> None:
    await twice(pair)
    await pair.target.set_owner(group("host/y", AB), "other@pbs")
    await pair.source.delete_namespace(A, groups=True)
    said = Said()
    await push(pair.source, pair.target, said, remove_vanished=True)
    assert await pair.target.namespaces() == [ROOT, A, AB]
    assert await times(pair.target, group("host/x", A)) == [1000, 2000]
    assert any("a/b stays: it holds a/b: host/y" in one for one in said.warnings)


async def test_the_anchor_what_is_above_and_what_is_too_deep_stay(pair: Pair) -> None:
    deep = Namespace.parse("x/old/deeper")
    await write(pair.source, "vm/1", 1000)
    for ns in ("x", "x/old", "x/old/deeper", "x/gone", "other"):
        await write(pair.target, group("vm/9", Namespace.parse(ns)), 1000)
    await push(pair.source, pair.target, remove_vanished=True, target_ns=Namespace.parse("x"), max_depth=1)
    assert [str(ns) for ns in await pair.target.namespaces()] == ["", "other", "x", "x/old", "x/old/deeper"]
    assert await times(pair.target, group("vm/9", deep)) == [1000]
    assert await times(pair.target, group("vm/9", Namespace.parse("x"))) == []


async def test_an_empty_source_removes_nothing_unless_it_must(pair: Pair) -> None:
    await write(pair.target, "vm/1", 1000)
    await write(pair.target, group("vm/1", A), 1000)
    said = Said()
    await push(pair.source, pair.target, said, remove_vanished=True)
    assert await times(pair.target, "vm/1") == [1000]
    assert await pair.target.namespaces() == [ROOT, A]
    assert "the source holds no group" in said.warnings[0]
    await push(pair.source, pair.target, remove_vanished=True, remove_anyway=True)
    assert await pair.target.groups() == []
    assert await pair.target.namespaces() == [ROOT]


async def test_a_group_that_lost_all_its_snapshots_keeps_them_at_the_target(pair: Pair) -> None:
    await twice(pair)
    for ctime in (1000, 2000):
        path = pair.source.store.base / group("vm/1").at(ctime).path
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    said = Said()
    await push(pair.source, pair.target, said, remove_vanished=True)
    assert await times(pair.target, "vm/1") == [1000, 2000]
    assert any("--remove-anyway" in one for one in said.warnings)


async def test_a_source_that_could_not_be_listed_removes_no_group_or_namespace(pair: Pair) -> None:
    await twice(pair)
    await pair.source.forget_group(group("vm/2"))
    await write(pair.target, group("vm/1", Namespace.parse("gone")), 1000)

    async def groups(inner: object, ns: Namespace = ROOT) -> object:
        if ns == AB:
            raise FleeceError("list", "a/b", "no")
        return await pair.source.groups(ns)

    said = Said()
    source = Faulty(pair.source, Faults(), {"groups": groups})
    report = await push(source, pair.target, said, remove_vanished=True)
    assert list(report.failed) == ["namespace 'a/b'"]
    assert len(await pair.target.groups()) == 2
    assert len(await pair.target.namespaces()) == 4
    assert any("vanished groups and namespaces stay: not all of the source" in one for one in said.warnings)


class Hiding(AllRights):
    """One namespace is not to be seen."""

    def reads(self, ns: Namespace) -> bool:
        return ns != AB


class Nothing(AllRights):
    """Neither to remove nor to make anything."""

    def modifies(self, ns: Namespace) -> bool:
        return False

    def prunes(self, ns: Namespace) -> bool:
        return False


async def test_hidden_namespaces_do_not_count_as_vanished(pair: Pair) -> None:
    await twice(pair)
    said = Said()
    await push(pair.source, pair.target, said, remove_vanished=True, rights=Hiding())
    assert await times(pair.target, group("host/y", AB)) == [1000, 2000]
    assert any("is hidden" in one for one in said.warnings)


async def test_without_the_rights_nothing_is_made_or_removed(pair: Pair) -> None:
    await twice(pair)
    await write(pair.source, group("vm/1", Namespace.parse("new")), 1000)
    await write(pair.target, group("vm/1", Namespace.parse("gone")), 1000)
    await pair.source.forget_group(group("vm/2"))
    await pair.source.forget(group("vm/1").at(1000))
    said = Said()
    report = await push(pair.source, pair.target, said, remove_vanished=True, rights=Nothing())
    assert list(report.failed) == ["namespace 'new'"]
    assert await times(pair.target, "vm/1") == [1000, 2000]
    assert await times(pair.target, "vm/2") == [1000, 2000]
    assert [str(ns) for ns in await pair.target.namespaces()] == ["", "a", "a/b", "gone"]
    assert sum("there is no right to remove" in one for one in said.warnings) == 3


async def test_what_the_flags_leave_out_has_not_vanished(pair: Pair) -> None:
    await twice(pair)
    await push(pair.source, pair.target, remove_vanished=True, verified_only=True, encrypted_only=True)
    await pull(pair.source, pair.target, remove_vanished=True, verified_only=True, transfer_last=1)
    assert await times(pair.target, "vm/1") == [1000, 2000]


async def test_a_pull_also_removes_groups_of_a_token_of_the_owner(pair: Pair) -> None:
    for repo in (pair.source, pair.target):
        await write(repo, "vm/1", 1000)
    for name, owner in (("vm/2", "root@pam!tok"), ("vm/3", "root@pam2")):
        await write(pair.target, name, 1000)
        await pair.target.set_owner(group(name), owner)
    await push(pair.source, pair.target, remove_vanished=True)
    assert len(await pair.target.groups()) == 3
    await pull(pair.source, pair.target, remove_vanished=True)
    assert [str(info.group) for info in await pair.target.groups()] == ["vm/1", "vm/3"]


@pytest.mark.parametrize("way", [push, pull])
async def test_a_failed_group_loses_nothing(pair: Pair, way: object) -> None:
    await twice(pair)
    await write(pair.source, "vm/1", 3000)
    await pair.source.forget(group("vm/1").at(1000))

    async def read_blob(inner: Any, name: str, **named: Any) -> bytes:
        if inner.snapshot.ctime != 3000:
            return await inner.read_blob(name, **named)  # type: ignore[no-any-return]
        raise FleeceError("read", name, "the disk is bad")

    source = Faulty(pair.source, Faults(), {"reader.read_blob": read_blob})
    report = await way(source, pair.target, remove_vanished=True)  # type: ignore[operator]
    assert list(report.failed) == ["vm/1"]
    assert await times(pair.target, "vm/1", unfinished=True) == [1000, 2000]


@pytest.mark.parametrize("when", ["snapshots", "reader.manifest"])
@pytest.mark.parametrize("way", [push, pull])
async def test_a_group_that_somebody_else_has_made_since_the_listing_stays_as_it_is(
    pair: Pair, way: Any, when: str
) -> None:
    await write(pair.source, "vm/9", 1000)
    await write(pair.target, "vm/1", 1000)

    async def then(inner: Any, *given: Any, **named: Any) -> Any:
        if not await times(pair.target, "vm/9"):
            await write(pair.target, "vm/9", 500)
            await pair.target.set_owner(group("vm/9"), "other@pbs")
        return await getattr(inner, when.rpartition(".")[2])(*given, **named)

    said = Said()
    report = await way(Faulty(pair.source, Faults(), {when: then}), pair.target, said, remove_vanished=True)
    assert await times(pair.target, "vm/9") == [500]
    assert any("vm/9" in one and "belongs to" in one for one in said.warnings)
    assert list(report.failed) == ([] if way is push and when == "snapshots" else ["vm/9"])


async def test_a_vanished_group_that_somebody_else_has_made_anew_stays(pair: Pair) -> None:
    await twice(pair)
    await pair.source.forget_group(group("vm/2"))

    async def snapshots(inner: Any, *given: Any, **named: Any) -> Any:
        if "other@pbs" not in [info.owner for info in await pair.target.groups()]:
            await pair.target.forget_group(group("vm/2"))
            await write(pair.target, "vm/2", 3000)
            await pair.target.set_owner(group("vm/2"), "other@pbs")
        return await inner.snapshots(*given, **named)

    said = Said()
    report = await pull(
        Faulty(pair.source, Faults(), {"snapshots": snapshots}), pair.target, said, remove_vanished=True
    )
    assert await times(pair.target, "vm/2") == [3000]
    assert report.failed == {}
    assert any("vm/2 stays: it belongs to other@pbs by now" in one for one in said.warnings)
