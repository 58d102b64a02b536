"""What a hypervisor host and its guests notice of Fleece.

    python bench/host.py [--rounds 3] [--size 2GiB] [--seconds 5] [--vms 20] [--phases NAME,...] [--output FORM]

    latency   how long 4 KiB writes take in a guest (Linux under TCG, O_DIRECT, at random places of its disk, a thousand
              a second at most): without a backup; while a full backup into a local datastore runs; and while one to a
              server is under way that has stopped to answer, so that every write is a first one and is kept for the
              backup. Median, 99th percentile and worst, by turns; ratios are to the writes without a backup of a round
    vms       one job that backs up all of --vms virtual machines of 128 MiB, when all is new, and again when nothing
              has changed; beside it one backup of the same images as files
    agent     memory and CPU time of an idle agent with that configuration (goal: 60 MB)

QEMU is the newest at hand. Where there is one core for host and guest each, a guest under TCG notices every process
that computes: compare the percentiles with those of a backup whose target stalls, which computes nothing.
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
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.image_backup import FLEECE  # noqa: E402
from bench.wire import process  # noqa: E402
from core.units import format_size, parse_size  # noqa: E402
from tests.support.cache import Unavailable  # noqa: E402
from tests.support.guest import GuestControl, compile_static, small_guest  # noqa: E402
from tests.support.qemu_binaries import QemuBinary, backports_qemu, distribution_qemu  # noqa: E402
from tests.support.running import RunningQemu, VmDisk  # noqa: E402

MIB: Final = 1 << 20
PAUSE_US: Final = 1000
VM_SIZE: Final = 128 * MIB
#: Seconds after which what should have happened never will.
PATIENCE_S: Final = 120.0
#: MB of an idle agent at most.
AGENT_GOAL: Final = 60
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass
class Latency:
    """Of the writes in one state, microseconds."""

    writes: int
    median: int
    p99: int
    worst: int


class Bench:
    """The folder with everything in it, and the results."""

    def __init__(
        self, folder: Path, qemu: QemuBinary, arguments: argparse.Namespace, say: Callable[[str], None]
    ) -> None:
        self.folder, self.qemu, self.say = folder, qemu, say
        self.rounds, self.seconds, self.vms = arguments.rounds, arguments.seconds, arguments.vms
        self.size = max(256 * MIB, parse_size(arguments.size) // MIB * MIB)
        self.latencies: dict[str, list[Latency]] = {}
        self.jobs: dict[str, list[float]] = {}
        self.agent: dict[str, float] = {}
        self.environment = {
            **os.environ,
            "FLEECE_STATE_DIR": str(folder / "state"),
            "FLEECE_RUN_DIR": str(folder / "run"),
            "FLEECE_CONFIG": str(folder / "fleece.toml"),
        }
        (folder / "fleece.toml").touch()

    # --- what guests notice ------------------------------------------------------------------------------------------

    async def latency(self) -> None:
        """Guests that write, without and beside backups."""
        disk, program = self.folder / "disk.raw", self.folder / "program.raw"
        fill(disk, self.size)
        compile_static(ROOT / "bench/write_latency.c", program)
        with program.open("r+b") as file:
            file.truncate(-(-program.stat().st_size // MIB) * MIB)
        disks = [VmDisk(disk, "disk0"), VmDisk(program, "program", read_only=True)]
        with process("create", self.folder / "served") as created:
            created.process.wait()
        for number in range(self.rounds):
            async with RunningQemu.start(self.qemu, disks, guest=small_guest()) as vm:
                assert vm.guest is not None
                await vm.guest.check("cat /dev/vdb > /tmp/write_latency; chmod +x /tmp/write_latency")
                async with self.writing(vm.guest, "without a backup"):
                    await trio.sleep(self.seconds)
                await self._beside_fast(vm)
                await self._beside_stalled(vm, number)

    @asynccontextmanager
    async def writing(self, guest: GuestControl, state: str) -> AsyncIterator[Callable[[], Any]]:
        """A guest writes while the block runs; what is called in there begins to count anew."""
        await guest.check(
            f"/tmp/write_latency /dev/vda {self.size // MIB} {PAUSE_US} >/tmp/latency 2>&1 & echo $! >/tmp/pid"
        )
        await guest.check("sleep 0.5; kill -USR1 $(cat /tmp/pid)")
        yield lambda: guest.check("kill -USR1 $(cat /tmp/pid)")
        told = await guest.check(
            "kill $(cat /tmp/pid); while kill -0 $(cat /tmp/pid); do sleep 0.1; done 2>/dev/null; cat /tmp/latency"
        )
        found = Latency(*map(int, told.split()))
        self.latencies.setdefault(state, []).append(found)
        self.say(f"  {state:<36}{found.writes:7} writes, {found.median:6} / {found.p99:6} / {found.worst:7} µs")

    async def _beside_fast(self, vm: RunningQemu) -> None:
        assert vm.guest is not None
        store = self.folder / "local"
        await self.configure(store, machine("bench", vm.qmp, "none"))
        async with (
            self.writing(vm.guest, "backup to a fast target") as anew,
            self.fleece("vm", "backup", "bench") as backup,
        ):
            await until_exported(vm, backup)
            await anew()
            await backup.wait()
        shutil.rmtree(store)

    async def _beside_stalled(self, vm: RunningQemu, number: int) -> None:
        assert vm.guest is not None
        with process("serve", self.folder / "served", self.folder) as server:
            where = json.loads(server.said["url"])
            secrets = {"PBS_PASSWORD": where["secret"], "PBS_FINGERPRINT": where["fingerprint"]}
            repository = f"root@pam!bench@127.0.0.1:{where['port']}:main"
            line = ["vm", "backup", "bench", "--id", f"bench{number}", "--repo", repository]
            async with self.fleece(*line, more=secrets) as backup:
                await until_exported(vm, backup)
                server.process.send_signal(signal.SIGSTOP)
                async with self.writing(vm.guest, "backup to a target that stalls") as anew:
                    await trio.sleep(1)  # until what was on its way has filled every window
                    await anew()
                    await trio.sleep(self.seconds)
                    if backup.poll() is not None:
                        raise SystemExit("the backup was over before its target stalled: a larger --size is needed")
                server.process.send_signal(signal.SIGCONT)
                await backup.wait()

    def scratch(self) -> Path:
        """Where QEMU keeps what guests overwrite."""
        folder = self.folder / "scratch"
        folder.mkdir(exist_ok=True)
        return folder

    @asynccontextmanager
    async def fleece(self, *line: str, more: dict[str, str] | None = None) -> AsyncIterator[trio.Process]:
        """The command, which must end well while the block runs."""
        environment = self.environment | (more or {})
        run = [FLEECE, *line, "--output", "json"]
        with (self.folder / "said").open("wb") as said:
            async with trio.open_nursery() as nursery:
                start = partial(trio.run_process, run, env=environment, stdout=said, stderr=said, check=False)
                command: trio.Process = await nursery.start(start)
                with trio.fail_after(PATIENCE_S):
                    yield command
        if command.returncode != 0:
            raise SystemExit(f"{' '.join(line)}: {(self.folder / 'said').read_text()}")

    # --- one job for all ---------------------------------------------------------------------------------------------

    async def many(self) -> None:
        """Many virtual machines in one job."""
        images = [self.folder / f"vm{number}.raw" for number in range(self.vms)]
        for image in images:
            fill(image, VM_SIZE)
        async with AsyncExitStack() as stack:
            machines = [
                await stack.enter_async_context(
                    RunningQemu.start(self.qemu, [VmDisk(image, "disk0")], memory_mib=64, lifetime_s=1800)
                )
                for image in images
            ]
            for _ in range(self.rounds):
                store = self.folder / "store"
                shutil.rmtree(store, ignore_errors=True)
                sections = [machine(f"vm{number}", vm.qmp, "transient") for number, vm in enumerate(machines)]
                await self.configure(store, *sections, '[job.all]\ntype = "backup"\nvm = ["vm*"]')
                await self._timed(f"{self.vms} VMs, all new", "job", "run", "all")
                await self._timed(f"{self.vms} VMs, nothing changed", "job", "run", "all")
                shutil.rmtree(store)
                await self.configure(store)
                named = [f"drive-{image.stem}.img:{image}" for image in images]
                # QEMU holds the locks of these images; nothing writes to them.
                await self._timed("the same images as files", "backup", *named, "--backup-id", "files", "--force")

    async def configure(self, store: Path, *sections: str) -> None:
        """A new datastore, and a configuration with it."""
        top = f'default-repository = "main"\nscratch = "{self.scratch()}"\n[repository.main]\npath = "{store}"'
        (self.folder / "fleece.toml").write_text("\n".join([top, *sections]))
        await trio.run_process([FLEECE, "datastore", "create", "main"], env=self.environment, capture_stdout=True)

    async def _timed(self, what: str, *line: str) -> None:
        time_of_snapshots = time.time()
        started = time.perf_counter()
        async with self.fleece(*line):
            pass
        seconds = time.perf_counter() - started
        self.jobs.setdefault(what, []).append(seconds)
        self.say(f"  {what:<36}{seconds:8.2f} s")
        await trio.sleep(max(0.0, int(time_of_snapshots) + 1.1 - time.time()))  # snapshots have whole seconds

    # --- the agent ---------------------------------------------------------------------------------------------------

    async def idle_agent(self) -> None:
        """An agent with jobs that are not due."""
        jobs = [
            f'[job.job{number}]\ntype = "backup"\nvm = ["vm{number}"]\nschedule = "*-01-01 00:00"'
            for number in range(self.vms)
        ]
        machines = [machine(f"vm{number}", f"/nowhere/{number}.qmp", "transient") for number in range(self.vms)]
        await self.configure(self.folder / "idle", *machines, *jobs)
        async with trio.open_nursery() as nursery:
            start = partial(trio.run_process, [FLEECE, "agent"], env=self.environment, stderr=subprocess.DEVNULL)
            agent: trio.Process = await nursery.start(start)
            await trio.sleep(3)
            before = cpu_s(agent.pid)
            await trio.sleep(self.seconds)
            share = (cpu_s(agent.pid) - before) / self.seconds
            resident = resident_mb(agent.pid)
            agent.terminate()
        self.agent = {"resident-mb": round(resident, 1), "goal-mb": AGENT_GOAL, "cpu-percent": round(100 * share, 2)}
        self.say(f"  resident {resident:.1f} MB, {100 * share:.2f} % of a core")

    def to_json(self) -> dict[str, Any]:
        """All results."""
        alone = self.latencies.get("without a backup", [])
        return {
            "latency": {
                state: {
                    "writes": sum(one.writes for one in found),
                    **{
                        f"{name}-us": round(statistics.median(getattr(one, name) for one in found))
                        for name in ("median", "p99", "worst")
                    },
                    "ratio-median": round(
                        statistics.median(a.median / b.median for a, b in zip(found, alone, strict=True)), 2
                    ),
                    "ratio-p99": round(statistics.median(a.p99 / b.p99 for a, b in zip(found, alone, strict=True)), 2),
                }
                for state, found in self.latencies.items()
            },
            "jobs": {what: round(statistics.median(found), 2) for what, found in self.jobs.items()},
            "agent": self.agent,
        }


def machine(name: str, qmp: Path | str, bitmap: str) -> str:
    """A virtual machine of the configuration."""
    return f'[vm.{name}]\nqmp = "{qmp}"\nbitmap = "{bitmap}"\nscratch-beside-disks = true'


async def until_exported(vm: RunningQemu, backup: trio.Process) -> None:
    """Wait until the frozen view of a backup is there to be read, or the backup has ended."""
    while backup.poll() is None and not await vm.exports():  # noqa: ASYNC110 - others make it true
        await trio.sleep(0.01)


def fill(path: Path, size: int) -> None:
    """An image of which half can be compressed away."""
    from datastore.primitives import half_random

    with path.open("wb") as file:
        for _ in range(size // (4 * MIB)):
            file.write(half_random(4 * MIB))


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident_mb(pid: int) -> float:
    """Memory that a process has, MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6


