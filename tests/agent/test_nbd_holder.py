"""The process behind `fleece nbd connect`, and what it writes down; on a kernel that is made of files."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from agent import cli_nbd
from agent.cli_nbd import disconnect, list_, regions
from agent.invocation import Invocation, Output
from agent.nbd_holder import HoldOrder, Offer, OfferedDisk, hold
from agent.nbd_records import HeldDisk, Holding, Records, clean_left, end_holder, others
from core.errors import BusyError, FleeceError, FormatError, NotFoundError, UsageError
from hypervisor.dirty_regions import Region
from hypervisor.errors import NbdDeviceError
from hypervisor.nbd_address import NbdAddress
from hypervisor.unix_socket import process_start_time
from tests.support.cache import ROOT
from tests.support.fake_nbd import FakeNbd
from tests.support.waiting import until

SIZE = 1 << 20
SOURCE = {"type": "backup", "snapshot": "vm/100/2026-01-02T03:04:05Z"}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNbd]:
    fake = FakeNbd(tmp_path / "kernel")
    monkeypatch.setenv("PATH", fake.path)
    yield fake
    fake.end_all()


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "run/nbd")


class Offered:
    """Disks on offer, and whether they have been taken back."""

    def __init__(self, names: tuple[str, ...] = ("a.img",), **more: Any) -> None:
        self.names, self.more = names, more
        self.begun = self.ended = False

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Offer]:
        address = NbdAddress.unix("/run/x", "x")
        regions = [Region(0, 4096), Region(65536, 512)]
        self.begun = True
        try:
            yield Offer(dict(SOURCE), [OfferedDisk(name, address, SIZE, regions) for name in self.names], **self.more)
        finally:
            self.ended = True


async def held_until_ended(offered: Offered, order: HoldOrder, work: Any) -> str:
    """Why `hold` ended; `work(document)` is run, in the same loop, when it is ready."""
    documents: list[dict[str, Any]] = []
    reasons: list[str] = []
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                reasons.append(await hold(offered.open(), order, documents.append))

            nursery.start_soon(run)
            await until(lambda: documents or reasons)
            await work(documents[0])
    return reasons[0]


# -- the ends of holding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_ends_it_and_all_is_as_before(kernel: FakeNbd, records: Records, number: signal.Signals) -> None:
    offered = Offered(("a.img", "b.img"))

    async def work(document: dict[str, Any]) -> None:
        assert [disk["device"] for disk in document["disks"]] == ["/dev/nbd0", "/dev/nbd1"]
        assert (document["state"], document["pid"], document["expires"]) == ("held", os.getpid(), None)
        (holding,) = records.load()
        assert holding.to_json() == {name: value for name, value in document.items() if name != "warnings"}
        assert records.regions(holding, "/dev/nbd1") == [(0, 4096), (65536, 512)]
        assert [kernel.user(disk.number or 0) for disk in holding.disks] == [disk.pid for disk in holding.disks]
        os.kill(os.getpid(), number)

    order = HoldOrder(records, kernel.host(), SOURCE)
    assert await held_until_ended(offered, order, work) == f"{number.name} received"
    assert (kernel.user(0), kernel.user(1), offered.ended) == (None, None, True)
    assert not records.folder.exists()


async def test_no_view_is_made_where_there_is_nothing_to_show_it_with(
    kernel: FakeNbd, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VM would be frozen for nothing."""
    offered = Offered(("a.img", "b.img"))

    async def failed(words: str, files: Path | None = None) -> None:
        with pytest.raises(NbdDeviceError, match=words):
            await hold(offered.open(), HoldOrder(records, kernel.host(), SOURCE, files), lambda document: None)
        assert (records.load(), kernel.calls()) == ([], [])

    for number in range(kernel.devices - 1):
        kernel.take(number)
    await failed("2 are needed, and of 4 only 1 can be used: the others are in use, reserved or missing")
    assert (offered.begun, offered.ended) == (True, True)  # before, it is not known how many disks there are
    offered.begun = False
    kernel.take(kernel.devices - 1)
    await failed("all 4 are in use, reserved or missing")
    (kernel.root / "sys/module/nbd/parameters/nbds_max").unlink()
    await failed("the kernel module nbd is not loaded; as root: modprobe nbd")
    monkeypatch.setenv("PATH", str(kernel.root / "nothing"))
    await failed("nbdfuse is not installed", kernel.root)
    assert not offered.begun


