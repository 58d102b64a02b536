"""The demo's virtual machine: a Linux on an ext4 disk and a second disk, with a writer that never stops.

The writer keeps a ledger on both disks: it puts the next number first on the first disk, then on the second, and so on.
So at any instant the second disk is at most one number behind, and a backup that shows more than that does not show
one instant.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from tests.support.guest import GuestControl, SmallGuest
from tests.support.ring import BLOCK, Ring
from tests.support.running import VmDisk

MIB: Final = 1 << 20
SYSTEM_SIZE: Final = 1024 * MIB
SECOND_SIZE: Final = 256 * MIB
#: Bytes of files that no compression makes smaller, so that the first backup has something to do.
PAYLOAD_SIZE: Final = 160 * MIB
LEDGER: Final = Ring(slots=64)


@dataclass(frozen=True)
class Disks:
    """The two image files of the machine."""

    system: Path  #: raw, an ext4 file system without partitions
    second: Path  #: raw, the second half of the ledger

    @classmethod
    def make(cls, guest: SmallGuest, folder: Path) -> Self:
        """Make both images in `folder`, with `mke2fs -d` and without being root."""
        disks = cls(folder / "system.raw", folder / "second.raw")
        root = folder / "root"
        guest.write_root(root)
        with (root / "data/photos.bin").open("wb") as file:
            for _ in range(PAYLOAD_SIZE // MIB):
                file.write(os.urandom(MIB))
        for path, size in ((disks.system, SYSTEM_SIZE), (disks.second, SECOND_SIZE)):
            with path.open("wb") as file:
                file.truncate(size)
        command = ["mke2fs", "-q", "-t", "ext4", "-F", "-d", str(root), str(disks.system)]
        programs = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        subprocess.run(command, check=True, timeout=60, env={**os.environ, "PATH": programs})
        subprocess.run(["rm", "-rf", str(root)], check=True, timeout=60)
        return disks

    def for_qemu(self) -> list[VmDisk]:
        """The disks as the machine has them: `system` is /dev/vda, `second` /dev/vdb."""
        return [VmDisk(self.system, "system"), VmDisk(self.second, "second")]


async def start_writing(guest: GuestControl) -> None:
    """Start the writer in the guest; it goes on until the guest ends."""
    # Written once before: a number then changes a block in place, and no journal comes between it and the disk.
    await guest.check(f"dd if=/dev/zero of=/data/ledger bs={BLOCK} count={LEDGER.slots} conv=fsync 2>/dev/null; sync")
    await guest.check(LEDGER.command("/data/ledger", "/dev/vdb", told="/tmp/newest") + " >/tmp/ring.log 2>&1 &")
    await guest.check("until [ -s /tmp/newest ] || ! pidof ring; do sleep 0.1; done >/dev/null; [ -s /tmp/newest ]")


async def newest_written(guest: GuestControl) -> int:
    """How far the writer is."""
    return int(await guest.check("od -A n -t u8 -N 8 /tmp/newest"))


async def change_files(guest: GuestControl, mib: int) -> str:
    """Write a new file of `mib` MiB in the guest; its SHA-256."""
    await guest.check(f"dd if=/dev/urandom of=/data/new.bin bs=1M count={mib} conv=fsync 2>/dev/null; sync")
    return await checksum(guest, "/data/new.bin")


async def checksum(guest: GuestControl, path: str) -> str:
    """SHA-256 of a file in the guest, hex."""
    return (await guest.check(f"sha256sum {path}", timeout_s=120)).split()[0]


async def ledgers(guest: GuestControl) -> tuple[int, int]:
    """The newest number on each disk, as the guest sees them.

    Raises:
        AssertionError: they do not show one instant.
    """
    newest = []
    for path in ("/data/ledger", "/dev/vdb"):
        # The ledger's blocks are in a row, so the first eight bytes of each are every 512th number.
        listed = await guest.check(
            f"head -c {LEDGER.slots * BLOCK} {path} | od -A n -t u8 -v -w{BLOCK} | awk '{{print $1}}'"
        )
        numbers = [int(line) for line in listed.split()]
        newest.append(LEDGER.newest_of(numbers))
    assert newest[0] - newest[1] in (0, 1), f"the disks show {newest[0]} and {newest[1]}: not one instant"
    return newest[0], newest[1]
