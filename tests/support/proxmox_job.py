"""What the backup job of Proxmox VE does around a backup provider, on the double of its QEMU."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hypervisor.provided import ProvidedBitmap, ProvidedDisk
from hypervisor.qmp import connect
from tests.support.proxmox_qemu import ProxmoxQemu

TARGET_ID: Final = "snapshot-access:fleece"
_MODES: Final = {"used": ProvidedBitmap.REUSE, "new": ProvidedBitmap.NEW, "missing-recreated": ProvidedBitmap.NEW}


@dataclass
class BackupJob:
    """What Proxmox VE does around a backup provider."""

    double: ProxmoxQemu
    folder: Path
    success: bool = False
    disks: list[ProvidedDisk] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.double.path.parent / "nbd"

    @asynccontextmanager
    async def prepared(self, modes: dict[str, str]) -> AsyncIterator[list[ProvidedDisk]]:
        """Fleecing images, access, server and exports with their bitmaps; at the end the other way round."""
        async with connect(self.double.path) as qmp:
            for device in modes:
                nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
                (size,) = [node["image"]["virtual-size"] for node in nodes if node["node-name"] == device]
                image = self.folder / f"{device}.fleecing"
                with image.open("wb") as file:
                    file.truncate(size)
                below = {"driver": "file", "filename": str(image), "discard": "unmap"}
                node = {"driver": "raw", "node-name": f"{device}-fleecing", "discard": "unmap", "file": below}
                await qmp.execute("blockdev-add", node)
            asked = [{"device": device, "bitmap-mode": mode} for device, mode in modes.items()]
            told = await qmp.execute("backup-access-setup", {"target-id": TARGET_ID, "devices": asked})
            await qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(self.socket)}}})
            for one in told:
                export = {"type": "nbd", "id": one["device"], "name": one["device"], "node-name": one["node-name"]}
                if "bitmap-name" in one:
                    export["bitmaps"] = [{"node": one["bitmap-node-name"], "name": one["bitmap-name"]}]
                await qmp.execute("block-export-add", {**export, "writable": True})
        try:
            yield [
                ProvidedDisk(one["device"], one["size"], _MODES.get(one["bitmap-action"], ProvidedBitmap.NONE))
                for one in told
            ]
        finally:
            async with connect(self.double.path) as qmp:
                for device in modes:
                    await qmp.execute("block-export-del", {"id": device, "mode": "hard"})
                await qmp.poll("query-block-exports", lambda exports: exports == [], timeout_s=30)
                await qmp.execute("nbd-server-stop")
                teardown = {"target-id": TARGET_ID, "success": self.success}
                await qmp.execute("backup-access-teardown", teardown)
                for device in modes:
                    await qmp.execute("blockdev-del", {"node-name": f"{device}-fleecing"})
