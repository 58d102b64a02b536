"""Jobs of type backup, run in this process: what they choose, their phases, retries, limits, results, cancellation."""

import socket
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from agent import vm_backup
from agent.config import Config, parse_config
from agent.job_sections import BackupJob
from agent.job_store import JobStore, Run
from agent.jobs import FailedJobError, run_job
from agent.registry import Registry
from agent.slots import Slots
from agent.vm_choice import choose_vms
from core.errors import FleeceError, NotFoundError
from core.progress import Progress
from repository.local import open_local
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk

VMS = """
[vm.web]
id = "101"
tags = ["prod", "public"]
qmp = "{run}/web.qmp"
[vm.db]
tags = ["prod"]
qmp = "{run}/db.qmp"
[vm.test-1]
id = "201"
qmp = "{run}/test-1.sock"
"""


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Path]:
    """A folder with QMP sockets: of two VMs of the configuration and of one that it does not know."""
    sockets = []
    for name in ("web.qmp", "db.qmp", "other.qmp"):
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.bind(str(tmp_path / name))
        one.listen()
        sockets.append(one)
    (tmp_path / "no-socket.qmp").touch()
    yield tmp_path
    for one in sockets:
        one.close()


def chosen(folder: Path, vm: list[str], exclude: list[str] | None = None) -> tuple[list[str], list[str], list[str]]:
    choice = choose_vms(parse_config(VMS.format(run=folder), "f"), vm, exclude or [])
    return [one.label for one in choice.vms], choice.missing, choice.idle


def test_virtual_machines_are_chosen_by_name_id_tag_socket_and_pattern_without_the_excluded(listening: Path) -> None:
    assert chosen(listening, ["db", "web"]) == (["web", "db"], [], [])
    assert chosen(listening, ["*"], ["test-*"]) == (["web", "db"], [], [])
    assert chosen(listening, ["id:?01"]) == (["web", "test-1"], [], [])
    assert chosen(listening, ["tag:prod"], ["tag:publ*"]) == (["db"], [], [])
    assert chosen(listening, ["name:web", "id:201", "tag:none*", "gone"]) == (
        ["web", "test-1"],
        ["gone"],
        ["tag:none*"],
    )
    # A socket of a configured VM is that VM, whatever it is called; what is no socket is none.
    assert chosen(listening, [f"socket:{listening}/*.qmp"]) == (["web", "db", "other"], [], [])
    assert chosen(listening, [f"socket:{listening}/*.qmp"], ["web", "id:oth*"]) == (["db"], [], [])
    assert chosen(listening, ["*", f"socket:{listening}/*"], [f"socket:{listening}/db*"])[0] == [
        "web",
        "test-1",
        "other",
    ]
    one = choose_vms(Config(), [f"socket:{listening}/away.sock"], []).vms[0]
    assert (one.label, one.options.id, one.certain) == ("away", "away", True)


class Job:
    """A job that is run in this process, with a hook that writes down how it is called."""

    def __init__(self, folder: Path, store: Path, text: str, rest: str = "", *, hooked: bool = True) -> None:
        self.folder, self.store = folder, store
        hook = folder / "hook"
        # `fail-PHASE` makes that phase fail, `fail-PHASE-ID` that of one guest.
        hook.write_text(
            f'#!/bin/sh\necho "$*|$VMTYPE|$HOSTNAME|$STOREID|$TARGET|$FLEECE_ERROR|$LOGFILE" >> {folder}/calls\n'
            f'[ -e "{folder}/fail-$1" ] || [ -e "{folder}/fail-$1-$3" ] && exit 1\nexit 0\n'
        )
        hook.chmod(0o755)
        (folder / "hosts").write_text("one\n")
        named = f'hook = "{hook}"' if hooked else ""
        self.config = parse_config(
            f'default-repository = "main"\n{named}\n{rest}\n[repository.main]\npath = "{store}"\n'
            f'[job.night]\ntype = "backup"\n{text}\n',
            "f",
        )
        self.progress = Progress()

    async def run(self) -> Run:
        section = self.config.job["night"]
        assert isinstance(section, BackupJob)
        registry = Registry(self.folder / "datastores.toml")
        return await run_job("night", section, self.config, registry, self.runs, self.progress)

    @property
    def runs(self) -> JobStore:
        return JobStore(self.folder / "state", "night")

    @property
    def calls(self) -> list[list[str]]:
        return [line.split("|") for line in (self.folder / "calls").read_text().splitlines()]

    @property
    def phases(self) -> list[str]:
        return [call[0] for call in self.calls]

    async def snapshots(self, group: str = "host/box") -> list[Any]:
        from datastore.names import ROOT, Group

        repository = await open_local(self.store, name="main")
        try:
            found = await repository.snapshots(ROOT, unfinished=True)
            assert all(info.finished for info in found), "something half is left"
            return [info.snapshot for info in found if info.snapshot.group == Group.parse(group, ROOT)]
        finally:
            repository.close()


