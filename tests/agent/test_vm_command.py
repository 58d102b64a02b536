"""`fleece vm` against a real QEMU: the test plays the guest, the command runs in a process of its own."""

import contextlib
import errno
import json
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import trio

from agent.config import Config
from agent.libvirt_vm import check_idle
from agent.vm_backup import is_running
from agent.vm_settings import VmOptions, resolve_vm
from hypervisor.errors import FleecingError
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk
from tests.support.scripted_qmp import ScriptedAgent, ScriptedQmp

from .conftest import Answer, Fleece

MIB = 1 << 20
pytestmark = pytest.mark.qemu


@pytest.fixture
async def vm(qemu: QemuBinary, tmpfs: Path) -> AsyncIterator[RunningQemu]:
    """A QEMU with a qcow2 disk of 24 MiB and a raw one of 10 MiB, both with data."""
    await trio.run_process([qemu.img, "create", "-q", "-f", "qcow2", str(tmpfs / "a.qcow2"), "24M"])
    with (tmpfs / "b.raw").open("wb") as file:
        file.truncate(10 * MIB)
    disks = [VmDisk(tmpfs / "a.qcow2", "disk0", format="qcow2"), VmDisk(tmpfs / "b.raw", "disk1", bus="virtio-scsi")]
    async with RunningQemu.start(qemu, disks, memory_mib=64) as running:
        await running.qemu_io("disk0", "write -P 0x11 0 8M")
        await running.qemu_io("disk1", "write -P 0x22 0 10M")
        yield running


@pytest.fixture
def configured(stored: Fleece, tmpfs: Path) -> Fleece:
    """A scratch folder that may lie beside the disks, as it must in a test; without a reserve of free space."""
    (tmpfs / "scratch").mkdir()
    (stored.home / "fleece.toml").write_text(f'[vm.web]\nscratch = "{tmpfs}/scratch"\nscratch-beside-disks = true\n')
    return stored


async def command(fleece: Fleece, *arguments: str | Path) -> Answer:
    """Run it without holding up the test's own talk with QEMU."""
    return await trio.to_thread.run_sync(lambda: fleece(*arguments))


async def document(fleece: Fleece, *arguments: str | Path, code: int = 0) -> Any:
    answer = await command(fleece, *arguments, "--output", "json")
    assert answer.code == code, answer.err
    return answer.document


async def exported(vm: RunningQemu, *, disks: int) -> None:
    """Wait until a backup reads its frozen views."""
    while sum(export["id"].startswith("fleece-e") for export in await vm.exports()) < disks:  # noqa: ASYNC110 - QEMU must be asked
        await trio.sleep(0.02)


def archives(report: Any) -> dict[str, Any]:
    return {archive["name"]: archive for archive in report["archives"]}


