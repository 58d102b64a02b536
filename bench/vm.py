"""What people wait for who want a virtual machine back.

    python bench/vm.py [--rounds 3] [--size 2GiB] [--phases NAME,...] [--output text|markdown|json]

    live   seconds until a guest (Linux under TCG, its root file system on the disk) says its first word: QEMU alone, on
           an image that is there; by `fleece vm restore --live`, from the start of the command; and by a full restore
           first, to a raw image. From a local datastore; the disk is random data to the half and zeros to the rest.
           Goal: live at most 3 s more than QEMU alone, whatever the size

QEMU is the newest at hand.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.image_backup import FLEECE  # noqa: E402
from core.units import format_size, parse_size  # noqa: E402
from tests.support.cache import Unavailable  # noqa: E402
from tests.support.guest import READY, small_guest  # noqa: E402
from tests.support.qemu_binaries import QemuBinary, backports_qemu, distribution_qemu  # noqa: E402

MIB: Final = 1 << 20
#: Seconds after which what should have happened never will.
PATIENCE_S: Final = 600.0
#: Seconds that a live restore may take longer than QEMU alone.
LIVE_GOAL_S: Final = 3.0


class Bench:
    """The folder with everything in it, and the results."""

    def __init__(self, folder: Path, qemu: QemuBinary, rounds: int, size: int, say: Callable[[str], None]) -> None:
        self.folder, self.qemu, self.rounds, self.size, self.say = folder, qemu, rounds, size, say
        self.results: dict[str, dict[str, list[float]]] = {}
        self.environment = {
            **os.environ,
            "FLEECE_STATE_DIR": str(folder / "state"),
            "FLEECE_RUN_DIR": str(folder / "run"),
            "FLEECE_CONFIG": str(folder / "fleece.toml"),
            "FLEECE_REPOSITORY": str(folder / "store"),
        }
        (folder / "fleece.toml").touch()

    def fleece(self, *arguments: str | Path) -> None:
        """Run a command that must succeed; warnings are no failure."""
        done = subprocess.run([FLEECE, *map(str, arguments)], env=self.environment, capture_output=True, text=True)
        if done.returncode not in (0, 3):
            raise RuntimeError(f"fleece {arguments[0]} ended with {done.returncode}: {done.stderr}")

    # --- live --------------------------------------------------------------------------------------------------------

    def live(self) -> None:
        """Guests that start while their disk comes in, and such that wait for it."""
        disk = self.folder / "disk.raw"
        self._make_disk(disk)
        command = self.folder / "qemu-command.json"
        line = [self.qemu.system, "-m", "256", "-machine", "q35", "-drive", "if=none,id=a,file=/gone"]
        command.write_text(json.dumps([*line, "-device", "virtio-blk-pci,drive=a,id=disk0"]))
        self.fleece("datastore", "create", self.folder / "store", "--name", "bench")
        words = [f"drive-disk0.img:{disk}", f"qemu-command.json:{command}", "--backup-type", "vm", "--backup-id", "web"]
        self.fleece("backup", *words)
        for _ in range(self.rounds):
            self._one("QEMU alone", lambda said: self._alone(disk, said))
            self._one("live", self._live)
            self._one("restored first", self._restored)

    def _make_disk(self, disk: Path) -> None:
        root = self.folder / "root"
        small_guest().write_root(root)
        with disk.open("wb") as file:
            file.truncate(self.size)
        # The guest's files lie at the beginning, and after them what is restored for nothing, as far as they can tell.
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(disk), "64M"], check=True)
        with disk.open("r+b") as file:
            for offset in range(64 * MIB, self.size // 2, MIB):
                file.seek(offset)
                file.write(os.urandom(min(MIB, self.size - offset)))

    def _one(self, name: str, start: Callable[[Path], Callable[[], None]]) -> None:
        """Seconds from the call of `start` until the guest's first word; what it returns ends the guest."""
        said = self.folder / "said"
        said.unlink(missing_ok=True)
        began = time.perf_counter()
        end = start(said)
        while not (said.exists() and READY in said.read_bytes()):
            if time.perf_counter() - began > PATIENCE_S:
                raise RuntimeError(f"{name}: the guest says nothing")
            time.sleep(0.01)
        took = time.perf_counter() - began
        self.results.setdefault("live", {}).setdefault(name, []).append(round(took, 3))
        self.say(f"  {name:<16}{took:8.2f} s")
        end()
        shutil.rmtree(self.folder / "vm", ignore_errors=True)

    def _boots(self, said: Path) -> list[str]:
        guest = small_guest()
        append = "no_timer_check console=ttyS0 quiet panic=-1 root=/dev/vda"
        line = ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", append]
        return [*line, "-chardev", f"file,id=said,path={said}", "-serial", "chardev:said"]

    def _alone(self, disk: Path, said: Path) -> Callable[[], None]:
        line = [self.qemu.system, "-nodefaults", "-display", "none", "-machine", "q35", "-accel", "tcg", "-m", "256"]
        line += ["-drive", f"if=virtio,format=raw,file={disk},snapshot=on", "-serial", "null"]
        process = subprocess.Popen([*line, *self._boots(said)])

        def end() -> None:
            process.kill()
            process.wait()

        return end

    def _live(self, said: Path) -> Callable[[], None]:
        options = [f"--qemu-option={word}" for word in self._boots(said)]
        self.fleece(
            "vm", "restore", "vm/web/latest", self.folder / "vm", "--live", "--format", "qcow2", "--accel", "tcg",
            "--qemu", self.qemu.system, *options,
        )  # fmt: skip
        pid = int((self.folder / "vm/run/qemu.pid").read_text())
        began = time.perf_counter()

        def end() -> None:
            while (self.folder / "vm/live-restore.json").exists():
                if time.perf_counter() - began > PATIENCE_S:
                    raise RuntimeError("the disk does not become whole")
                time.sleep(0.02)
            took = time.perf_counter() - began
            self.results["live"].setdefault("live, until whole", []).append(round(took, 3))
            self.say(f"  {'... whole':<16}{took:8.2f} s")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

        return end

    def _restored(self, said: Path) -> Callable[[], None]:
        self.fleece("vm", "restore", "vm/web/latest", self.folder / "vm", "--no-script")
        return self._alone(self.folder / "vm/drive-disk0.raw", said)

    # --- the result --------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Medians of all phases that were run."""
        document: dict[str, Any] = {}
        if "live" in self.results:
            found = {name: statistics.median(times) for name, times in self.results["live"].items()}
            more = round(found["live"] - found["QEMU alone"], 3)
            document["live"] = {"seconds": found, "more": more, "goal": LIVE_GOAL_S, "met": more <= LIVE_GOAL_S}
        return document


