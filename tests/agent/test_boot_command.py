"""`fleece test-boot`: the command, its documents and exit codes, and what is left when it is killed."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from agent.boot_trials import BootResult, WatchedDisk, emulated_tpm, keep_evidence, parse_signs
from core.errors import SourceError, UsageError
from core.progress import Progress
from hypervisor.boot_signs import Picture
from hypervisor.boot_trial import Sign, TrialOptions, try_boot
from hypervisor.boot_watch import Trial
from hypervisor.machine import Device, Machine, MachineDisk
from hypervisor.qemu_tools import serve_image
from hypervisor.qmp import Qmp
from tests.support.boot_sectors import say, silent
from tests.support.waiting import until

from .conftest import Fleece, Popen

pytestmark = pytest.mark.qemu

#: What a backup of a running VM has beside its disk.
COMMAND = [
    "qemu-system-x86_64", "-m", "64", "-device", "virtio-blk-pci,id=disk0", "-chardev", "file,id=x,path=/etc/shadow",
]  # fmt: skip
QUICK = ("--accel", "tcg", "--memory", "64M", "--settle", "1s", "--timeout", "60s")


def back_up(fleece: Fleece, name: str, content: bytes, *more: str) -> str:
    """A snapshot of a VM with one disk."""
    disk, line = fleece.home / f"{name}.raw", fleece.home / "line.json"
    disk.write_bytes(content)
    line.write_text(json.dumps(COMMAND))
    answer = fleece(
        "backup", f"drive-disk0.img:{disk}", f"qemu-command.json:{line}", "--backup-id", name, "--backup-type", "vm",
        "--output", "json", *more,
    )  # fmt: skip
    assert answer.code == 0, answer
    return str(answer.document["snapshot"])


def test_a_guest_that_comes_to_life_ends_with_0_and_a_report(stored: Fleece, tmp_path: Path) -> None:
    snapshot = back_up(stored, "good", say(serial="web login: ", screen="hello"))
    picture, log = tmp_path / "a.png", tmp_path / "a.log"
    report = stored.json("test-boot", "vm/good/latest", *QUICK, "--screenshot", picture, "--serial-log", log)
    assert set(report) == {
        "snapshot", "alive", "sign", "reason", "after-s", "events", "screenshot", "serial-log", "accel", "accel-reason",
        "qemu", "machine", "memory", "cpus", "restarts", "written", "duration-s", "left-out", "warnings",
    }  # fmt: skip
    assert (report["snapshot"], report["alive"], report["sign"]) == (snapshot, True, "serial")
    assert (report["accel"], report["machine"], report["memory"], report["cpus"]) == ("tcg", "pc", 64 << 20, 1)
    assert "-chardev file,id=x,path=/etc/shadow" in report["left-out"]
    assert [one["what"] for one in report["events"]][-1] == "alive: the serial port says 'web login:'"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert log.read_bytes().rstrip() == b"web login:"


def test_a_zeroed_disk_ends_with_1_and_a_picture_is_kept(stored: Fleece) -> None:
    back_up(stored, "zero", bytes(1 << 20))
    answer = stored("test-boot", "vm/zero/latest", *QUICK, "--output", "json")
    assert (answer.code, answer.document["alive"], answer.err) == (1, False, "")
    assert "finds nothing to boot from" in answer.document["reason"]
    kept = Path(answer.document["screenshot"])
    assert kept.is_relative_to(stored.home / "state")
    assert kept.read_bytes().startswith(b"\x89PNG")


def test_an_encrypted_backup_needs_its_key(stored: Fleece, tmp_path: Path) -> None:
    key = tmp_path / "key"
    stored("key", "create", key, "--kdf", "none")
    back_up(stored, "secret", say(serial="web login: "), "--keyfile", str(key))
    refused = stored("test-boot", "vm/secret/latest", *QUICK, "--output", "json")
    assert (refused.code, "key" in json.dumps(refused.error)) == (1, True)
    assert stored.json("test-boot", "vm/secret/latest", *QUICK, "--keyfile", key)["alive"]


def test_a_backup_without_configuration_is_tried_with_a_warning(stored: Fleece) -> None:
    disk = stored.home / "disk.raw"
    disk.write_bytes(say(serial="web login: "))
    stored("backup", f"any.img:{disk}", "--backup-id", "plain")
    answer = stored("test-boot", "host/plain/latest", *QUICK)
    assert answer.code == 3
    assert "alive: the serial port says 'web login:'" in answer.out
    assert "the backup has no configuration of a machine" in answer.err


@pytest.mark.parametrize(
    "options",
    [
        ("--wait", "nothing"), ("--wait", "serial:"), ("--wait", "serial:/(/"), ("--timeout", "0s"), ("--settle", "0"),
        ("--memory", "1M"), ("--append", "x"), ("--accel", "xen"), ("--cpus", "0"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(stored: Fleece, options: tuple[str, str]) -> None:
    assert stored("test-boot", "vm/x/latest", *options).code == 2


def test_signs_are_read() -> None:
    (exact,) = parse_signs(["serial:a.b"])
    assert exact.pattern is not None
    assert exact.pattern.search("xa.b")
    assert not exact.pattern.search("axb")
    (pattern,) = parse_signs(["serial:/a.b/"])
    assert pattern.pattern is not None
    assert pattern.pattern.search("axb")
    assert [one.kind for one in parse_signs([])] == ["guest-agent", "serial", "screen"]
    with pytest.raises(UsageError, match="no sign of life"):
        parse_signs(["guest-agent:x"])


async def test_why_a_disk_cannot_be_read_is_part_of_the_reason(mock_clock: trio.testing.MockClock) -> None:
    class Broken:
        size = 1 << 20

        async def read(self, offset: int, length: int) -> bytes:
            if offset:
                raise SourceError("read", "drive-disk0.img", "the chunk is gone")
            await trio.sleep(30)
            return bytes(length)

        def zeros(self, offset: int, length: int) -> list[tuple[int, bool]]:
            return [(length, False)]

    disk = WatchedDisk(Broken())
    assert disk.trouble() == ""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.read, 0, 512)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(20)
        assert disk.trouble() == "the backup has not answered for 20 s"
        mock_clock.jump(20)
    assert disk.trouble() == ""
    with pytest.raises(SourceError):
        await disk.read(512, 512)
    assert disk.trouble() == "cannot read drive-disk0.img: the chunk is gone"


@pytest.mark.long
def test_a_chunk_that_is_gone_is_told_as_the_reason(stored: Fleece) -> None:
    back_up(stored, "bad", say(serial="web login: "))
    assert stored.repo is not None
    for chunk in (stored.repo / ".chunks").glob("*/*"):
        chunk.unlink()
    answer = stored("test-boot", "vm/bad/latest", *QUICK, "--output", "json")
    assert (answer.code, answer.document["alive"]) == (1, False)
    assert "it is not in the store" in answer.document["reason"]


async def test_evidence_that_cannot_be_kept_is_a_warning_beside_the_result(tmp_path: Path) -> None:
    trial = Trial(alive=True, picture=Picture.parse(b"P6\n1 1\n255\nabc"), serial=b"web login: ")
    result = BootResult("vm/100/2026-01-02T03:04:05Z", trial, 1, 1, (), 1.0)
    progress = Progress()
    await keep_evidence(result, tmp_path / "gone" / "a.png", tmp_path / "a.log", progress)
    assert (result.screenshot, result.serial_log) == (None, tmp_path / "a.log")
    assert [f"cannot write {tmp_path}/gone/a.png" in line for line in progress.warnings] == [True]


def family(pid: int) -> list[int]:
    """Processes below `pid`."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = [int(one) for one in path.read_text().split()]
        except OSError:
            continue
        found += [*below, *(one for child in below for one in family(child))]
    return found