def newest_qemu() -> QemuBinary:
    """The newest QEMU at hand."""
    try:
        return backports_qemu()
    except Unavailable:
        return distribution_qemu()


def markdown(document: dict[str, Any]) -> str:
    lines = [
        f"{document['cores']} cores, {document['qemu']}, medians of {document['rounds']} rounds, load"
        f" {document['load']} at the end.",
        "",
    ]
    if document["latency"]:
        lines += [
            f"Writes of a guest with a disk of {format_size(document['size'])}:",
            "",
            "| state | writes | median | p99 | worst | median, p99: times that without a backup |",
            "|---|---|---|---|---|---|",
        ]
    for state, one in document["latency"].items():
        figures = " | ".join(f"{one[f'{name}-us'] / 1000:.2f} ms" for name in ("median", "p99", "worst"))
        lines.append(f"| {state} | {one['writes']} | {figures} | {one['ratio-median']}, {one['ratio-p99']} |")
    lines += ["", *(f"{what}: {seconds} s" for what, seconds in document["jobs"].items())]
    if agent := document["agent"]:
        lines += [
            "",
            f"idle agent: {agent['resident-mb']} MB (goal {agent['goal-mb']}), {agent['cpu-percent']} % of a core",
        ]
    return "\n".join(lines)


async def measure(bench: Bench, phases: Sequence[str]) -> None:
    """Do `phases`, in this order."""
    work = {"latency": bench.latency, "vms": bench.many, "agent": bench.idle_agent}
    for phase in phases:
        bench.say(phase)
        await work[phase]()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="2GiB", help="of the disk that is written to")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each state that has no end of its own")
    parser.add_argument("--vms", type=int, default=20)
    parser.add_argument("--phases", default="latency,vms,agent", help="some of these, in this order")
    parser.add_argument("--output", choices=["text", "markdown", "json"], default="text")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stdout if arguments.output == "text" else sys.stderr, flush=True)

    memory = Path("/dev/shm")
    needed = 4 * parse_size(arguments.size) + 3 * arguments.vms * VM_SIZE + (4 << 30)
    fits = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > needed
    qemu = newest_qemu()
    with tempfile.TemporaryDirectory(prefix="fleece-bench-", dir=memory if fits else None) as folder:
        bench = Bench(Path(folder), qemu, arguments, say)
        trio.run(measure, bench, arguments.phases.split(","))
        document = {
            "cores": os.cpu_count(),
            "qemu": qemu.name,
            "rounds": arguments.rounds,
            "size": bench.size,
            "load": round(os.getloadavg()[0], 2),
            **bench.to_json(),
        }
    print(json.dumps(document, indent=2) if arguments.output == "json" else f"\n{markdown(document)}")


if __name__ == "__main__":
    main()