async def test_its_time_is_up(kernel: FakeNbd, records: Records) -> None:
    offered = Offered()

    async def work(document: dict[str, Any]) -> None:
        assert 0 <= document["expires"] - document["since"] <= 60

    order = HoldOrder(records, kernel.host(), SOURCE, limit_s=0.05)
    assert await held_until_ended(offered, order, work) == "its time is up"
    assert (kernel.user(0), offered.ended, records.load()) == (None, True, [])


async def test_a_device_that_somebody_takes_away_ends_it(kernel: FakeNbd, records: Records) -> None:
    offered = Offered(("a.img", "b.img"))

    async def work(document: dict[str, Any]) -> None:
        await trio.run_process([str(kernel.root / "bin/qemu-nbd"), "--disconnect=/dev/nbd1"], capture_stdout=True)

    reason = await held_until_ended(offered, HoldOrder(records, kernel.host(), SOURCE), work)
    assert reason == "/dev/nbd1 was taken away (exit code 0)"
    assert (kernel.user(0), offered.ended, records.load()) == (None, True, [])


async def test_the_end_of_what_is_offered_ends_it(kernel: FakeNbd, records: Records) -> None:
    gone = trio.Event()

    async def ended() -> str:
        await gone.wait()
        return "the VM's QEMU has ended"

    async def work(document: dict[str, Any]) -> None:
        gone.set()

    offered = Offered(until=ended)
    reason = await held_until_ended(offered, HoldOrder(records, kernel.host(), SOURCE), work)
    assert (reason, kernel.user(0), offered.ended) == ("the VM's QEMU has ended", None, True)


async def test_a_second_disk_that_fails_leaves_no_first(kernel: FakeNbd, records: Records) -> None:
    kernel.behave("fails", 1, "it is broken")
    offered = Offered(("a.img", "b.img"))
    with pytest.raises(NbdDeviceError, match="it is broken"):
        await hold(offered.open(), HoldOrder(records, kernel.host(), SOURCE), lambda document: None)
    assert (kernel.user(0), offered.ended, records.load()) == (None, True, [])


async def test_who_cannot_be_told_does_not_keep_it(kernel: FakeNbd, records: Records) -> None:
    def gone(document: object) -> None:
        raise FleeceError("connect", "it", "the command was killed before it was usable")

    offered = Offered()
    with pytest.raises(FleeceError, match="was killed before it was usable"):
        await hold(offered.open(), HoldOrder(records, kernel.host(), SOURCE), gone)
    assert (kernel.user(0), offered.ended, records.load()) == (None, True, [])


# -- killed processes -------------------------------------------------------------------------------------------------

#: Holds a disk in a process of its own; gives its document in one line.
HOLDER = """
import json, sys, trio
from pathlib import Path
from agent.nbd_holder import HoldOrder, hold
from agent.nbd_records import Records
from tests.agent.test_nbd_holder import Offered, SOURCE
from tests.support.fake_nbd import FakeNbd
FakeNbd.__post_init__ = lambda self: None
host = FakeNbd(Path(sys.argv[1])).host()
order = HoldOrder(Records(Path(sys.argv[2])), host, SOURCE)
trio.run(hold, Offered().open(), order, lambda document: print(json.dumps(document), flush=True))
"""