def markdown(document: dict[str, Any]) -> str:
    """The results as tables for docs/benchmarks.md."""
    lines = []
    if "live" in document:
        live = document["live"]
        lines += [f"| first word of a guest, disk of {format_size(document['size'])} | s |", "|---|--:|"]
        lines += [f"| {name} | {seconds:.2f} |" for name, seconds in live["seconds"].items()]
        met = "met" if live["met"] else "missed"
        lines += ["", f"Live takes {live['more']:.2f} s more than QEMU alone: goal of {live['goal']:g} s {met}."]
    return "\n".join(lines)


def newest_qemu() -> QemuBinary:
    """The newest QEMU at hand."""
    try:
        return backports_qemu()
    except Unavailable:
        return distribution_qemu()


PHASES: Final[dict[str, Callable[[Bench], None]]] = {"live": Bench.live}


def chosen(text: str) -> Sequence[str]:
    """The phases that a person names."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PHASES]:
        raise argparse.ArgumentTypeError(f"no such phase: {', '.join(unknown)}; there are {', '.join(PHASES)}")
    return names


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="2GiB", help="of the disk that is restored")
    parser.add_argument("--phases", type=chosen, default=list(PHASES), help="some of these, in this order")
    parser.add_argument("--output", choices=["text", "markdown", "json"], default="text")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stdout if arguments.output == "text" else sys.stderr, flush=True)

    size = max(256 * MIB, parse_size(arguments.size) // MIB * MIB)
    memory = Path("/dev/shm")
    fits = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 3 * size
    qemu = newest_qemu()
    with tempfile.TemporaryDirectory(prefix="fleece-bench-", dir=memory if fits else None) as folder:
        bench = Bench(Path(folder), qemu, arguments.rounds, size, say)
        for name in arguments.phases:
            say(name)
            PHASES[name](bench)
        document = {
            "cores": os.cpu_count(),
            "qemu": qemu.name,
            "rounds": arguments.rounds,
            "size": size,
            "load": round(os.getloadavg()[0], 2),
            **bench.to_json(),
        }
    print(json.dumps(document, indent=2) if arguments.output == "json" else f"\n{markdown(document)}")


if __name__ == "__main__":
    main()
