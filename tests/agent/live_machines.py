"""Live restores and the machines that run meanwhile, for tests."""

import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from agent.live_restore import LiveOptions, held, prepare, run
from agent.live_state import STATE_NAME, LiveState
from agent.snapshot_archives import OpenSnapshot, open_snapshot
from agent.vm_restore import RestoreOrder
from agent.vm_script import ScriptOptions
from core.nursery import open_nursery
from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.names import Group
from repository.archive import open_cache
from repository.interface import FIXED_CHUNK_SIZE
from repository.local import open_local
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import OwnQmp
from tests.support.snapshots import write_snapshot
from tests.support.waiting import until

CHUNK = FIXED_CHUNK_SIZE
CLUSTER = 65536
SIZE = 5 * CHUNK + CLUSTER
CONTENT = os.urandom(2 * CHUNK) + bytes(CHUNK) + os.urandom(2 * CHUNK + CLUSTER)
COMMAND = [
    *("qemu-system-x86_64", "-m", "64", "-nodefaults", "-machine", "q35"),
    *("-drive", "if=none,id=a,file=/old/a.raw", "-device", "virtio-blk-pci,drive=a,id=disk0"),
]
FILES = {"drive-disk0.img.fidx": CONTENT, "qemu-command.json.blob": json.dumps(COMMAND).encode()}


@dataclass
class Gate:
    """Lets only some of the disk be read, so that tests know how far everything is."""

    until: int = 0  #: bytes from the beginning that can be read
    opened: trio.Event = field(default_factory=trio.Event)
    delay_s: float = 0  #: before each read of a disk of `SIZE` bytes

    def open(self) -> None:
        self.until = SIZE
        self.opened.set()


@asynccontextmanager
async def opened(store: Path, files: Mapping[str, bytes] = FILES) -> AsyncIterator[OpenSnapshot]:
    """The snapshot vm/web with `files`."""
    repo = await open_local(store, name="test")
    try:
        snapshot = await repo.latest(Group.parse("vm/web")) or await write_snapshot(
            repo, "vm/web", 1000, files, chunk_size=CHUNK
        )
        async with (
            open_cache(2 * CHUNK) as cache,
            open_snapshot(repo, snapshot, ChunkCodec(), cache, Progress()) as found,
        ):
            yield found
    finally:
        repo.close()


class _Told(Progress):
    """Keeps what is logged."""

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def log(self, message: str) -> None:
        self.said.append(message)


@dataclass
class Machine:
    """A live restore into `folder`, and the machine that runs."""

    store: Path
    folder: Path
    qemu: QemuBinary
    format: str  #: empty: by the names of the targets
    extra: tuple[str, ...] = ("-S",)
    files: Mapping[str, bytes] = field(default_factory=lambda: FILES)
    targets: Mapping[str, str] = field(default_factory=dict)
    force: bool = False
    said: list[str] = field(default_factory=list)  #: what the last restore has logged

    @property
    def target(self) -> Path:
        return self.folder / f"drive-disk0.{self.format}"

    @property
    def whole(self) -> bool:
        return not (self.folder / STATE_NAME).exists()

    async def restore(self, task_status: "trio.TaskStatus[dict[str, Any]]" = trio.TASK_STATUS_IGNORED) -> None:
        """Begin, or go on where another one was cancelled; `started` comes with what is told."""
        async with opened(self.store, self.files) as found:
            if self.whole:
                order = RestoreOrder(
                    folder=self.folder, format=self.format or None, targets=self.targets, force=self.force
                )  # fmt: skip
                options = LiveOptions(script=ScriptOptions(), program=self.qemu.system, accel=["tcg"], extra=self.extra)
                state = await prepare(found, order, options, Progress())
            else:
                state = LiveState.load(self.folder)
            with held(self.folder):
                await run(found, state, _Told(self.said), task_status.started)

    @asynccontextmanager
    async def restoring(self) -> AsyncIterator[tuple[trio.CancelScope, dict[str, Any]]]:
        """The restore runs beside the block; cancelling the scope is the end of its process."""
        async with open_nursery() as nursery:
            scope = trio.CancelScope()

            async def work(task_status: "trio.TaskStatus[dict[str, Any]]") -> None:
                with scope:
                    await self.restore(task_status)

            yield scope, await nursery.start(work)

    @asynccontextmanager
    async def qmp(self) -> AsyncIterator[OwnQmp]:
        qmp = await OwnQmp.connect(self.folder / "run/qmp.sock")
        try:
            yield qmp
        finally:
            await qmp.aclose()

    async def write(self, *commands: str, disk: str = "disk0") -> None:
        """Write as the guest would."""
        async with self.qmp() as qmp:
            for command in commands:
                device = f"/machine/peripheral/{disk}/virtio-backend"
                line = f'qemu-io -d {device} "{command}"'
                assert await qmp.execute("human-monitor-command", {"command-line": line}) == ""

    def content(self) -> bytes:
        raw = self.folder / "as-raw"
        line = [self.qemu.img, "convert", "-f", self.format, "-O", "raw", str(self.target), str(raw)]
        subprocess.run(line, check=True)
        return raw.read_bytes()

    async def kill(self) -> None:
        """End QEMU as a crash of the host would."""
        pid = int((self.folder / "run/qemu.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        await until(lambda: ended(pid))

    async def quit(self) -> None:
        async with self.qmp() as qmp:
            await qmp.execute("quit")
        pid = self.folder / "run/qemu.pid"
        await until(lambda: not pid.exists())


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits for its parent to notice that it is."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def nbdkits() -> list[int]:
    """Servers that this process has started."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in map(int, children) if "nbdkit" in Path(f"/proc/{pid}/comm").read_text()]