@asynccontextmanager
async def holder(kernel: FakeNbd, records: Records) -> AsyncIterator["subprocess.Popen[str]"]:
    """A process that holds a disk."""
    line = [sys.executable, "-c", HOLDER, str(kernel.root), str(records.folder)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:  # noqa: ASYNC220
        try:
            assert process.stdout is not None
            text = await trio.to_thread.run_sync(process.stdout.readline)
            assert json.loads(text)["state"] == "held"
            yield process
        finally:
            process.kill()


async def test_disconnecting_waits_for_the_process(kernel: FakeNbd, records: Records) -> None:
    async with holder(kernel, records) as process:
        (holding,) = records.load()
        assert (holding.pid, holding.alive, others(kernel.host(), [holding])) == (process.pid, True, [])
        kernel.take(2)
        assert [use.number for use in others(kernel.host(), [holding])] == [2]
        with trio.fail_after(60):
            assert await end_holder(records, holding, kernel.host()) == []
        assert (kernel.user(0), kernel.user(2), records.load()) == (None, 1, [])


async def test_a_killed_process_leaves_a_record_that_goes_with_the_next(kernel: FakeNbd, records: Records) -> None:
    async with holder(kernel, records) as process:
        process.kill()
        await until(lambda: kernel.user(0) is None)
        await until(lambda: process_start_time(process.pid) is None)
        (left,) = records.load()
        assert (left.alive, left.to_json()["state"]) == (False, "left")
        # What it held is somebody else's by now: it is left to him.
        kernel.take(0)

        async def work(document: dict[str, Any]) -> None:
            assert [holding.pid for holding in records.load()] == [os.getpid()]
            os.kill(os.getpid(), signal.SIGTERM)

        await held_until_ended(Offered(), HoldOrder(records, kernel.host(), SOURCE), work)
        assert (kernel.user(0), records.load()) == (1, [])


async def test_a_program_that_outlived_its_holder_is_ended(kernel: FakeNbd, records: Records) -> None:
    host = kernel.host()
    async with host.connected(NbdAddress.unix("/run/x", "x")) as device:
        child = device.child
        disk = HeldDisk("a.img", SIZE, number=0, pid=child.pid, start_time=child.start_time)
        left = Holding(2**22 + 1, 7, SOURCE, time.time(), None, [disk])
        records.save(left)
        (words,) = await clean_left(records, host)
        assert words == f"/dev/nbd0 of process {left.pid}, which was killed, is free again"
        assert (kernel.user(0), records.load()) == (None, [])


async def test_what_is_no_empty_file_is_not_removed(kernel: FakeNbd, records: Records, tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("content", b"mine")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other").touch()
    names = ("empty", "content", "link", "none")
    disks = [HeldDisk(name, SIZE, file=str(tmp_path / name)) for name in names]
    uris = []
    with socket.socket(socket.AF_UNIX) as left, socket.socket(socket.AF_UNIX) as used:
        for number, one in enumerate((left, used)):
            one.bind(str(tmp_path / f"s{number}"))
            uris.append(str(NbdAddress.unix(tmp_path / f"s{number}", "")))
            disks.append(HeldDisk(f"s{number}", SIZE, uri=uris[-1]))
        left.close()
        used.listen()
        records.save(Holding(2**22 + 1, 7, SOURCE, time.time(), None, disks))
        assert await clean_left(records, kernel.host()) == [
            f"removed {tmp_path}/empty of process 4194305, which was killed",
            f"removed the socket of process 4194305, which was killed: {uris[0]}",
        ]
    there = ["content", "link", "other", "s1"]
    assert [name for name in (*names, "other", "s0", "s1") if (tmp_path / name).exists()] == there


# -- records ----------------------------------------------------------------------------------------------------------


def test_records_go_round() -> None:
    disk = HeldDisk("a.img", 5, False, 3, None, 17, 18, 19)
    holding = Holding(1, 2, SOURCE, 3.5, 4.5, [disk, HeldDisk("b.img", 6, file="/x/b.img")], "/scratch")
    assert Holding.parse(holding.pack(), 1, 2, "it") == holding


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b"nonsense", b"[" * 100_000, b"\xff",
     b'{"source": {}, "since": "1", "expires": null, "disks": []}',
     b'{"source": {}, "since": 1, "expires": null, "disks": [{"name": 1, "size": 1, "read_only": true}]}',
     b'{"source": {}, "since": 1, "expires": null, "disks": [{"name": "a", "size": true, "read_only": true}]}',
     b'{"source": [], "since": 1, "expires": null, "disks": []}'],
)  # fmt: skip
def test_a_record_that_nobody_wrote_is_left_out(records: Records, text: bytes) -> None:
    with pytest.raises(FormatError):
        Holding.parse(text, 1, 2, "it")
    records.folder.mkdir(parents=True)
    (records.folder / "holder-1-2.json").write_bytes(text)
    for name in ("holder-x-2.json", "holder-1-2.txt", "holder--1-2.json", ".holder-1-2.json"):
        (records.folder / name).write_bytes(Holding(1, 2, SOURCE, 1, None).pack())
    assert records.load() == []


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def invocation(kernel: FakeNbd, records: Records, monkeypatch: pytest.MonkeyPatch) -> Invocation:
    monkeypatch.setattr(cli_nbd, "place", lambda invocation: (records, kernel.host()))
    return Invocation(output=Output.JSON)