async def test_the_second_backup_reads_what_changed_and_show_said_so_before(
    vm: RunningQemu, configured: Fleece, tmpfs: Path
) -> None:
    target = ("--qmp", vm.qmp, "--id", "web")
    before = await vm.nodes()
    shown = await document(configured, "vm", "show", *target)
    assert [(disk["name"], disk["device"], disk["node"], disk["size"]) for disk in shown["disks"]] == [
        ("drive-disk0.img", "disk0", "fmt-disk0", 24 * MIB),
        ("drive-disk1.img", "disk1", "fmt-disk1", 10 * MIB),
    ]
    assert shown["disks"][0]["next"] == {"mode": "full", "reason": "first backup of this group", "bytes": 24 * MIB}
    first = await document(configured, "vm", "backup", *target)
    assert {name: archive["mode"] for name, archive in archives(first).items()} == {
        "drive-disk0.img": "full", "drive-disk1.img": "full", "qemu-command.json": "full",
    }  # fmt: skip
    assert first["frozen-s"] == 0

    await vm.qemu_io("disk0", "write -P 0x33 5M 64k")
    shown = await document(configured, "vm", "show", *target)
    assert [disk["next"] for disk in shown["disks"]] == [
        {"mode": "incremental", "reason": None, "bytes": 4 * MIB},
        {"mode": "incremental", "reason": None, "bytes": 0},
    ]
    plan = await document(configured, "vm", "backup", *target, "--dry-run")
    assert [archive["read"] for archive in plan["archives"]] == [4 * MIB, 0]
    second = archives(await document(configured, "vm", "backup", *target))
    assert (second["drive-disk0.img"]["mode"], second["drive-disk0.img"]["reason"]) == ("incremental", None)
    assert (second["drive-disk0.img"]["read"], second["drive-disk0.img"]["dirty"]) == (4 * MIB, 4 * MIB)
    assert second["drive-disk1.img"]["read"] == 0
    assert await vm.nodes() == before

    for disk in ("disk0", "disk1"):
        answer = await command(configured, "restore", "vm/web/latest", f"drive-{disk}.img", tmpfs / f"{disk}.out")
        assert answer.code == 0, answer.err
    expected = bytearray(b"\x11" * 8 * MIB + bytes(16 * MIB))
    expected[5 * MIB : 5 * MIB + 65536] = b"\x33" * 65536
    assert (tmpfs / "disk0.out").read_bytes() == expected
    assert (tmpfs / "disk1.out").read_bytes() == b"\x22" * 10 * MIB


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_an_interrupted_backup_leaves_the_vm_as_it_was_at_the_latest_after_the_next_one(
    number: signal.Signals,
    vm: RunningQemu,
    configured: Fleece,
    tmpfs: Path,
    ended: Callable[["Popen[str]"], "Popen[str]"],
) -> None:
    target = ("--qmp", vm.qmp, "--id", "web")
    before = await vm.nodes()
    await document(configured, "vm", "backup", *target)
    await vm.qemu_io("disk0", "write -P 0x55 0 8M")
    running = ended(configured.start("vm", "backup", *target, "--bwlimit", "512k"))
    with trio.fail_after(60):
        await exported(vm, disks=2)
        running.send_signal(number)
        await trio.to_thread.run_sync(running.wait)
    if number is signal.SIGTERM:
        assert running.returncode == 1
        assert (await vm.nodes(), await vm.exports()) == (before, [])
        assert list((tmpfs / "scratch").iterdir()) == []
        assert len(configured.json("list", "--unfinished")) == 1
    else:
        left = await vm.nodes(), await vm.exports(), await vm.bitmaps("fmt-disk0")
        assert left[1] != []
        plan = await command(configured, "vm", "backup", *target, "--dry-run", "--output", "json")
        assert plan.code == 3, plan
        assert [(disk["mode"], disk["read"]) for disk in plan.document["archives"]] == [
            ("incremental", 8 * MIB), ("incremental", 0),
        ]  # fmt: skip
        assert "another run was killed; a backup first removes what it left: the exports" in plan.err
        assert "fleece-c0" in plan.err
        assert (await vm.nodes(), await vm.exports(), await vm.bitmaps("fmt-disk0")) == left
    report = await document(configured, "vm", "backup", *target, code=0 if number is signal.SIGTERM else 3)
    disk = archives(report)["drive-disk0.img"]
    assert (disk["mode"], disk["read"]) == ("incremental", 8 * MIB)
    assert bool(report["warnings"]) == (number is signal.SIGKILL)
    assert (await vm.nodes(), await vm.exports()) == (before, [])
    assert list((tmpfs / "scratch").iterdir()) == []
    assert configured.json("vm", "cleanup", *target) == {"done": []}


async def test_cleanup_removes_bitmaps_on_demand_only(vm: RunningQemu, configured: Fleece) -> None:
    target = ("--qmp", vm.qmp, "--id", "web")
    await document(configured, "vm", "backup", *target)
    assert await document(configured, "vm", "cleanup", "--qmp", vm.qmp) == {"done": []}
    assert len(await vm.bitmaps("fmt-disk0")) == 1
    done = await document(configured, "vm", "cleanup", *target, "--bitmaps")
    assert done == {"done": ["removed 2 dirty bitmaps"]}
    assert await vm.bitmaps("fmt-disk0") == []


