"""Push to a server and pull from one: the calls that the reference makes, and what a server gets to see."""

import os

import pytest
import trio
import trio.testing

from core.errors import FleeceError
from datastore.names import CLIENT_LOG_NAME, Group, Namespace
from repository.interface import Repository
from repository.remote.errors import RemoteError
from tests.repository.sync.conftest import Pair
from tests.support.pbs_double import PbsDouble
from tests.support.remote import remote
from tests.support.snapshots import CODEC, read_image, write_snapshot
from tests.support.syncs import SERVER_CHUNK, Said, pull, push, times, write

GROUP = Group.parse("vm/100")
IMAGE = os.urandom(1000)
LARGE = bytes([1]) * SERVER_CHUNK + bytes([2]) * SERVER_CHUNK + IMAGE
FILES = {"drive.img.fidx": LARGE, "vm.conf.blob": b"x"}


async def filled(source: Repository) -> None:
    """Two snapshots, of which the first one has a log."""
    await write_snapshot(source, GROUP, 1000, FILES, chunk_size=SERVER_CHUNK)
    await source.upload_log(GROUP.at(1000), CODEC.encode_blob(b"log"))
    changed = {**FILES, "drive.img.fidx": LARGE[:SERVER_CHUNK] + bytes([3]) * SERVER_CHUNK + IMAGE}
    await write_snapshot(source, GROUP, 2000, changed, chunk_size=SERVER_CHUNK)


def calls(double: PbsDouble) -> list[str]:
    """What was asked, in order, as method and last part of the path."""
    return [f"{asked.method} {asked.path.rpartition('/')[2]}" for asked in double.asked]


async def test_the_calls_of_a_push_are_those_of_the_reference(pair: Pair) -> None:
    await filled(pair.source)
    double = PbsDouble()
    async with remote(double) as target:
        report = await push(pair.source, target)
        assert report.failed == {}
        assert [one.chunks_sent for one in report.snapshots] == [3, 1]
        upload = ["POST fixed_index", *["POST fixed_chunk"] * 3, "PUT fixed_index", "POST fixed_close"]
        # PBS asks for the previous manifest without asking for its time first: the one call that we make besides.
        assert calls(double) == [
            "GET version", "GET namespace", "GET groups", "GET snapshots",
            "GET backup", "GET previous_backup_time", *upload, "POST blob", "POST blob", "POST blob", "POST finish",
            "GET backup", "GET previous_backup_time", "GET previous", "GET previous", "POST fixed_index",
            "POST fixed_chunk", "PUT fixed_index", "POST fixed_close", "POST blob", "POST blob", "POST finish",
        ]  # fmt: skip
        blobs = [asked.parameters["file-name"] for asked in double.asked if asked.path == "/blob"]
        assert blobs == ["vm.conf.blob", CLIENT_LOG_NAME, "index.json.blob", "vm.conf.blob", "index.json.blob"]
        double.asked.clear()
        assert (await push(pair.source, target)).snapshots == []
        assert calls(double) == ["GET namespace", "GET groups", "GET snapshots"]  # the version is known
        assert await read_image(target, GROUP.at(1000), "drive.img.fidx") == LARGE
    assert {info.owner for info in await pair.source.groups()} == {"root@pam"}


async def test_a_push_makes_namespaces_and_removes_what_vanished(pair: Pair) -> None:
    ns = Namespace.parse("a/b")
    await write(pair.source, Group.parse("host/x", ns), 1000)
    await write(pair.source, GROUP, 1000, 2000)
    double = PbsDouble()
    async with remote(double) as target:
        await push(pair.source, target)
        assert [str(one) for one in await target.namespaces()] == ["", "a", "a/b"]
        await write(pair.source, "vm/1", 1000)
        await pair.source.delete_namespace(Namespace.parse("a"), groups=True)
        await pair.source.forget_group(GROUP)
        said = Said()
        report = await push(pair.source, target, said, remove_vanished=True)
        assert report.failed == {}
        assert (report.removed_snapshots, len(report.removed_groups)) == (3, 2)
        assert await target.namespaces() == [Namespace()]
        assert [str(info.group) for info in await target.groups()] == ["vm/1"]


