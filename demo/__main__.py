"""The story of the demo: `make demo`, or `.venv/bin/python -m demo` in the checkout."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import trio

from core.units import format_size
from demo.command import CommandFailed, Fleece, unmount
from demo.machine import MIB, Disks, change_files, checksum, ledgers, newest_written, start_writing
from tests.support.cache import Unavailable
from tests.support.guest import GuestError, SmallGuest, small_guest
from tests.support.qemu_binaries import QemuBinary, distribution_qemu
from tests.support.running import RunningQemu

#: Free bytes that the demo wants in memory to work there: images, datastore and restored images, and what a backup
#: keeps free for the guest.
WANTED_SPACE: Final = 6 << 30
CHANGED_MIB: Final = 12
SECONDS: Final = 175.0
_began = time.monotonic()


def say(text: str) -> None:
    """One line of the story, with the time since the beginning."""
    print(f"[{time.monotonic() - _began:5.1f} s] {text}", flush=True)


def expect(condition: bool, text: str) -> None:
    """Go on if `condition` holds; else the demo has failed and `text` says what should have been."""
    if not condition:
        raise CommandFailed(f"the demo expected: {text}")


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder for the whole demo, in memory if there is room, removed at the end."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > WANTED_SPACE
    with tempfile.TemporaryDirectory(prefix="fleece-demo-", dir=memory if roomy else None) as folder:
        yield Path(folder)


def tell_backup(report: Any) -> None:
    """The report of a backup in words."""
    for archive in report["archives"]:
        if not archive["name"].endswith(".img"):
            say(f"  {archive['name']}: {format_size(archive['size'])}, goes along")
            continue
        if archive["mode"] == "incremental":
            changed = f"incremental: {format_size(archive['dirty'])} changed since the last backup"
        else:
            changed = f"full, because: {archive['reason']}"
        say(f"  {archive['name']}: {format_size(archive['size'])}, {changed}")
        say(
            f"    read {format_size(archive['read'])}, stored {format_size(archive['stored'])}, "
            f"zeros or known already {format_size(archive['reused'])}"
        )
    for warning in report["warnings"]:
        say(f"  warning: {warning}")


def disk_archives(report: Any) -> dict[str, Any]:
    """The disks' part of a report, by the disk's name."""
    found = {}
    for archive in report["archives"]:
        if archive["name"].endswith(".img"):
            found[archive["name"].removeprefix("drive-").removesuffix(".img")] = archive
    expect(set(found) == {"system", "second"}, "both disks in the report")
    return found


def differing(first: Path, second: Path) -> int:
    """Bytes, rounded up to MiB, in which two files differ; as many as the longer has if their lengths differ."""
    if first.stat().st_size != second.stat().st_size:
        return max(first.stat().st_size, second.stat().st_size)
    different = 0
    with first.open("rb") as one, second.open("rb") as other:
        while block := one.read(MIB):
            different += MIB if block != other.read(MIB) else 0
    return different


async def backups(fleece: Fleece, qemu: QemuBinary, guest: SmallGuest, disks: Disks) -> tuple[str, str]:
    """Run the machine and back it up twice; the second snapshot, and the checksum of a file that only it has."""
    say(f"Starting a Linux guest on {qemu.name} (TCG): an ext4 system disk and a second disk.")
    async with RunningQemu.start(qemu, disks.for_qemu(), guest=guest, append="root=/dev/vda") as vm:
        assert vm.guest is not None
        await start_writing(vm.guest)
        say("It runs, and a program in it writes a ledger on both disks without pause: each number first on the one,")
        say("then on the other. Now it is backed up as it runs:")
        before = await newest_written(vm.guest)
        first = await fleece.run("vm", "backup", "--qmp", str(vm.qmp), "--id", "demo")
        tell_backup(first)
        written = await newest_written(vm.guest) - before
        say(f"  The guest was not stopped: it wrote {written} numbers meanwhile.")
        expect(written > 0, "a guest that goes on writing")
        digest = await change_files(vm.guest, CHANGED_MIB)
        say(f"The guest has written a new file of {CHANGED_MIB} MiB (and goes on with its ledger). Second backup:")
        second = await fleece.run("vm", "backup", "--qmp", str(vm.qmp), "--id", "demo")
        tell_backup(second)
        expect(second["snapshot"] != first["snapshot"], "a second snapshot")
        for name, archive in disk_archives(second).items():
            expect(archive["mode"] == "incremental", f"{name} incremental, not full because {archive['reason']!r}")
            expect(archive["read"] <= archive["dirty"] < archive["size"] // 4, f"only what is dirty read of {name}")
        say("  QEMU kept account of what was written, so only the chunks that changed were read.")
        nodes = {node for node in await vm.nodes() if node.startswith("fleece-")}
        expect(not nodes, f"nothing of Fleece left in QEMU, there is {sorted(nodes)}")
    snapshot: str = second["snapshot"]
    return snapshot, digest


async def mounted_equals_restored(fleece: Fleece, snapshot: str, restored: Disks, mountpoint: Path) -> None:
    """Mount the repository and compare the images in it with the restored ones."""
    if not Path("/dev/fuse").exists():  # noqa: ASYNC240 - a quick look
        say("This machine has no /dev/fuse, so nothing can be mounted here; that step is left out.")
        return
    say("The whole datastore is mounted as a folder tree:")
    await fleece.run("mount", str(mountpoint))
    try:
        folder = mountpoint / snapshot
        for name, path in (("system", restored.system), ("second", restored.second)):
            image = folder / f"drive-{name}.img"
            different = await trio.to_thread.run_sync(differing, image, path)
            expect(different == 0, f"{image} equal to the restored image, {different} bytes differ")
            say(f"  {snapshot}/{image.name} in the mount equals the restored image, byte by byte.")
    finally:
        with trio.CancelScope(shield=True):
            await unmount(mountpoint)


async def boot_restored(qemu: QemuBinary, guest: SmallGuest, restored: Disks, digest: str) -> None:
    """Boot from the restored disks and look whether they show one instant."""
    say("A guest is started from the restored disks:")
    async with RunningQemu.start(qemu, restored.for_qemu(), guest=guest, append="root=/dev/vda") as vm:
        assert vm.guest is not None
        found = await checksum(vm.guest, "/data/new.bin")
        expect(found == digest, f"the new file with checksum {digest}, it is {found}")
        first, second = await ledgers(vm.guest)
        expect(first > 0, "numbers in the ledger")
        say("  It boots, and the file that was new in the second backup is there with the right checksum.")
        say(f"  Its ledgers end at {first} and {second}: both disks are of one and the same instant.")


async def story(folder: Path) -> None:
    """The whole demo, in `folder`."""
    guest = small_guest()
    qemu = distribution_qemu()
    disks = await trio.to_thread.run_sync(Disks.make, guest, folder)
    fleece = Fleece(folder, folder / "store")
    say("A new datastore in a folder; Proxmox Backup Server would read it as well:")
    await fleece.run("datastore", "create", str(folder / "store"))
    snapshot, digest = await backups(fleece, qemu, guest, disks)

    say("The machine is gone. Every chunk of both backups is read and checked:")
    for verified in await fleece.run("verify", "vm/demo"):
        expect(verified["state"] == "ok", f"{verified['snapshot']} whole: {verified['errors']}")
        say(f"  {verified['snapshot']}: whole")

    say("Both disks are restored from the second backup:")
    for part in ("restored", "mnt"):
        (folder / part).mkdir()
    restored = Disks(folder / "restored/system.raw", folder / "restored/second.raw")
    for name, path in (("system", restored.system), ("second", restored.second)):
        await fleece.run("restore", snapshot, f"drive-{name}.img", str(path))
    used = restored.system.stat().st_blocks * 512
    say(f"  {format_size(restored.system.stat().st_size)} with holes: it takes {format_size(used)}.")

    await mounted_equals_restored(fleece, snapshot, restored, folder / "mnt")
    await boot_restored(qemu, guest, restored, digest)
    say("Done: live, incremental, checked, mounted, restored, booted.")


def main() -> int:
    """Run the demo; the exit code."""
    failures: list[str] = []
    try:
        with workplace() as folder:
            trio.run(_bounded, folder)
    except* (CommandFailed, GuestError, Unavailable, AssertionError) as group:
        failures += [str(error) for error in group.exceptions]
    except* trio.TooSlowError:
        failures.append(f"not done after {SECONDS:.0f} s")
    for text in failures:
        say(f"FAILED: {text}")
    return 1 if failures else 0


async def _bounded(folder: Path) -> None:
    say("Getting the guest's kernel and busybox (from the distribution's packages, the first time only).")
    await trio.to_thread.run_sync(small_guest)
    # The first run downloads; only what comes after is bounded.
    with trio.fail_after(SECONDS):
        await story(folder)


if __name__ == "__main__":
    sys.exit(main())
