"""Pausing a guest: it goes on, whatever becomes of the block, and of the process that paused it."""

import json
import os
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from hypervisor import resume_child, resume_domain
from hypervisor.domain_address import DomainAddress
from hypervisor.errors import FleecingError
from hypervisor.leftovers import clean_killed
from hypervisor.pause import paused
from hypervisor.qmp import connect
from hypervisor.state import RunState, exclusive
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu
from tests.support.scripted_qmp import Refusal, ScriptedQmp


class Notes:
    """What a run would write down."""

    def __init__(self) -> None:
        self.told: list[bool] = []

    async def __call__(self, paused: bool) -> None:
        self.told.append(paused)


async def status(vm: RunningQemu) -> str:
    return str((await vm.execute("query-status"))["status"])


async def test_the_guest_goes_on_however_the_block_ends(qemu: QemuBinary) -> None:
    notes = Notes()
    async with RunningQemu.start(qemu, [], memory_mib=64) as vm, connect(vm.qmp) as qmp:
        await vm.execute("cont")
        async with paused(qmp, str(vm.qmp), notes) as pause:
            assert await status(vm) == "paused"
            assert notes.told == [True]
        assert await status(vm) == "running"
        assert pause.seconds > 0
        with pytest.raises(KeyError):
            async with paused(qmp, str(vm.qmp), notes):
                raise KeyError
        assert await status(vm) == "running"
        with trio.CancelScope() as scope:
            async with paused(qmp, str(vm.qmp), notes):
                scope.cancel()
                await trio.sleep_forever()
        assert await status(vm) == "running"
        assert notes.told == [True, False] * 3
        await vm.execute("stop")
        async with paused(qmp, str(vm.qmp), notes) as pause:
            pass
        assert (await status(vm), pause.seconds, len(notes.told)) == ("paused", 0, 6)


async def test_a_guest_that_does_not_go_on_is_an_error_and_written_down() -> None:
    notes = Notes()
    double = ScriptedQmp(
        {"query-status": {"status": "running", "running": True}, "stop": {}, "cont": Refusal("broken")}
    )
    async with double.serving() as path, connect(path) as qmp:
        with pytest.raises(FleecingError, match=r"cannot let the guest go on of .*broken"):
            async with paused(qmp, str(path), notes):
                pass
        assert notes.told == [True]


async def test_what_a_killed_run_has_paused_goes_on_with_the_next_one(distribution: QemuBinary, tmpfs: Path) -> None:
    async with RunningQemu.start(distribution, [], memory_mib=64) as vm, connect(vm.qmp) as qmp:
        await vm.execute("cont")
        await vm.execute("stop")
        with exclusive(tmpfs / "run", qmp.peer) as run:
            state = RunState(str(vm.qmp), "freeze the guest", "0badcafe", 1, 1)
            await run.save(state)
            assert (await clean_killed(qmp, run, None)).actions == []
            assert await status(vm) == "paused"
            await run.save(replace(state, paused=True))
            assert (await clean_killed(qmp, run, None)).actions == ["let the guest go on that was paused"]
            assert await status(vm) == "running"


@pytest.mark.parametrize(("state", "commands"), [("paused", ["cont"]), ("running", []), ("io-error", [])])
def test_the_child_lets_a_paused_guest_go_on_and_no_other(tmp_path: Path, state: str, commands: list[str]) -> None:
    seen: list[str] = []
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def serve() -> None:
            stream, _ = listening.accept()
            with stream, stream.makefile("rb") as lines:
                stream.sendall(b'{"QMP": {}}\n')
                for line in lines:
                    request = json.loads(line)
                    seen.append(request["execute"])
                    stream.sendall(b'{"event": "NOISE"}\n')
                    answer = {"status": state} if request["execute"] == "query-status" else {}
                    stream.sendall(json.dumps({"return": answer, "id": request["id"]}).encode() + b"\n")

        server = threading.Thread(target=serve)
        server.start()
        assert resume_child.resume(path, os.getpid())
        server.join(30)
        assert seen == ["qmp_capabilities", "query-status", *commands]


def test_the_child_leaves_another_qemu_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        assert resume_child.resume(path, os.getpid() + 1)


class Libvirt:
    """libvirt's bindings with one domain."""

    VIR_DOMAIN_PAUSED = 3

    class libvirtError(Exception):  # noqa: N801 - its name
        pass

    def __init__(self, state: int) -> None:
        self.now, self.seen = state, list[str]()

    def open(self, uri: str) -> "Libvirt":
        self.seen.append(uri)
        if not uri:
            raise self.libvirtError
        return self

    def lookupByName(self, name: str) -> "Libvirt":  # noqa: N802 - its name
        self.seen.append(name)
        return self

    lookupByUUIDString = lookupByName  # noqa: N815 - its name

    def state(self) -> list[int]:
        return [self.now, 0]

    def resume(self) -> None:
        self.seen.append("resume")


def test_the_child_lets_a_domain_of_libvirt_go_on_if_it_is_paused() -> None:
    lib = Libvirt(3)
    assert resume_domain.resume(lib, DomainAddress("test:///default", "web"))
    assert lib.seen == ["test:///default", "web", "resume"]
    lib = Libvirt(1)
    assert resume_domain.resume(lib, DomainAddress("test:///default", "web"))
    assert lib.seen == ["test:///default", "web"]
    assert not resume_domain.resume(lib, DomainAddress("", "web"))