async def test_a_server_that_is_too_old_for_namespaces_is_refused(pair: Pair) -> None:
    async with remote(PbsDouble()) as target:
        target._version = (2, 1, 9)
        with pytest.raises(FleeceError, match=r"its version 2\.1\.9 is older than 2\.2\.0"):
            await push(pair.source, target)


async def test_the_calls_of_a_pull_are_those_of_the_reference(pair: Pair) -> None:
    await filled(pair.source)
    double = PbsDouble()
    async with remote(double) as far:
        await push(pair.source, far)
        double.asked.clear()
        report = await pull(far, pair.target)
        assert report.failed == {}
        assert [one.chunks_sent for one in report.snapshots] == [3, 1]
        assert calls(double) == [
            "GET namespace", "GET groups", "GET snapshots",
            "GET reader", "GET download", "GET download", "GET chunk", "GET chunk", "GET chunk", "GET download",
            "GET download", "GET reader", "GET download", "GET download", "GET chunk", "GET download", "GET download",
        ]  # fmt: skip
        for ctime in (1000, 2000):
            snapshot = GROUP.at(ctime)
            image = await read_image(pair.source, snapshot, "drive.img.fidx")
            assert await read_image(pair.target, snapshot, "drive.img.fidx") == image
        double.asked.clear()
        assert (await pull(far, pair.target)).snapshots == []
        again = ["GET reader", "GET download", "GET download"]
        assert calls(double) == ["GET namespace", "GET groups", "GET snapshots", *again]


async def test_a_pull_without_depth_asks_for_no_namespaces(pair: Pair) -> None:
    await write(pair.source, GROUP, 1000)
    double = PbsDouble()
    async with remote(double) as far:
        await push(pair.source, far)
        double.asked.clear()
        await pull(far, pair.target, max_depth=0)
        assert calls(double)[:2] == ["GET groups", "GET snapshots"]


async def test_a_push_that_is_cut_at_any_frame_leaves_nothing_half_and_goes_on(pair: Pair) -> None:
    await write_snapshot(pair.source, GROUP, 1000, {"d.img.fidx": IMAGE}, chunk_size=SERVER_CHUNK)
    double = PbsDouble()
    async with remote(double) as target:
        await push(pair.source, target)
    frames = double.frames
    assert frames > 10
    for cut in range(1, frames + 1):
        double = PbsDouble()
        async with remote(double) as target:
            double.cut_at = cut
            try:
                report = await push(pair.source, target)
            except RemoteError:
                report = None
            double.cut_at = None
            listed = await times(target, GROUP, unfinished=True)
            assert listed in ([], [1000])
            if report is not None and not report.failed:
                assert listed == [1000]
            assert double.busy == set()
            assert (await push(pair.source, target)).failed == {}
            assert await read_image(target, GROUP.at(1000), "d.img.fidx") == IMAGE


async def test_a_pull_that_is_cut_at_any_frame_goes_on_over_another_connection(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No clock that jumps: it would end the time limits of threads that write here.
    monkeypatch.setattr("repository.remote.reader._FIRST_PAUSE_S", 0.0)
    await write_snapshot(pair.source, GROUP, 1000, {"d.img.fidx": IMAGE, "vm.conf.blob": b"x"}, chunk_size=SERVER_CHUNK)
    await pair.source.upload_log(GROUP.at(1000), CODEC.encode_blob(b"log"))
    double = PbsDouble()
    async with remote(double) as source:
        await push(pair.source, source)
        before = double.frames
        assert (await pull(source, pair.target)).failed == {}
        frames = double.frames - before
        assert frames > 10
        for cut in range(1, frames + 1):
            await pair.target.forget_group(GROUP)
            double.cut_at = double.frames + cut
            try:
                failed = (await pull(source, pair.target)).failed
            except RemoteError:
                failed = {"": ""}
            was_cut, double.cut_at = double.cut_at is None, None
            listed = [info for info in await pair.target.snapshots() if info.snapshot.group == GROUP]
            assert was_cut or not failed
            if failed:
                assert listed == []
                assert (await pull(source, pair.target)).failed == {}
            assert await read_image(pair.target, GROUP.at(1000), "d.img.fidx") == IMAGE
            folder = pair.target.store.base / GROUP.at(1000).path
            assert (folder / CLIENT_LOG_NAME).is_file()
            await trio.testing.wait_all_tasks_blocked()  # the server has noticed that the connection is closed
            assert all(one.readers == 0 for one in double.folders.values())