def programs(pids: list[int]) -> set[str]:
    names = set()
    for pid in pids:
        try:
            names.add(Path(f"/proc/{pid}/comm").read_text().strip())
        except OSError:
            continue
    return names


async def test_a_killed_test_leaves_nothing_that_runs_and_the_next_one_clears_up(
    stored: Fleece, tmp_path: Path, ended: Callable[[Popen], Popen]
) -> None:
    back_up(stored, "silent", silent())
    runtime, temporary = Path(f"/tmp/fleece-boot-{os.getpid()}"), tmp_path / "tmp"
    runtime.mkdir(mode=0o700)
    temporary.mkdir()
    stored.environment |= {"XDG_RUNTIME_DIR": str(runtime), "TMPDIR": str(temporary)}
    try:
        process = ended(stored.start("test-boot", "vm/silent/latest", *QUICK))
        await until(lambda: {"nbdkit", "qemu-system-x86"} <= programs(family(process.pid)))
        below = family(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        await until(lambda: not {"nbdkit", "qemu-system-x86"} & programs(below))
        assert list(temporary.iterdir()) == []  # overlays have no names
        assert list(runtime.iterdir()) != []  # its sockets
        back_up(stored, "good", say(serial="web login: "))
        assert stored.json("test-boot", "vm/good/latest", *QUICK)["alive"]
        assert list(runtime.iterdir()) == []
    finally:
        shutil.rmtree(runtime)


async def test_an_interrupted_test_cleans_up(stored: Fleece, tmp_path: Path, ended: Callable[[Popen], Popen]) -> None:
    back_up(stored, "silent", silent())
    process = ended(stored.start("test-boot", "vm/silent/latest", *QUICK))
    await until(lambda: "qemu-system-x86" in programs(family(process.pid)))
    below = family(process.pid)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "SIGTERM" in err
    assert not {"nbdkit", "qemu-system-x86"} & programs(below)


async def test_a_tpm_starts_with_the_state_that_was_backed_up(tmp_path: Path) -> None:
    machine = Machine(
        disks=(MachineDisk(Device("virtio-blk-pci"), "drive-a.img"),), tpm="tpm-crb", display=Device("VGA")
    )
    disk = tmp_path / "disk"
    disk.write_bytes(say(serial="web login: "))
    models: list[str] = []
    states: list[bytes] = []

    async def boot(files: dict[str, bytes]) -> list[str]:
        progress = Progress()

        async def look(qmp: Qmp, trial: Trial) -> None:
            models.append((await qmp.execute("query-tpm"))[0]["model"])

        async with emulated_tpm(machine, files, progress) as control:
            assert control is not None
            async with serve_image(disk, "raw", fault=SourceError) as address:
                options = TrialOptions([Sign("serial")], 60, memory=64 << 20, accel="tcg")
                served = {"drive-a.img": (address, disk.stat().st_size)}
                trial = await try_boot(machine, served, options, tpm=control, linger=look)
            assert trial.alive
            states.append((control.parent / "tpm2-00.permall").read_bytes())
        return progress.warnings

    assert await boot({}) == ["the backup has no state of the machine's TPM: it starts with an empty one"]
    assert await boot({"tpm2-00.permall": states[0]}) == []
    assert models == ["tpm-crb", "tpm-crb"]
    assert states[0]


# -- as a job ---------------------------------------------------------------------------------------------------------


def test_a_job_starts_the_newest_backup_of_each_group_and_fails_if_one_does_not_live(stored: Fleece) -> None:
    back_up(stored, "good", bytes(1 << 20))
    newest = back_up(stored, "good", say(serial="web login: "))
    assert newest.startswith("vm/good/")
    bad = back_up(stored, "bad", bytes(1 << 20))
    back_up(stored, "other", bytes(1 << 20))
    empty = stored.home / "a.conf"
    empty.write_text("a")
    stored("backup", f"a.conf:{empty}", "--backup-id", "empty", "--backup-type", "vm")
    options = 'accel = "tcg"\nmemory = "64M"\nsettle = "1s"\ntimeout = "1m"\ngroup-filter = ["exclude:group:vm/other"]'
    (stored.home / "fleece.toml").write_text(f"""
default-repository = "{stored.repo}/"
[job.boots]
type = "test-boot"
wait = ["serial", "screen"]
{options}
[metrics]
textfile = "{stored.home}/fleece.prom"
""")
    answer = stored("job", "run", "boots", "--output", "json")
    assert answer.code == 1
    assert (answer.error["where"], answer.error["why"]) == (bad, "it did not come to life")
    (run,) = stored.json("job", "history", "boots")
    result = run["result"]
    assert run["state"] == "failed"
    assert {name: result[name] for name in ("ok", "failed", "skipped", "failed-snapshots")} == {
        "ok": 1, "failed": 1, "skipped": 1, "failed-snapshots": [bad],
    }  # fmt: skip
    machines = {one["snapshot"]: one for one in result["machines"]}
    assert set(machines) == {newest, bad}
    assert (machines[newest]["alive"], machines[newest]["sign"]) == (True, "serial")
    assert "finds nothing to boot from" in machines[bad]["reason"]
    for one in machines.values():
        assert Path(one["screenshot"]).read_bytes().startswith(b"\x89PNG")
    assert f"{bad}: NOT alive" in stored("job", "log", "boots").out
    metrics = (stored.home / "fleece.prom").read_text()
    assert 'fleece_job_last_run_snapshots{job="boots",state="failed"} 1.0' in metrics


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('wait = ["nothing"]', "it is no sign of life"), ('timeout = "0s"', "shorter than a second"),
        ('memory = "1M"', "it needs"), ("cpus = 0", "greater than or equal to 1"), ('accel = "xen"', "accel"),
        ('vm = ["web"]', "vm is no known option"),
    ],
)  # fmt: skip
def test_a_job_that_makes_no_sense_is_refused_when_the_file_is_read(stored: Fleece, text: str, why: str) -> None:
    (stored.home / "fleece.toml").write_text(f'[job.boots]\ntype = "test-boot"\n{text}\n')
    answer = stored("job", "list", "--output", "json")
    assert answer.code == 2
    assert why in answer.error["why"]