def own(records: Records, *disks: HeldDisk) -> Holding:
    """A record of this process."""
    pid = os.getpid()
    holding = Holding(pid, process_start_time(pid) or 0, SOURCE, time.time(), None, disks)
    records.save(holding)
    return holding


def test_list_tells_what_is_held_and_what_is_somebody_elses(
    kernel: FakeNbd, records: Records, invocation: Invocation, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel.take(1, os.getpid())
    kernel.take(3)
    holding = own(records, HeldDisk("a.img", SIZE, number=1, pid=os.getpid()))
    list_(invocation)
    first, second = json.loads(capsys.readouterr().out)
    assert first == holding.to_json()
    assert (second["state"], second["source"], second["disks"][0]["device"]) == (
        "other",
        {"type": "other"},
        "/dev/nbd3",
    )
    assert set(second) == set(first)
    assert set(second["disks"][0]) == set(first["disks"][0])
    list_(Invocation())
    text = capsys.readouterr().out
    assert "/dev/nbd1" in text
    assert SOURCE["snapshot"] in text
    assert "not Fleece's" in text


def test_disconnect_touches_nothing_that_is_not_fleeces(
    kernel: FakeNbd, records: Records, invocation: Invocation
) -> None:
    kernel.take(1)
    with pytest.raises(BusyError, match="cannot disconnect /dev/nbd1: Fleece has not connected it"):
        disconnect(invocation, ["/dev/nbd1"], force=True)
    disconnect(invocation, everything=True, force=True)
    with pytest.raises(NotFoundError, match="it is not connected"):
        disconnect(invocation, ["/dev/nbd2"])
    with pytest.raises(NotFoundError, match="it is not connected"):
        disconnect(invocation, ["/etc/passwd"])
    for paths, everything in (([], False), (["/dev/nbd1"], True)):
        with pytest.raises(UsageError, match="either devices or --all are needed"):
            disconnect(invocation, paths, everything)
    assert (kernel.user(1), kernel.calls()) == (1, [])


def test_what_is_mounted_is_disconnected_by_force_only(
    kernel: FakeNbd, records: Records, invocation: Invocation
) -> None:
    kernel.take(1, os.getpid())
    (kernel.root / "mounts").write_text("22 1 43:16 / /mnt/disk ro - ext4 /dev/nbd1 ro\n")
    own(records, HeldDisk("a.img", SIZE, number=1, pid=os.getpid()))
    for paths, everything in ((["nbd1"], False), (None, True)):
        with pytest.raises(BusyError, match="nbd1 is mounted on /mnt/disk; unmount it first, or give --force"):
            disconnect(invocation, paths, everything)


def test_regions_are_told_of_a_device_by_any_of_its_names(
    kernel: FakeNbd, records: Records, invocation: Invocation, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel.take(1, os.getpid())
    holding = own(records, HeldDisk("a.img", SIZE, number=1, pid=os.getpid()))
    with pytest.raises(FleeceError, match="it was not written down"):
        regions(invocation, "/dev/nbd1")
    records.save_regions(holding, "a.img", [Region(0, 4096), Region(8192, 10)])
    for name in ("/dev/nbd1", "nbd1"):
        regions(invocation, name)
        assert json.loads(capsys.readouterr().out) == [{"offset": 0, "length": 4096}, {"offset": 8192, "length": 10}]
    regions(Invocation(), "nbd1")
    assert capsys.readouterr().out == "0 4096\n8192 10\n"
