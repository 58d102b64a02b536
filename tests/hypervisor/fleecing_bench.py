"""What the tests of fleecing share: a VM on small disks, a datastore of the simplest kind, and guest writes."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from core.disks import DiskSource, ExtentState
from hypervisor.bitmaps import BaseInfo
from hypervisor.errors import FleecingError
from hypervisor.extents import CHUNK_SIZE
from hypervisor.vm import Scratch, frozen_view
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningProcess

TARGET = "0badcafe"
MIB = 1024**2


@dataclass
class Store:
    """The newest snapshot of each disk, as bytes, and the times of the finished snapshots."""

    images: dict[str, bytes] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    base: int | None = None
    clock: int = 2_000_000_000

    def next_id(self) -> int:
        self.clock += 1
        return self.clock

    def base_of(self, archive: str) -> BaseInfo | str:
        if self.base is None:
            return "first backup"
        if archive not in self.images:
            return "disk is not in the previous snapshot"
        return BaseInfo(self.base, len(self.images[archive]))

    async def is_finished(self, number: int) -> bool:
        return number in self.finished


@dataclass
class Read:
    """What one backup read of a disk."""

    image: bytes
    mode: str
    reason: str
    read: int
    zeros: int


async def read_disk(
    source: DiskSource, old: bytes | None, between: Callable[[], Any] | None = None, order: random.Random | None = None
) -> Read:
    """The disk as the backup sees it: the old image with every chunk that is not CLEAN replaced."""
    extents = await source.extents()
    image = bytearray(old if old is not None and source.plan.base is not None else bytes(source.size))
    assert len(image) == source.size
    chunks = []
    zeros = 0
    position = 0
    for offset, length, state in extents:
        assert offset == position
        position += length
        if state is ExtentState.ZERO:
            image[offset : offset + length] = bytes(length)
            zeros += length
        elif state is ExtentState.DATA:
            chunks += [(at, min(CHUNK_SIZE, offset + length - at)) for at in range(offset, offset + length, CHUNK_SIZE)]
        else:
            assert source.plan.base is not None
    assert position == source.size
    if order is not None:
        order.shuffle(chunks)
    for offset, length in chunks:
        if between is not None:
            await between()
        buffer = bytearray(b"\xee" * length)
        await source.read_into(offset, buffer)
        image[offset : offset + length] = buffer
        await source.discard(offset, length)
    mode = "full" if source.plan.base is None else "incremental"
    return Read(bytes(image), mode, source.plan.reason, sum(length for _, length in chunks), zeros)


@dataclass
class Bench:
    """One VM, one target."""

    folder: Path
    store: Store = field(default_factory=Store)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def scratch(self, **options: Any) -> Scratch:
        return Scratch(
            self.folder / "scratch", **{"allow_shared": True, "min_free": 0, "min_free_fraction": 0, **options}
        )

    def view(self, vm: RunningProcess, number: int | None = None, **options: Any) -> Any:
        new_id = self.store.next_id() if number is None else number
        arguments: dict[str, Any] = {
            "target": TARGET,
            "base_of": self.store.base_of,
            "finished": self.store.is_finished,
            "scratch": self.scratch(),
            "run_dir": self.run_dir,
            **options,
        }
        return frozen_view(vm.qmp, new_id=new_id, **arguments)

    async def backup(
        self, vm: RunningProcess, *, between: Callable[[], Any] | None = None, commit: bool = True, **options: Any
    ) -> dict[str, Read]:
        """One whole backup into `store`."""
        number = self.store.next_id()
        async with self.view(vm, number, **options) as view:
            reads = {
                source.name: await read_disk(source, self.store.images.get(source.name), between)
                for source in view.sources
            }
            if commit:
                self.store.images.update({name: read.image for name, read in reads.items()})
                self.store.finished.add(number)
                self.store.base = number
                view.commit()
        self.warnings = view.warnings
        return reads


@asynccontextmanager
async def hanging_reader(vm: RunningProcess, bench: Bench) -> AsyncIterator[None]:
    """A reader of the first disk, of 32 MiB, that takes none of the answers it has asked for, as one that is stopped.

    The view that it reads has ended when the block begins, and QEMU holds its export until the block ends.
    """
    nbd = pytest.importorskip("nbd")
    reader = nbd.NBD()
    with pytest.raises(FleecingError, match="QEMU still holds the exports fleece-e0"):
        async with bench.view(vm) as view:
            reader.connect_uri(str(view.sources[0].address))
            for part in range(4):
                reader.aio_pread(nbd.Buffer(8 * MIB), part * 8 * MIB)
    yield
    reader.__del__()  # libnbd's binding has no close
    del reader._o


async def facts(vm: RunningProcess, bench: Bench) -> dict[str, Any]:
    """Everything a backup must leave as it was, generated names included."""
    nodes = await vm.execute("query-named-block-nodes", {"flat": True})
    blocks = await vm.execute("query-block")
    return {
        "nodes": sorted(node["node-name"] for node in nodes),
        "roots": {block.get("qdev", ""): block["inserted"]["node-name"] for block in blocks if "inserted" in block},
        "exports": await vm.exports(),
        "files": sorted(str(path) for path in bench.folder.rglob("*")),
        "fds": await vm.execute("query-fdsets"),
    }


async def make_qcow2(qemu: QemuBinary, path: Path, size: int, *options: str) -> None:
    """An empty image of `size` bytes."""
    await trio.run_process([qemu.img, "create", "-q", "-f", "qcow2", *options, str(path), str(size)])
