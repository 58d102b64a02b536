"""When the disks of a machine that runs are taken for whole. With real machines: tests/agent/test_live_restore.py."""

import struct
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from core.errors import TargetError
from hypervisor.errors import VmStateError
from hypervisor.live_restore import LiveDisk, Streaming


class Told:
    """A QEMU that has no jobs, and whose block graph is `nodes`: names, each with its children by kind."""

    where = "a test"

    def __init__(self, nodes: dict[str, dict[str, str]]) -> None:
        self.asked: list[str] = []
        self.jobs: list[dict[str, Any]] = []
        self.status = "running"
        self._nodes = nodes

    async def execute(self, command: str, arguments: Any = None, **_: Any) -> Any:
        self.asked.append(command)
        if command == "x-debug-query-block-graph":
            numbers = {name: number for number, name in enumerate(self._nodes)}
            return {
                "nodes": [{"id": number, "type": "block-driver", "name": name} for name, number in numbers.items()],
                "edges": [
                    {"parent": numbers[parent], "child": numbers[child], "name": kind}
                    for parent, below in self._nodes.items()
                    for kind, child in below.items()
                ],
            }
        return {"query-block-jobs": self.jobs, "query-status": {"status": self.status}}.get(command)


def disk_at(path: Path) -> LiveDisk:
    return LiveDisk(0, "drive-scsi0.img", str(path), "qcow2", 1 << 20, "/nowhere", None)


def image(path: Path, backing: int) -> Path:
    path.write_bytes(b"QFI\xfb" + struct.pack(">IQ", 3, backing) + bytes(4096))
    return path


async def test_a_disk_is_whole_when_qemu_and_its_own_file_say_so(tmp_path: Path) -> None:
    disk = disk_at(image(tmp_path / "a.qcow2", 0))
    await Streaming([disk]).until_whole(Told({"disk0": {}}))  # type: ignore[arg-type]
    image(tmp_path / "a.qcow2", 512)
    with pytest.raises(VmStateError, match="still says that it needs the backup"):
        await Streaming([disk]).until_whole(Told({"disk0": {}}))  # type: ignore[arg-type]
    Path(disk.target).write_bytes(b"x" * 8192)
    with pytest.raises(TargetError, match="no qcow2 file"):
        await Streaming([disk]).until_whole(Told({"disk0": {}}))  # type: ignore[arg-type]


@pytest.mark.parametrize("nodes", [{"disk0": {"backing": "disk0-backup"}, "disk0-backup": {}}, {"other": {}}])
async def test_a_disk_with_the_backup_below_or_that_is_not_there_is_to_be_filled(
    nodes: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    qemu = Told(nodes)
    look = await Streaming([disk_at(tmp_path / "a.qcow2")]).look(qemu)  # type: ignore[arg-type]
    assert not look.whole
    assert "block-stream" in qemu.asked


async def test_what_stops_again_and_again_is_let_go_on_ever_more_rarely_and_told_once_a_minute(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    qemu = Told({})
    job = {"device": "fleece-r0", "status": "paused", "paused": True, "ready": False, "type": "stream"}
    qemu.jobs = [job | {"io-status": "nospace", "len": 4, "offset": 1}]
    said: list[str] = []
    streaming = Streaming([disk_at(tmp_path / "a.qcow2")], said.append)
    with trio.move_on_after(59):
        await streaming.until_whole(qemu)  # type: ignore[arg-type]
    assert 10 < qemu.asked.count("block-job-resume") < 20
    assert said == ["drive-scsi0.img: no space is left where its target lies; that is tried again and again"]
    qemu.jobs, qemu.status, qemu.asked = [], "io-error", []
    with trio.move_on_after(59):
        await streaming.until_whole(qemu)  # type: ignore[arg-type]
    assert 10 < qemu.asked.count("cont") < 20
    assert len(said) == 2
    assert "the guest was stopped" in said[1]
    # What went on for a while before it stopped is let go on at once.
    await trio.sleep(15)
    qemu.asked = []
    await streaming.look(qemu)  # type: ignore[arg-type]
    assert "cont" in qemu.asked


async def test_a_device_goes_over_when_that_can_be_written_down(tmp_path: Path, autojump_clock: MockClock) -> None:
    # The guest's requests wait meanwhile: a folder without space must not end the process that will let them go on.
    qemu = Told({})
    job = {"device": "fleece-r0", "status": "pending", "paused": False, "ready": True, "type": "mirror"}
    qemu.jobs = [job | {"len": 4, "offset": 4}]
    room = trio.current_time() + 30
    said: list[str] = []

    async def going_over(_disk: LiveDisk) -> None:
        if trio.current_time() < room:
            raise TargetError("write", "/m/live-restore.json", "No space left on device")

    streaming = Streaming([disk_at(tmp_path / "a.raw")], said.append, going_over)
    with trio.move_on_after(20):
        await streaming.until_whole(qemu)  # type: ignore[arg-type]
    assert "job-finalize" not in qemu.asked
    assert len(said) == 1
    assert "No space left on device; that is tried again and again" in said[0]
    with trio.move_on_after(20):
        await streaming.until_whole(qemu)  # type: ignore[arg-type]
    assert "job-finalize" in qemu.asked