@pytest.fixture
def make(tmp_path: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    monkeypatch.setenv("FLEECE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FLEECE_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return lambda text, rest="", **options: Job(tmp_path, store_folder, text, rest, **options)


def archives(job_folder: Path) -> str:
    return f'archives = ["hosts.conf:{job_folder}/hosts"]\nbackup-id = "box"\n'


async def test_folders_and_files_become_a_snapshot_and_the_hook_hears_of_each_phase(
    make: Callable[..., Job], tmp_path: Path
) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/a.txt").write_text("a")
    (tmp_path / "tree/b.tmp").write_text("b")
    job = make(
        f'archives = ["hosts.conf:{tmp_path}/hosts", "tree.pxar:{tmp_path}/tree"]\nbackup-id = "box"\n'
        'exclude = ["*.tmp"]\nnotes = "by night"\n'
    )
    run = await job.run()
    (snapshot,) = await job.snapshots()
    assert (run.state, run.error) == ("ok", None)
    assert run.result is not None
    assert {key: run.result[key] for key in ("ok", "failed", "skipped")} == {"ok": 1, "failed": 0, "skipped": 0}
    (guest,) = run.result["guests"]
    assert (guest["guest"], guest["state"], guest["snapshot"], guest["attempts"]) == ("box", "ok", str(snapshot), 1)
    log = str(job.runs.log_path(run.id))
    assert job.calls == [
        ["job-init", "", "", "main", "", "", ""],
        ["job-start", "", "", "main", "", "", ""],
        ["backup-start snapshot box", "host", "box", "main", "", "", ""],
        ["backup-end snapshot box", "host", "box", "main", str(snapshot), "", ""],
        ["log-end snapshot box", "host", "box", "main", str(snapshot), "", log],
        ["job-end", "", "", "main", "", "", ""],
    ]
    assert "tree.pxar: 2 entries" in job.runs.read_log(run.id)
    # One group is backed up once a second.
    assert (await job.run()).state == "ok"
    assert len(await job.snapshots()) == 2


@pytest.mark.parametrize(
    ("phase", "expected", "listed"),
    [
        ("job-init", ["job-init", "job-abort"], 0),
        ("job-start", ["job-init", "job-start", "job-abort"], 0),
        ("backup-start", ["backup-start", "backup-abort", "log-end", "job-end"], 0),
        ("backup-end", ["backup-start", "backup-end", "backup-abort", "log-end", "job-end"], 1),
        ("log-end", ["backup-start", "backup-end", "log-end", "job-end"], 1),
        ("job-end", ["backup-end", "log-end", "job-end", "job-abort"], 1),
    ],
)
async def test_a_phase_that_fails_fails_what_it_belongs_to_and_nothing_is_tried_again(
    make: Callable[..., Job], tmp_path: Path, phase: str, expected: list[str], listed: int
) -> None:
    job = make(archives(tmp_path) + "retries = 3\n")
    (tmp_path / f"fail-{phase}").touch()
    if phase == "log-end":
        assert (await job.run()).state == "ok"
        assert "not heeded" in job.runs.read_log(job.runs.runs()[-1].id)
    else:
        with pytest.raises(FleeceError):
            await job.run()
        assert job.runs.runs()[-1].state == "failed"
    assert [text.split()[0] for text in job.phases][-len(expected) :] == expected
    assert len(await job.snapshots()) == listed
    if phase == "backup-end":
        result = job.runs.runs()[-1].result
        assert result is not None
        assert result["guests"][0]["snapshot"] == str((await job.snapshots())[0])
        assert "exit code 1" in job.calls[-3][5]


async def test_what_fails_is_tried_again_after_a_while_and_only_then_counts(
    make: Callable[..., Job], tmp_path: Path, autojump_clock: MockClock
) -> None:
    job = make(
        archives(tmp_path) + 'retries = 2\nretry-wait = "10m"\n', hooked=False
    )  # the clock would not wait for it
    (tmp_path / "hosts").unlink()
    began = trio.current_time()
    with pytest.raises(FailedJobError, match=r"cannot back up box: failed"):
        await job.run()
    assert 1200 <= trio.current_time() - began < 1300
    (run,) = job.runs.runs()
    assert run.result is not None
    assert (run.state, run.result["guests"][0]["attempts"]) == ("failed", 3)
    assert "No such file" in run.result["guests"][0]["error"]
    assert job.runs.read_log(run.id).count("attempt") == 2


async def test_a_guest_that_fails_stops_no_other(make: Callable[..., Job], listening: Path) -> None:
    vms = VMS.format(run=listening) + f'[vm.test-1.disks]\nroot = "{listening}/root.img"\n'
    (listening / "root.img").write_bytes(b"\x11" * 4096)
    job = make(f'vm = ["gone", "tag:x*", "id:2*", "test-*"]\n{archives(listening)}', vms)
    with pytest.raises(FailedJobError, match="cannot back up gone: failed"):
        await job.run()
    (run,) = job.runs.runs()
    assert run.result is not None
    assert [(one["guest"], one["state"]) for one in run.result["guests"]] == [
        ("gone", "failed"), ("test-1", "ok"), ("box", "ok"),
    ]  # fmt: skip
    assert run.warnings == ["tag:x* matches no virtual machine", "gone: the configuration has no such virtual machine"]
    # It does not run: mode stop, and nothing is stopped or started.
    assert [text for text in job.phases if "201" in text] == [
        "backup-start stop 201", "backup-end stop 201", "log-end stop 201",
    ]  # fmt: skip


async def test_a_vm_that_only_matches_and_does_not_run_is_left_out(make: Callable[..., Job], tmp_path: Path) -> None:
    job = make('vm = ["*"]\n', VMS.format(run=tmp_path))
    run = await job.run()
    assert run.result is not None
    assert (run.state, run.result["skipped"]) == ("warnings", 3)
    assert run.warnings == [
        "nothing was backed up: none of the VMs that are chosen runs, and nothing says where their disks are"
    ]
    job = make('vm = ["web"]\n', VMS.format(run=tmp_path))
    with pytest.raises(FailedJobError, match="cannot back up web"):
        await job.run()
    with pytest.raises(NotFoundError, match="chooses no virtual machine"):
        await make('vm = ["none*"]\n', VMS.format(run=tmp_path)).run()
    job = make('vm = ["*"]\n', VMS.format(run=tmp_path).replace('"201"', '"101"'))
    with pytest.raises(FailedJobError, match="test-1"):
        await job.run()
    assert "another guest of this job has that id" in job.progress.warnings[-1]


async def test_a_cancelled_job_leaves_nothing_half_and_tells_the_hook(
    make: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repository.backup import SnapshotWriter

    begun = trio.Event()

    async def stuck(self: SnapshotWriter, name: str, data: bytes) -> None:
        begun.set()
        await trio.sleep_forever()

    monkeypatch.setattr(SnapshotWriter, "add_blob", stuck)
    job = make(archives(tmp_path))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.run)
        await begun.wait()
        nursery.cancel_scope.cancel()
    (run,) = job.runs.runs()
    assert run.state == "interrupted"
    assert await job.snapshots() == []
    assert [text.split()[0] for text in job.phases][2:] == ["backup-start", "backup-abort", "log-end", "job-abort"]


async def test_no_more_run_at_a_time_than_the_limits_allow(
    make: Callable[..., Job], listening: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    vms = "".join(
        f'[vm.v{number}]\n[vm.v{number}.disks]\nroot = "{listening}/root.img"\n' for number in range(5)
    )  # fmt: skip
    counts: list[int] = []
    running, most, full = 0, 0, trio.Event()

    async def counted(*arguments: Any, **options: Any) -> None:
        nonlocal running
        running += 1
        counts.append(running)
        if running == most:
            full.set()
        await full.wait()
        running -= 1

    monkeypatch.setattr(vm_backup, "_back_up_stopped", counted)
    for limits, parallel, most in (("host = 2", 4, 2), ("store = 1", 4, 1), ("", 3, 3)):
        counts.clear()
        full = trio.Event()
        job = make(f'vm = ["*"]\nparallel = {parallel}\n', f"[limits]\n{limits}\n{vms}", hooked=False)
        with suppress(FailedJobError):  # the double finishes no snapshot
            await job.run()
        assert (len(counts), max(counts)) == (5, most)


async def test_a_slot_is_one_of_the_host_and_one_of_the_store_and_is_free_again(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    slots = Slots(tmp_path / "slots", host=2, store=1)
    said: list[str] = []
    async with slots.one("a"), slots.one("b"):
        with trio.move_on_after(10) as waited:
            async with slots.one("c", said.append):
                raise AssertionError("the host has two slots")
        assert waited.cancelled_caught
        assert len(said) == 1
    async with slots.one("a"):
        with trio.move_on_after(10) as waited:
            async with slots.one("a"):
                raise AssertionError("the store has one slot")
        assert waited.cancelled_caught
        async with slots.one("b"):  # and what waited in vain holds nothing
            pass


async def test_the_phases_around_the_instant_come_when_the_guest_goes_on_again(
    make: Callable[..., Job], listening: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vms = VMS.format(run=listening).replace('"101"', f'"101"\nfiles = ["hosts.conf:{listening}/hosts"]')
    job = make('vm = ["web"]\n', vms)
    order: list[str] = []

    @asynccontextmanager
    async def view(*arguments: Any, **options: Any) -> Any:
        order.append(f"set up after {job.phases[-1]}")
        try:
            flavour = SimpleNamespace(value="stock")
            yield SimpleNamespace(left_out=(), sources=(), frozen_s=0.0, commit=lambda: None, flavour=flavour)
        finally:
            order.append(f"undone after {job.phases[-1]}")

    monkeypatch.setattr(vm_backup, "frozen_view", view)
    try:
        run = await job.run()
    except FleeceError:
        raise AssertionError(job.runs.read_log(job.runs.runs()[-1].id)) from None
    assert run.result is not None
    snapshot = run.result["guests"][0]["snapshot"]
    assert [call[0] for call in job.calls][2:-1] == [
        "backup-start snapshot 101", "pre-stop snapshot 101", "pre-restart snapshot 101", "post-restart snapshot 101",
        "backup-end snapshot 101", "log-end snapshot 101",
    ]  # fmt: skip
    assert order == ["set up after pre-stop snapshot 101", "undone after post-restart snapshot 101"]
    assert [call[4] for call in job.calls][3:7] == [snapshot] * 4
    assert job.calls[3][1:4] == ["qemu", "web", "main"]

    for phase, set_up in (("pre-stop", False), ("pre-restart", True), ("post-restart", True)):
        (listening / f"fail-{phase}-101").touch()
        order.clear()
        with pytest.raises(FailedJobError):
            await job.run()
        assert [text.split()[0] for text in job.phases][-4:] == [phase, "backup-abort", "log-end", "job-end"]
        assert len(order) == 2 * set_up
        (listening / f"fail-{phase}-101").unlink()
    assert [str(one) for one in await job.snapshots("vm/101")] == [snapshot]


@pytest.mark.qemu
async def test_a_hook_that_fails_after_the_instant_leaves_a_real_vm_as_it_was_and_the_next_backup_incremental(
    make: Callable[..., Job], qemu: QemuBinary, tmpfs: Path, tmp_path: Path
) -> None:
    with (tmpfs / "a.raw").open("wb") as file:
        file.truncate(8 << 20)
    (tmpfs / "scratch").mkdir()
    async with RunningQemu.start(qemu, [VmDisk(tmpfs / "a.raw", "disk0")], memory_mib=64) as vm:
        await vm.qemu_io("disk0", "write -P 0x11 0 8M")
        before = await vm.nodes()
        section = f'[vm.web]\nqmp = "{vm.qmp}"\nscratch = "{tmpfs}/scratch"\nscratch-beside-disks = true\n'
        job = make('vm = ["web"]\n', section)
        first = await job.run()
        assert first.result is not None
        assert first.result["guests"][0]["reasons"] == ["drive-disk0.img: first backup of this group"]
        await vm.qemu_io("disk0", "write -P 0x22 4M 64k")
        (tmp_path / "fail-post-restart").touch()
        with pytest.raises(FailedJobError):
            await job.run()
        assert (await vm.nodes(), await vm.exports()) == (before, [])
        (tmp_path / "fail-post-restart").unlink()
        last = await job.run()
        assert last.result is not None
        (guest,) = last.result["guests"]
        assert guest["reasons"] == []
        assert 4 << 20 <= guest["read"] < 5 << 20
    assert len(await job.snapshots("vm/web")) == 2
