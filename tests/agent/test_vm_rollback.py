"""Rollback of a running VM's disks: what is written, what its dirty bitmaps say afterwards, and how it fails."""

import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL
from typing import Any, Literal

import pytest
import trio

from agent import vm_rollback
from agent.config import load_config
from agent.places import private_run_dir
from agent.snapshot_archives import open_snapshot
from agent.vm_backup import back_up_vm
from agent.vm_rollback import RolledBack, roll_back
from agent.vm_settings import VmOptions, VmSettings, resolve_vm
from core.errors import FleeceError, FormatError, NotFoundError, TargetError
from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.names import Group, Snapshot
from hypervisor import qmp, rollback
from hypervisor.errors import DiskNameError, QmpLostError, RollbackError, VmStateError
from hypervisor.leftovers import look_for_left
from hypervisor.qmp import Qmp
from hypervisor.state import WRITING, RunState, exclusive
from hypervisor.unix_socket import Peer
from repository.archive import open_cache
from repository.interface import FIXED_CHUNK_SIZE
from repository.local import LocalRepository, open_local
from repository.report import ArchiveReport
from repository.restore import restore_disk
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import PATIENCE_S, RunningQemu, VmDisk

from .conftest import Fleece

CHUNK = FIXED_CHUNK_SIZE
SIZE = 5 * CHUNK + 65536
GROUP = Group.parse("vm/web")


Format = Literal["raw", "qcow2"]


