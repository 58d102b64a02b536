"""When the disks of a machine that runs are taken for whole. With real machines: tests/agent/test_live_restore.py."""

import struct
from pathlib import Path
from typing import Any

import pytest

from core.errors import TargetError
from hypervisor.errors import VmStateError
from hypervisor.live_restore import LiveDisk, Streaming


class Told:
    """A QEMU that has no jobs, and whose block graph is `nodes`: names, each with its children by kind."""

    where = "a test"

    def __init__(self, nodes: dict[str, dict[str, str]]) -> None:
        self.asked: list[str] = []
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
        return {"query-block-jobs": [], "query-status": {"status": "running"}}.get(command)


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
