"""The process behind `fleece nbd connect`: it holds disks ready as block devices or files until it is to end.

It ends by itself when its time is up, when the virtual machine's QEMU ends, or when somebody takes one of the devices
away; by SIGTERM (`fleece nbd disconnect` sends it), SIGINT and SIGHUP. However it ends, everything is as before.
"""

import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import trio

from agent.nbd_records import HeldDisk, Holding, Records, clean_left, in_use, own_holding, with_disk
from core.limits import in_io_thread
from core.nursery import open_nursery
from hypervisor.children import Child
from hypervisor.dirty_regions import Region
from hypervisor.nbd_address import NbdAddress
from hypervisor.nbd_devices import NbdHost
from hypervisor.nbd_files import find_nbdfuse, is_mounted, mounted_file

_LOG = logging.getLogger(__name__)
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class OfferedDisk:
    """A disk that can be read over NBD."""

    name: str  #: of the archive
    address: NbdAddress
    size: int  #: bytes
    regions: Sequence[Region]  #: what is to be read
    changed: int | None = None  #: bytes in `regions`, None if they are all of it


@dataclass(slots=True)
class Offer:
    """Disks to be held ready, as long as their block runs."""

    source: dict[str, Any]  #: for `Holding.source`
    disks: Sequence[OfferedDisk]
    warnings: Sequence[str] = ()  #: of the set-up
    until: Callable[[], Awaitable[str]] | None = None  #: returns when they are gone, with the reason in words


@dataclass(frozen=True, slots=True)
class HoldOrder:
    """How disks are to be held."""

    records: Records
    host: NbdHost
    source: Mapping[str, Any]  #: what is known of it beforehand, for the record
    files: Path | None = None  #: folder of files, None: block devices
    discard: bool = False  #: writable, so that discards reach the server
    limit_s: float | None = None
    scratch: Path | None = None  #: folder of fleecing images
    served: bool = False  #: the disks are served where clients find them, and nothing more is made of them
    writable: bool = False  #: clients can write to what is served


async def hold(
    offer: AbstractAsyncContextManager[Offer], order: HoldOrder, ready: Callable[[dict[str, Any]], None]
) -> str:
    """Hold the disks of `offer` until it is time to end; returns why it was, in words.

    `ready` is called with the document of `fleece nbd connect` when everything can be used. What killed processes have
    left is removed first.

    Raises:
        FleeceError: something could not be set up, or not be undone.
    """
    ended: list[str] = []
    with heard() as signals:
        async with open_nursery() as nursery:
            with trio.CancelScope() as scope:

                def end(why: str) -> None:
                    ended.append(why)
                    scope.cancel()

                async def listen() -> None:
                    async for number in signals:
                        end(f"{signal.Signals(number).name} received")

                nursery.start_soon(listen)
                for words in await clean_left(order.records, order.host):
                    _LOG.info("%s", words)
                await in_io_thread(_check, order)
                await _hold(offer, order, ready, end)
            nursery.cancel_scope.cancel()
    _LOG.info("ended: %s", ended[0])
    return ended[0]


def _check(order: HoldOrder) -> None:
    """Look whether it can be done at all: a VM is not to be frozen for nothing.

    Raises:
        NbdDeviceError: it cannot.
    """
    if order.served:
        return
    if order.files is not None:
        find_nbdfuse(str(order.files))
    else:
        order.host.check()


@contextmanager
def heard() -> Iterator[AsyncIterator[int]]:
    """The signals that end what goes on in the background."""
    # nohup and background shells ignore a signal on purpose.
    with trio.open_signal_receiver(*(one for one in _SIGNALS if signal.getsignal(one) is not signal.SIG_IGN)) as heard:
        yield heard


async def _hold(
    offer: AbstractAsyncContextManager[Offer],
    order: HoldOrder,
    ready: Callable[[dict[str, Any]], None],
    end: Callable[[str], None],
) -> None:
    records = order.records
    holding = own_holding(order.source, time.time(), None, order.scratch)
    await in_io_thread(records.save, holding)
    try:
        async with offer as offered, AsyncExitStack() as stack:
            disks = [_planned(disk, order) for disk in offered.disks]
            if order.files is None and not order.served:
                await in_io_thread(order.host.check, len(disks))
            holding = replace(holding, source=offered.source, disks=disks)
            await in_io_thread(records.save, holding)
            children: dict[str, Child] = {}
            for number, disk in enumerate(offered.disks):
                held, child = await stack.enter_async_context(_held(disk, disks[number], order))
                if child is not None:
                    children[held.path] = child
                holding = with_disk(holding, number, held)
                await in_io_thread(records.save, holding)
            for disk in offered.disks:
                await in_io_thread(records.save_regions, holding, disk.name, disk.regions)
            if order.limit_s is not None:
                holding = replace(holding, expires=time.time() + order.limit_s)
                await in_io_thread(records.save, holding)
            async with open_nursery() as nursery:
                for path, child in children.items():
                    nursery.start_soon(_until_taken, path, child, end)
                if offered.until is not None:
                    nursery.start_soon(_until_gone, offered.until, end)
                ready({**holding.to_json(), "warnings": list(offered.warnings)})
                await trio.sleep(float("inf") if order.limit_s is None else order.limit_s)
                for words in await in_io_thread(in_use, order.host, holding):
                    _LOG.warning("the time is up, although %s", words)
                end("its time is up")
    finally:
        with trio.CancelScope(shield=True):
            if not await in_io_thread(_still_there, order.host, holding):
                await in_io_thread(records.forget, holding)


def _planned(disk: OfferedDisk, order: HoldOrder) -> HeldDisk:
    if order.served:
        return HeldDisk(disk.name, disk.size, not order.writable, uri=str(disk.address))
    file = None if order.files is None else str(order.files / disk.name)
    return HeldDisk(disk.name, disk.size, not order.discard, file=file, changed=disk.changed)


@asynccontextmanager
async def _held(disk: OfferedDisk, planned: HeldDisk, order: HoldOrder) -> AsyncIterator[tuple[HeldDisk, Child | None]]:
    """Device or file, and the program that serves it; of what is only served nothing more."""
    if planned.uri is not None:
        yield planned, None
    elif planned.file is not None:
        async with mounted_file(disk.address, Path(planned.file), disk.size, read_only=planned.read_only) as child:
            yield replace(planned, pid=child.pid, start_time=child.start_time), child
    else:
        opening = order.host.connected(disk.address, read_only=planned.read_only, discard=order.discard)
        async with opening as device:
            child = device.child
            yield replace(planned, number=device.number, pid=child.pid, start_time=child.start_time), child


async def _until_taken(path: str, child: Child, end: Callable[[str], None]) -> None:
    code = await child.wait()
    end(f"{path} was taken away (exit code {code})")


async def _until_gone(until: Callable[[], Awaitable[str]], end: Callable[[str], None]) -> None:
    end(await until())


def _still_there(host: NbdHost, holding: Holding) -> bool:
    """Whether something could not be taken away: then the record stays, for `fleece nbd disconnect`."""
    for disk in holding.disks:
        use = None if disk.number is None else host.use_of(disk.number)
        if use is not None and disk.pid is not None and use.served_by(disk.pid):
            return True
        if disk.file is not None and is_mounted(Path(disk.file)):
            return True
    return False