@dataclass
class Bench:
    """A VM with two disks, one of each format, and a store with its backups."""

    repo: LocalRepository
    vm: RunningQemu
    settings: VmSettings
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    kept: dict[int, dict[str, bytes]] = field(default_factory=dict)  #: disks at each backup

    @classmethod
    @asynccontextmanager
    async def open(
        cls, qemu: QemuBinary, store: Path, folder: Path, formats: Sequence[Format], *extra: str
    ) -> AsyncIterator["Bench"]:
        disks = []
        for number, format in enumerate(formats):
            path = folder / f"disk{number}.{format}"
            await trio.run_process([qemu.img, "create", "-q", "-f", format, str(path), str(SIZE)])
            disks.append(VmDisk(path, f"disk{number}", format=format))
        (folder / "scratch").mkdir()
        config = folder / "fleece.toml"
        config.write_text(f'[vm.web]\nscratch = "{folder}/scratch"\nscratch-beside-disks = true\n')
        repo = await open_local(store, name="test")
        try:
            async with RunningQemu.start(qemu, disks, memory_mib=32, extra=extra) as vm:
                settings = resolve_vm(load_config(config, must_exist=True), VmOptions("web", vm.qmp))
                yield cls(repo, vm, settings)
        finally:
            repo.close()

    async def write(self, count: int) -> None:
        """Random writes of the guest."""
        for _ in range(count):
            disk = self.chance.choice(self.vm.disks).id
            length = self.chance.choice([512, 4096, 65536, 300 * 512])
            offset = self.chance.randrange((SIZE - length) // 512) * 512
            how = self.chance.choice(
                [f"-P {self.chance.randrange(1, 255)}", f"-P {self.chance.randrange(1, 255)}", "-z"]
            )
            await self.vm.qemu_io(disk, f"write {how} {offset} {length}")

    async def content(self) -> dict[str, bytes]:
        """The disks as they are now."""
        found = {}
        for disk in self.vm.disks:
            await self.vm.qemu_io(disk.id, "flush")
            raw = disk.path.with_suffix(".copy")
            line = [self.vm.binary.img, "convert", "-U", "-f", disk.format, "-O", "raw", str(disk.path), str(raw)]
            await trio.run_process(line)
            found[f"drive-{disk.id}.img"] = raw.read_bytes()
        return found

    async def backup(self, ctime: int) -> dict[str, ArchiveReport]:
        async with self.repo.backup(GROUP.at(ctime)) as session:
            report = await back_up_vm(self.settings, self.repo, session, ChunkCodec(), Progress())
        self.kept[ctime] = await self.content()
        return {one.name: one for one in report.archives if one.name.startswith("drive-")}

    async def roll_back(
        self, ctime: int, *, exclude: Sequence[str] = (), progress: Progress | None = None, unverified: bool = False
    ) -> tuple[dict[str, RolledBack], bool]:
        snapshot: Snapshot = GROUP.at(ctime)
        async with (
            open_cache(CHUNK) as cache,
            open_snapshot(self.repo, snapshot, ChunkCodec(), cache, Progress()) as opened,
        ):
            disks, runs = await roll_back(
                self.settings, self.repo, opened, (), exclude, progress or Progress(), unverified=unverified
            )
            return {one.name: one for one in disks}, runs

    async def status(self) -> str:
        return str((await self.vm.execute("query-status"))["status"])

    async def nodes(self) -> set[str]:
        return {name for name in await self.vm.nodes() if name.startswith("fleece-")}


@pytest.fixture(autouse=True)
def own_places(monkeypatch: pytest.MonkeyPatch, tmpfs: Path) -> None:
    monkeypatch.setenv("FLEECE_RUN_DIR", str(tmpfs / "r"))


async def test_after_a_hundred_writes_the_disks_are_those_of_the_snapshot(
    qemu: QemuBinary, store_folder: Path, tmpfs: Path
) -> None:
    async with Bench.open(qemu, store_folder, tmpfs, ["qcow2", "raw"]) as bench:
        await bench.write(30)
        await bench.backup(1000)
        await bench.vm.qemu_io("disk0", f"write -P 1 {CHUNK} 4k")
        await bench.vm.qemu_io("disk1", "write -P 1 0 4k")
        await bench.backup(2000)
        await bench.vm.execute("cont")
        await bench.write(100)
        assert await bench.content() != bench.kept[2000]

        disks, runs = await bench.roll_back(2000)
        assert runs
        assert await bench.content() == bench.kept[2000]
        assert await bench.status() == "running"
        assert await bench.nodes() == set()
        assert [event["event"] for event in bench.vm.own_qmp.events if event.get("event") == "RESET"]

        # Only what changed since, or differs: one chunk of each disk for both reasons.
        bench.vm.own_qmp.events.clear()
        again, _ = await bench.roll_back(2000)
        assert {name: one.written for name, one in again.items()} == {name: one.written for name, one in disks.items()}
        report = await bench.backup(3000)
        assert {one.mode.value for one in report.values()} == {"incremental"}
        assert bench.kept[3000] == bench.kept[2000]
        await bench.vm.qemu_io("disk1", f"write -P 9 {2 * CHUNK} 4k")
        older, _ = await bench.roll_back(1000)
        assert await bench.content() == bench.kept[1000]
        assert {name: (one.written, one.reason) for name, one in older.items()} == {
            "drive-disk0.img": (CHUNK, ""),
            "drive-disk1.img": (2 * CHUNK, ""),
        }
        # And the next incremental backup is what the disks hold.
        await bench.write(5)
        report = await bench.backup(4000)
        assert {one.mode.value for one in report.values()} == {"incremental"}
        await bench.roll_back(4000)
        assert await bench.content() == bench.kept[4000]


async def test_without_a_bitmap_everything_is_written(
    distribution: QemuBinary, store_folder: Path, tmpfs: Path
) -> None:
    async with Bench.open(distribution, store_folder, tmpfs, ["raw"]) as bench:
        await bench.write(5)
        await bench.backup(1000)
        for bitmap in await bench.vm.bitmaps("fmt-disk0"):
            remove = {"node": "fmt-disk0", "name": bitmap["name"]}
            await bench.vm.execute("block-dirty-bitmap-remove", remove)
        await bench.write(5)
        disks, runs = await bench.roll_back(1000)
        assert not runs  # it did not before
        assert disks["drive-disk0.img"].written == SIZE
        assert "no dirty bitmap" in disks["drive-disk0.img"].reason
        assert await bench.content() == bench.kept[1000]
        assert await bench.status() == "prelaunch"


async def test_the_empty_copy_of_a_bitmap_on_an_overlay_is_not_believed(
    distribution: QemuBinary, store_folder: Path, tmpfs: Path
) -> None:
    # So libvirt takes an external snapshot: the overlay's bitmap has the name and no bit of the one below.
    async with Bench.open(distribution, store_folder, tmpfs, ["qcow2"]) as bench:
        await bench.write(5)
        await bench.backup(1000)
        await bench.vm.qemu_io("disk0", f"write -P 77 {CHUNK} 64k")
        overlay, vm = tmpfs / "overlay.qcow2", bench.vm
        line = [vm.binary.img, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(vm.disks[0].path), str(overlay)]
        await trio.run_process(line, stderr=DEVNULL)
        file = {"driver": "file", "filename": str(overlay)}
        await vm.execute("blockdev-add", {"driver": "qcow2", "node-name": "over", "file": file, "backing": None})
        actions: list[dict[str, Any]] = [
            {"type": "blockdev-snapshot", "data": {"node": "fmt-disk0", "overlay": "over"}}
        ]
        for one in await vm.bitmaps("fmt-disk0", marks=True):
            data = {"node": "over", "name": one["name"], "granularity": one["granularity"]}
            add = {"type": "block-dirty-bitmap-add", "data": {**data, "disabled": not one["recording"]}}
            actions.append(add)
            if not one["recording"]:  # the mark of the size
                bits = [{"node": "fmt-disk0", "name": one["name"]}]
                merge = {"node": "over", "target": one["name"], "bitmaps": bits}
                actions.append({"type": "block-dirty-bitmap-merge", "data": merge})
        await vm.execute("transaction", {"actions": actions})

        disks, _ = await bench.roll_back(1000)
        assert "new top image" in disks["drive-disk0.img"].reason
        vm.disks = [VmDisk(overlay, "disk0", format="qcow2")]
        assert await bench.content() == bench.kept[1000]


async def test_a_rollback_that_fails_in_the_middle_leaves_the_guest_stopped_without_its_disks(
    qemu: QemuBinary, store_folder: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Bench.open(qemu, store_folder, tmpfs, ["qcow2", "raw"]) as bench:
        await bench.write(20)
        await bench.backup(1000)
        await bench.vm.execute("cont")
        await bench.write(20)

        async def fail(*arguments: Any, **options: Any) -> None:
            if arguments[3] == "drive-disk1.img.fidx":
                raise TargetError("write to", "disk", "it fails on purpose")
            await restore_disk(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(vm_rollback, "restore_disk", fail)
            with pytest.raises(TargetError, match="on purpose") as caught:
                await bench.roll_back(1000)
        assert any("stays stopped" in note for note in caught.value.__notes__)
        assert await bench.status() == "paused"
        # Whoever lets it go on all the same lets it have nothing, not half a disk.
        assert {(await bench.vm.block_info(disk.id))["inserted"]["node-name"] for disk in bench.vm.disks} == {
            "fleece-p0", "fleece-p1",
        }  # fmt: skip
        for work in (bench.backup(2000), bench.roll_back(1000, exclude=["disk0"])):
            with pytest.raises((VmStateError, FleeceError), match=r"a rollback has|the rollback before"):
                await work
        assert await bench.status() == "paused"
        # That it goes on from any state is no word of block jobs.
        await bench.vm.execute("blockdev-add", {"driver": "null-co", "node-name": "null", "size": SIZE})
        job = {"job-id": "job", "device": "fmt-disk1", "target": "null", "sync": "none"}
        await bench.vm.execute("blockdev-backup", job)
        with pytest.raises(VmStateError, match=r"cannot roll back disk disk1: the block job 'job' \(backup\)"):
            await bench.roll_back(1000)
        await bench.vm.execute("block-job-cancel", {"device": "job", "force": True})
        with trio.fail_after(PATIENCE_S):
            while await bench.vm.execute("query-block-jobs"):  # noqa: ASYNC110 - QEMU ends it
                await trio.sleep(0.01)
        disks, runs = await bench.roll_back(1000)
        assert runs
        assert await bench.content() == bench.kept[1000]
        assert await bench.status() == "running"
        assert await bench.nodes() == set()
        await bench.write(3)
        report = await bench.backup(3000)
        assert {one.mode.value for one in report.values()} == {"incremental"}
        await bench.roll_back(3000)
        assert await bench.content() == bench.kept[3000]
        assert all(not one.reason for one in disks.values())


async def test_what_a_killed_rollback_left_is_gone_on_with(
    qemu: QemuBinary, store_folder: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Bench.open(qemu, store_folder, tmpfs, ["raw", "qcow2"]) as bench:
        await bench.write(5)
        await bench.backup(1000)
        await bench.write(5)

        async def killed(*arguments: Any, **options: Any) -> None:
            pass

        with monkeypatch.context() as patched:
            patched.setattr(rollback._Ending, "_end", killed)
            await bench.roll_back(1000)
        assert len(await bench.vm.exports()) == 2
        _, runs = await bench.roll_back(1000)
        assert (runs, await bench.status()) == (False, "prelaunch")  # as before the first one
        assert await bench.vm.exports() == []
        assert await bench.content() == bench.kept[1000]
        assert await bench.nodes() == set()


async def test_a_rollback_that_is_killed_at_any_step_of_its_set_up_is_gone_on_with(
    distribution: QemuBinary, store_folder: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing = ("stop", "blockdev-add", "qom-set", "blockdev-reopen", "nbd-server-start", "block-export-add")
    execute = Qmp.execute

    async def killed(*arguments: Any, **options: Any) -> None:
        pass

    async with Bench.open(distribution, store_folder, tmpfs, ["raw"]) as bench:
        await bench.backup(1000)
        for last in (1, 2, 3, 4, 6, 8):  # those between which something is there and something else is not
            left = last

            async def until_killed(self: Qmp, command: str, *arguments: Any, **options: Any) -> Any:
                nonlocal left
                answer = await execute(self, command, *arguments, **options)
                if command in changing:
                    left -= 1
                    if left < 0:
                        raise QmpLostError("run", command, "killed on purpose")
                return answer

            await bench.write(2)
            with monkeypatch.context() as patched:
                patched.setattr(rollback._Ending, "_end", killed)
                patched.setattr(Qmp, "execute", until_killed)
                with pytest.raises(QmpLostError, match="on purpose"):
                    await bench.roll_back(1000)
            await bench.roll_back(1000)
            assert await bench.nodes() == set(), last
            assert await bench.content() == bench.kept[1000], last


async def test_a_guest_that_was_stopped_by_a_killed_rollback_before_anything_else_goes_on_with_the_next_backup(
    distribution: QemuBinary, store_folder: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def killed(*arguments: Any, **options: Any) -> None:
        raise QmpLostError("run", "it", "killed on purpose")

    async with Bench.open(distribution, store_folder, tmpfs, ["raw"]) as bench:
        await bench.backup(1000)
        await bench.vm.execute("cont")
        with monkeypatch.context() as patched:
            patched.setattr(rollback, "_lead_elsewhere", killed)
            patched.setattr(rollback._Ending, "_end", killed)
            with pytest.raises(QmpLostError, match="on purpose") as caught:
                await bench.roll_back(1000)
        assert any("nothing was written, but the VM stays stopped" in note for note in caught.value.__notes__)
        assert await bench.status() == "paused"
        async with qmp.connect(bench.vm.qmp) as session:
            assert (await look_for_left(session, private_run_dir())).things == []
        await bench.backup(2000)
        assert await bench.status() == "running"


async def test_a_rollback_that_ended_together_with_its_qemu_is_told_whatever_becomes_of_the_next_work(
    distribution: QemuBinary, store_folder: Path, tmpfs: Path
) -> None:
    async with Bench.open(distribution, store_folder, tmpfs, ["raw"]) as bench:
        await bench.backup(1000)
        (tmpfs / "off.raw").write_bytes(bytes(512))
        config = tmpfs / "off.toml"
        config.write_text(f'[vm.off.disks]\ndisk0 = "{tmpfs}/off.raw"\n')
        running, off = bench.settings, resolve_vm(load_config(config, must_exist=True), VmOptions("off"))
        async with qmp.connect(bench.vm.qmp) as session:
            peer = session.peer

        async def back_up(settings: VmSettings, progress: Progress) -> None:
            async with bench.repo.backup(GROUP.at(2000)) as session:
                await back_up_vm(settings, bench.repo, session, ChunkCodec(), progress)

        works: list[Callable[[Progress], Awaitable[object]]] = [
            lambda progress: back_up(running, progress),
            lambda progress: bench.roll_back(1000, progress=progress),
            lambda progress: back_up(off, progress),
        ]
        for work in works:
            with exclusive(private_run_dir(), Peer(999_999_999, 0, 0, 1)) as run:
                await run.save(RunState("/former", WRITING, "0badcafe", 0, 1))
            progress = Progress()
            with exclusive(private_run_dir(), peer), suppress(VmStateError):  # that one is refused
                await work(progress)
            assert ["/former ended in the middle of a rollback" in line for line in progress.warnings] == [True]


async def test_a_machine_that_qemu_does_not_reset_does_not_go_on(
    distribution: QemuBinary, store_folder: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollback, "_RESET_TIMEOUT_S", 0.3)
    async with Bench.open(distribution, store_folder, tmpfs, ["raw"], "-no-reboot", "-no-shutdown") as bench:
        await bench.write(3)
        await bench.backup(1000)
        await bench.vm.execute("cont")
        await bench.write(3)
        progress = Progress()
        _, runs = await bench.roll_back(1000, progress=progress)
        assert (runs, await bench.status()) == (False, "paused")
        assert ["did not reset the machine" in line for line in progress.warnings] == [True]
        assert await bench.nodes() == set()
        assert await bench.content() == bench.kept[1000]


async def test_a_qemu_that_ends_in_the_middle_is_told_then_and_by_the_next_backup(
    distribution: QemuBinary, store_folder: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Bench.open(distribution, store_folder, tmpfs, ["raw"]) as bench:
        await bench.backup(1000)

        async def killed(*arguments: Any, **options: Any) -> None:
            await bench.vm.kill()
            await restore_disk(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(vm_rollback, "restore_disk", killed)
            with pytest.raises(FleeceError) as caught:
                await bench.roll_back(1000)
        (note,) = caught.value.__notes__
        assert note.startswith("the VM's QEMU has ended, and the disks hold a part of the snapshot only")
        async with RunningQemu.start(distribution, bench.vm.disks, memory_mib=32) as vm:
            bench.vm, former = vm, bench.vm
            bench.settings = resolve_vm(load_config(tmpfs / "fleece.toml", must_exist=True), VmOptions("web", vm.qmp))
            for ctime, told in ((2000, True), (3000, False)):
                progress = Progress()
                async with bench.repo.backup(GROUP.at(ctime)) as session:
                    await back_up_vm(bench.settings, bench.repo, session, ChunkCodec(), progress)
                said = f"QMP socket was {former.qmp} ended in the middle of a rollback"
                assert any(said in line for line in progress.warnings) is told


@pytest.mark.parametrize("written", [False, True])
async def test_another_qemu_that_has_the_socket_at_the_end_is_left_alone(
    distribution: QemuBinary, store_folder: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    async with Bench.open(distribution, store_folder, tmpfs, ["raw"]) as bench, AsyncExitStack() as stack:
        await bench.backup(1000)
        await bench.vm.execute("cont")
        others: list[RunningQemu] = []

        async def started_again(*arguments: Any, **options: Any) -> None:
            await bench.vm.kill()
            listening = ["-qmp", f"unix:{bench.vm.qmp},server=on,wait=off"]
            other = await stack.enter_async_context(RunningQemu.start(distribution, [], memory_mib=32, extra=listening))
            others.append(other)
            address = {"type": "unix", "data": {"path": str(tmpfs / "nbd")}}
            await other.execute("nbd-server-start", {"addr": address})
            raise TargetError("write to", "disk", "it fails on purpose")

        monkeypatch.setattr(vm_rollback, "restore_disk" if written else "_differing", started_again)
        with pytest.raises(TargetError, match="on purpose") as caught:
            await bench.roll_back(1000)
        (note,) = caught.value.__notes__
        assert "the VM's QEMU has ended" in note
        assert ("a part of the snapshot only" in note) is written
        (other,) = others
        assert (await other.execute("query-status"))["status"] == "prelaunch"  # it was not told to go on
        assert (tmpfs / "nbd").exists()  # and serves on


async def test_the_end_waits_for_a_client_that_has_the_socket_and_tells_what_is_left_if_it_stays(
    distribution: QemuBinary, store_folder: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    async with Bench.open(distribution, store_folder, tmpfs, ["raw"]) as bench:
        await bench.backup(1000)
        await bench.vm.execute("cont")
        patience: list[float] = []

        def impatient(path: str, timeout_s: float = qmp.CONNECT_TIMEOUT_S) -> AbstractAsyncContextManager[Qmp]:
            patience.append(timeout_s)
            return qmp.connect(path, timeout_s=timeout_s if len(patience) == 1 else 0.2)

        async def taken(*arguments: Any, **options: Any) -> None:
            holder.connect(str(bench.vm.qmp))
            raise TargetError("compare", "disk", "it fails on purpose")

        with monkeypatch.context() as patched:
            patched.setattr(rollback, "connect", impatient)
            patched.setattr(vm_rollback, "_differing", taken)
            with pytest.raises(TargetError, match="on purpose") as caught:
                await bench.roll_back(1000)
        assert patience == [10, 90]
        (note,) = caught.value.__notes__
        assert "nothing was written, but the VM stays stopped, and its devices may be without their disks" in note
        assert await bench.status() == "paused"
        assert (await bench.vm.block_info("disk0"))["inserted"]["node-name"] == "fleece-p0"
        holder.close()
        await bench.roll_back(1000)
        assert (await bench.status(), await bench.nodes()) == ("running", set())


async def test_an_nbd_server_of_somebody_else_is_left_alone_and_a_qemu_of_another_user_gets_a_socket(
    distribution: QemuBinary, store_folder: Path, tmpfs: Path
) -> None:
    # `nobody` may not make a socket in our folder.
    async with Bench.open(distribution, store_folder, tmpfs, ["raw"], "-runas", "nobody") as bench:
        await bench.backup(1000)
        await bench.vm.execute("cont")
        await bench.write(2)
        await bench.vm.execute(
            "nbd-server-start", {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}}
        )
        with pytest.raises(RollbackError, match="running already, for somebody else"):
            await bench.roll_back(1000)
        assert (await bench.status(), await bench.nodes()) == ("running", set())
        await bench.vm.execute("block-export-add", {"type": "nbd", "id": "x", "node-name": "fmt-disk0"})
        await bench.vm.execute("block-export-del", {"id": "x"})
        await bench.vm.execute("nbd-server-stop")
        await bench.roll_back(1000)
        assert await bench.content() == bench.kept[1000]


async def test_what_cannot_be_rolled_back_is_refused_and_the_guest_goes_on(
    distribution: QemuBinary, store_folder: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Bench.open(distribution, store_folder, tmpfs, ["raw"]) as bench:
        await bench.backup(1000)
        await bench.vm.execute("cont")

        async def broken(*arguments: Any) -> None:
            raise TargetError("compare", "disk", "it fails on purpose")

        with monkeypatch.context() as patched:
            patched.setattr(vm_rollback, "_differing", broken)
            with pytest.raises(TargetError, match="on purpose"):
                await bench.roll_back(1000)
        assert await bench.status() == "running"
        assert await bench.nodes() == set()
        await bench.repo.record_verification(GROUP.at(1000), "failed", "")
        with pytest.raises(FormatError, match="its last verification has failed"):
            await bench.roll_back(1000)
        assert await bench.status() == "running"
        await bench.roll_back(1000, unverified=True)
        await bench.repo.record_verification(GROUP.at(1000), "ok", "")
        await bench.vm.execute("blockdev-add", {"driver": "null-co", "node-name": "null", "size": SIZE})
        job = {"job-id": "job", "device": "fmt-disk0", "target": "null", "sync": "full", "speed": 1}
        await bench.vm.execute("blockdev-mirror", job)
        with pytest.raises(VmStateError, match=r"cannot roll back disk disk0: the block job 'job' \(mirror\)"):
            await bench.roll_back(1000)
        assert await bench.status() == "running"
        await bench.vm.execute("block-job-cancel", {"device": "job", "force": True})
        with trio.fail_after(PATIENCE_S):
            while await bench.vm.execute("query-block-jobs"):  # noqa: ASYNC110 - QEMU ends it
                await trio.sleep(0.01)
        await bench.vm.execute("block_resize", {"node-name": "fmt-disk0", "size": SIZE + CHUNK})
        with pytest.raises(DiskNameError, match=f"it has {SIZE + CHUNK} bytes"):
            await bench.roll_back(1000)
        assert await bench.status() == "running"
    other = tmpfs / "other"
    other.mkdir()
    disk = VmDisk(other / "x.raw", "x")
    disk.path.write_bytes(bytes(CHUNK))
    async with RunningQemu.start(distribution, [disk], memory_mib=32) as vm:
        repo = await open_local(store_folder, name="test")
        bench = Bench(
            repo, vm, resolve_vm(load_config(tmpfs / "fleece.toml", must_exist=True), VmOptions("web", vm.qmp))
        )
        with pytest.raises(NotFoundError, match=r"the VM has no such disk \(it has x\)"):
            await bench.roll_back(1000)
        repo.close()


async def test_a_cancelled_rollback_is_an_error_that_tells_how_the_vm_is_left(
    distribution: QemuBinary, store_folder: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Bench.open(distribution, store_folder, tmpfs, ["raw"]) as bench:
        await bench.backup(1000)
        scope = trio.CancelScope()

        async def cancelled(*arguments: Any, **options: Any) -> None:
            scope.cancel()
            await trio.sleep_forever()

        monkeypatch.setattr(vm_rollback, "restore_disk", cancelled)
        with pytest.raises(RollbackError, match="stays stopped"), scope:
            await bench.roll_back(1000)
        assert await bench.nodes() != set()


async def test_the_command_asks_first_and_tells_what_was_written(
    distribution: QemuBinary, stored: Fleece, tmpfs: Path
) -> None:
    disk = VmDisk(tmpfs / "a.raw", "disk0")
    disk.path.write_bytes(bytes(CHUNK))
    words = [f"drive-disk0.img:{disk.path}", "--backup-id", "web", "--backup-type", "vm"]
    snapshot = (await trio.to_thread.run_sync(lambda: stored.json("backup", *words)))["snapshot"]
    async with RunningQemu.start(distribution, [disk], memory_mib=32) as vm:
        await vm.qemu_io("disk0", "write -P 5 0 64k")
        line = ("vm", "restore", "vm/web/latest", "--rollback", "--qmp", str(vm.qmp))
        refused = await trio.to_thread.run_sync(lambda: stored(*line))
        assert refused.code == 2
        assert "give --yes" in refused.err
        document = await trio.to_thread.run_sync(lambda: stored.json(*line, "--yes"))
        assert (document["snapshot"], document["running"]) == (snapshot, False)
        (told,) = document["disks"]
        assert (told["name"], told["mode"], told["written"]) == ("drive-disk0.img", "full", CHUNK)
        await vm.qemu_io("disk0", "read -P 0 0 4M")
    assert disk.path.read_bytes() == bytes(CHUNK)