@pytest.mark.qemu
@pytest.mark.parametrize("qemu", ["backports"], indirect=True)  # that they do is not the matter of a QEMU, and is slow
async def test_two_runs_on_one_vm_exclude_each_other_whatever_they_call_it(
    vm: RunningQemu, configured: Fleece, ended: Callable[["Popen[str]"], "Popen[str]"]
) -> None:
    slow = ended(configured.start("vm", "backup", "--qmp", vm.qmp, "--id", "web", "--bwlimit", "2M"))
    with trio.fail_after(60):
        await exported(vm, disks=2)
    config = configured.home / "fleece.toml"
    config.write_text(config.read_text().replace("[vm.web]", "[vm.other]"))
    answer = await command(configured, "vm", "backup", "--qmp", vm.qmp, "--id", "other", "--output", "json")
    assert answer.code == 1
    assert "another backup" in answer.error["why"]
    answer = await command(configured, "vm", "backup", "--qmp", vm.qmp, "--id", "web", "--dry-run", "--output", "json")
    assert answer.code == 1
    assert "another backup" in answer.error["why"]
    _, err = await trio.to_thread.run_sync(slow.communicate)
    assert slow.returncode == 0, err
    assert [entry["backup-id"] for entry in configured.json("list", "--unfinished")] == ["web"]


async def test_a_vm_that_does_not_run_is_backed_up_by_its_paths(
    distribution: QemuBinary, configured: Fleece, tmpfs: Path
) -> None:
    await trio.run_process([distribution.img, "create", "-q", "-f", "qcow2", str(tmpfs / "a.qcow2"), "24M"])
    (tmpfs / "b.raw").write_bytes(b"\x77" * 5 * MIB)
    (tmpfs / "web.conf").write_text("memory: 64\n")
    config = configured.home / "fleece.toml"
    config.write_text(
        config.read_text()
        + f'qmp = "{tmpfs}/qmp"\nfiles = ["web.conf:{tmpfs}/web.conf"]\n'
        + f'[vm.web.disks]\ndisk0 = "{tmpfs}/a.qcow2"\ndisk1 = "{tmpfs}/b.raw"\n'
    )
    plan = await document(configured, "vm", "backup", "web", "--dry-run")
    assert [archive["name"] for archive in plan["archives"]] == ["drive-disk0.img", "drive-disk1.img"]
    report = archives(await document(configured, "vm", "backup", "web", "--exclude", "disk0"))
    assert set(report) == {"drive-disk1.img", "web.conf"}
    report = archives(await document(configured, "vm", "backup", "web"))
    assert set(report) == {"drive-disk0.img", "drive-disk1.img", "web.conf"}
    assert report["drive-disk0.img"]["size"] == 24 * MIB

    async with RunningQemu.start(distribution, [VmDisk(tmpfs / "a.qcow2", format="qcow2")], memory_mib=64):
        answer = await command(configured, "vm", "backup", "web", "--output", "json")
    assert answer.code == 1
    assert "in use" in answer.error["why"]
    assert len(configured.json("list", "--unfinished")) == 2


async def test_the_command_line_of_qemu_goes_along_without_its_secrets(
    distribution: QemuBinary, configured: Fleece, tmpfs: Path
) -> None:
    (tmpfs / "b.raw").write_bytes(bytes(MIB))
    extra = ["-object", "secret,id=s0,data=topsecret"]
    async with RunningQemu.start(distribution, [VmDisk(tmpfs / "b.raw")], extra=extra, memory_mib=64) as running:
        await document(configured, "vm", "backup", "--qmp", running.qmp, "--id", "web")
    answer = await command(configured, "restore", "vm/web/latest", "qemu-command.json", "-")
    assert "topsecret" not in answer.out
    assert "secret,id=s0,data=***" in json.loads(answer.out)


async def test_the_guest_stands_still_for_the_instant_only_and_the_report_says_how_long(
    distribution: QemuBinary, configured: Fleece, tmpfs: Path
) -> None:
    (tmpfs / "b.raw").write_bytes(bytes(MIB))
    agent = ScriptedAgent()
    async with RunningQemu.start(distribution, [VmDisk(tmpfs / "b.raw")], memory_mib=64) as vm, agent.serving() as path:
        target = ("--qmp", vm.qmp, "--id", "web", "--guest-agent", path)
        report = await document(configured, "vm", "backup", *target)
        assert 0 < report["frozen-s"] < 10
        assert "guest-fsfreeze-freeze" in agent.seen
        assert not agent.frozen
        seen = len(agent.seen)
        report = await document(configured, "vm", "backup", *target, "--no-freeze")
        assert (report["frozen-s"], len(agent.seen)) == (0, seen)
        path.unlink()
        report = await document(configured, "vm", "backup", *target, code=3)
    assert report["frozen-s"] == 0
    assert "agent" in report["warnings"][0]


