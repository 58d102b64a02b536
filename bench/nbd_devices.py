"""How fast disks are as block devices `/dev/nbdX`, against reading the same exports with nbdcopy.

    python bench/nbd_devices.py [--rounds 3] [--size 192MiB] [--sources vm,backup] [--output FORM]

A Debian in a VM (two cores under TCG, so figures in MB/s are small and only ratios count) has the kernel's devices.
`fleece nbd connect` makes one of the disk of a running virtual machine (QEMU 10 within that VM) and of a disk in a
backup, whose datastore is in memory. Read by turns, from end to end:

    nbdcopy      the export that the device is connected to, straight by libnbd, to nowhere: the limit
    direct       the device, `dd iflag=direct bs=4M`
    buffered     the device through the page cache, which is dropped before
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.image_backup import FLEECE  # noqa: E402
from core.units import parse_size  # noqa: E402
from datastore.primitives import half_random  # noqa: E402
from tests.support import vm_in_debian  # noqa: E402
from tests.support.debian_vm import DebianVm  # noqa: E402
from tests.support.fleece_disk import COMMAND_S, fleece_disk, open_store  # noqa: E402
from tests.support.qemu_binaries import backports_qemu, distribution_qemu  # noqa: E402
from tests.support.vm_in_debian import DISK  # noqa: E402

MIB: Final = 1 << 20
CONFIG: Final = """\
default-repository = "/srv/"
scratch = "/var/scratch"
[vm.web]
qmp = "/run/web.qmp"
scratch-beside-disks = true
"""
CONNECT: Final = {"vm": "web --time-limit 2h", "backup": "vm/100/latest"}
LIMIT: Final = "nbdcopy"
WAYS: Final = (LIMIT, "direct", "buffered")
#: The only export of a server may have no name.
_SERVED: Final = re.compile(r"file\.server\.path=([^,]+),file\.export=([^,\s]*)")


def prepared(folder: Path, size: int) -> Path:
    """A datastore with one backup of an image of which half can be compressed away; the image is `disk.raw`."""
    with (folder / "disk.raw").open("wb") as file:
        for _ in range(size // (4 * MIB)):
            file.write(half_random(4 * MIB))
    environment = {
        **os.environ, "FLEECE_STATE_DIR": str(folder / "state"), "FLEECE_RUN_DIR": str(folder / "run"),
        "FLEECE_CONFIG": str(folder / "fleece.toml"),
    }  # fmt: skip
    (folder / "fleece.toml").touch()
    for line in (
        ["datastore", "create", f"{folder}/store"],
        ["backup", f"drive-disk0.img:{folder}/disk.raw", "--backup-type", "vm", "--backup-id", "100", "--repo",
         f"{folder}/store"],
    ):  # fmt: skip
        subprocess.run([FLEECE, *line], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=300)
    return folder / "store"


class Bench:
    """The VM, and the results."""

    def __init__(self, vm: DebianVm, size: int, rounds: int) -> None:
        self.vm, self.size, self.rounds = vm, size, rounds
        self.seconds: dict[str, dict[str, list[float]]] = {}

    def fleece(self, line: str) -> Any:
        """What the command says."""
        return json.loads(self.vm.check(f"/mnt/fleece {line} --output json", timeout_s=COMMAND_S))

    def measure(self, source: str) -> None:
        """Connect, read by turns, disconnect."""
        device = self.fleece(f"nbd connect {CONNECT[source]}")["disks"][0]["device"]
        served = _SERVED.search(self.vm.check(f"pgrep -af -- --connect={device}"))
        if served is None:
            raise SystemExit(f"nothing says what {device} is connected to")
        uri = f"nbd+unix:///{served[2]}?socket={served[1]}"
        lines = {
            LIMIT: f"nbdcopy '{uri}' null:",
            "direct": f"dd if={device} of=/dev/null iflag=direct bs=4M status=none",
            "buffered": f"dd if={device} of=/dev/null bs=4M status=none",
        }
        for _ in range(self.rounds):
            for way, line in lines.items():
                self.time(source, way, line)
        print(source, self.seconds[source], file=sys.stderr)
        self.fleece("nbd disconnect --all")

    def time(self, source: str, way: str, line: str) -> None:
        """Run a line in the VM with nothing in its page cache."""
        told = self.vm.check(
            f"sync; echo 1 >/proc/sys/vm/drop_caches; begun=$(date +%s%N); {line} || exit 1; "
            "echo $(( $(date +%s%N) - begun ))",
            timeout_s=COMMAND_S,
        )
        self.seconds.setdefault(source, {}).setdefault(way, []).append(int(told) / 1e9)

    def to_json(self) -> dict[str, Any]:
        """All results."""
        return {
            source: {
                way: {
                    "mb-s": round(self.size / 1e6 / statistics.median(found), 1),
                    "ratio": round(statistics.median(a / b for a, b in zip(ways[LIMIT], found, strict=True)), 2),
                }
                for way, found in ways.items()
            }
            for source, ways in self.seconds.items()
        }


def markdown(document: dict[str, Any]) -> str:
    lines = ["| disk of | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 1) + "|"]
    for source, ways in document["sources"].items():
        cells = [f"{ways[way]['mb-s']} MB/s ({ways[way]['ratio']})" for way in WAYS]
        lines.append(f"| {source} | " + " | ".join(cells) + " |")
    return "\n".join([f"{document['rounds']} rounds, load {document['load']}, ratios to nbdcopy.", "", *lines])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="192MiB", help="of the disk")
    parser.add_argument("--sources", default="vm,backup", help="some of these, in this order")
    parser.add_argument("--output", choices=["text", "markdown", "json"], default="text")
    arguments = parser.parse_args()
    size = parse_size(arguments.size) // (4 * MIB) * 4 * MIB
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > 3 * size + (2 << 30)
    with tempfile.TemporaryDirectory(prefix="fleece-bench-", dir=memory if fits else None) as name:
        folder = Path(name)
        store = prepared(folder, size)
        (folder / "d").mkdir()
        os.link(folder / "disk.raw", folder / "d/disk.raw")
        disk = fleece_disk(
            folder / "d", folder / "fleece.img", store=store, qemu=backports_qemu(), mib=400 + 3 * size // MIB
        )
        with DebianVm.start(distribution_qemu(), disks=[disk], memory_mib=1024 + 3 * size // MIB) as vm:
            vm.check("mount /dev/vdb /mnt; modprobe nbd nbds_max=2; mkdir -p /var/scratch /run/disk")
            vm.write("/etc/fleece/fleece.toml", CONFIG)
            open_store(vm)
            vm.check(f"mount -t tmpfs tmpfs /run/disk; cp /mnt/disk.raw /run/disk; ln -s /run/disk/disk.raw {DISK}")
            vm_in_debian.start(vm, qemu="/mnt/qemu/bin/qemu-system-x86_64")
            bench = Bench(vm, size, arguments.rounds)
            for source in arguments.sources.split(","):
                bench.measure(source)
        document = {
            "rounds": arguments.rounds,
            "size": size,
            "load": round(os.getloadavg()[0], 2),
            "sources": bench.to_json(),
        }
    print(json.dumps(document, indent=2) if arguments.output == "json" else markdown(document))


if __name__ == "__main__":
    main()