async def test_mount_points_a_pause_and_the_age_of_bitmaps_are_options(
    distribution: QemuBinary, configured: Fleece, tmpfs: Path
) -> None:
    (tmpfs / "b.raw").write_bytes(bytes(MIB))
    agent = ScriptedAgent()
    config = configured.home / "fleece.toml"
    config.write_text(config.read_text() + 'freeze-mounts = ["/srv", "/home"]\npause = "without-agent"\n')
    async with RunningQemu.start(distribution, [VmDisk(tmpfs / "b.raw")], memory_mib=64) as vm:
        await vm.execute("cont")
        target = ("--qmp", vm.qmp, "--id", "web")
        async with agent.serving() as path:
            await document(configured, "vm", "backup", *target, "--guest-agent", path)
            assert agent.chosen == ["/srv", "/home"]
        await document(configured, "vm", "backup", *target, "--pause", "never")
        assert "STOP" not in [event["event"] for event in vm.own_qmp.events]
        report = await document(configured, "vm", "backup", *target)
        assert report["frozen-s"] > 0
        assert (await vm.execute("query-status"))["status"] == "running"
        assert "STOP" in [event["event"] for event in vm.own_qmp.events]
        old = "fleece-00000001-00000002-1000000000"
        await vm.execute("block-dirty-bitmap-add", {"node": "fmt-disk0", "name": old})
        cleaned = await document(configured, "vm", "cleanup", *target, "--bitmaps-older-than", "30d")
        assert cleaned == {"done": [f"removed the dirty bitmap {old} on fmt-disk0"]}
        assert len(await vm.bitmaps("fmt-disk0")) == 1


async def test_a_socket_behind_which_another_vm_is_now_is_refused() -> None:
    ours, other = "01234567-89ab-cdef-0123-456789abcdef", "11111111-89ab-cdef-0123-456789abcdef"
    answers: dict[str, Any] = {"query-uuid": {"UUID": ours}, "query-name": {"name": "database\x1b"}}
    async with ScriptedQmp(answers).serving() as path:
        config = Config.model_validate({"vm": {"web": {"qmp": str(path), "uuid": ours.upper()}}})
        settings = resolve_vm(config, VmOptions(name="web"))
        await check_idle(settings)
        answers["query-uuid"] = {"UUID": other}
        with pytest.raises(
            FleecingError, match=rf"the VM there has the UUID {other} \(database.*\), and {ours} is meant"
        ):
            await check_idle(settings)


async def test_a_socket_with_too_many_waiting_clients_belongs_to_a_running_vm(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(0)
        full = False
        while not full:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            full = client.connect_ex(str(path)) == errno.EAGAIN
        with trio.fail_after(60):
            assert await is_running(resolve_vm(Config(), VmOptions(qmp=path, id="web")))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["vm", "backup"], 2, "neither VM nor --libvirt DOMAIN nor --qmp SOCKET with --id ID is given"),
        (["vm", "backup", "nobody"], 1, "the configuration knows web"),
        (["vm", "backup", "web"], 2, "its QMP socket is not known"),
        (["vm", "backup", "--qmp", "/nowhere/qmp", "--id", "web"], 1, "there is no such socket"),
        (["vm", "backup", "--qmp", "/nowhere/qmp", "--id", "a/b"], 2, "it is not of the form"),
        (["vm", "show", "--qmp", "/nowhere/qmp", "--id", "web"], 1, "there is no such socket"),
    ],
)
def test_what_cannot_be_backed_up_is_said_clearly(
    arguments: list[str], code: int, words: str, configured: Fleece
) -> None:
    answer = configured(*arguments, "--output", "json")
    assert (answer.code, answer.out) == (code, "")
    assert words in answer.error["why"] + answer.error["hint"]
    assert configured.json("list", "--unfinished") == []
