"""From which backup the dirty bitmaps of a storage count: what a backup provider has to remember by itself.

Proxmox VE has one bitmap for each storage and disk, named after the storage, and tells nothing about it. So it is noted
beside it, for each VM: the QEMU process that has the bitmaps, and the snapshot they count from. Bitmaps live as long as
that process does and nobody else touches them, so the note is right as long as the process lives; after a migration it
is another process. The note is written before a snapshot is finished: if that fails, the newest snapshot is not the one
that is noted, and the next backup reads everything. docs/proxmox-provider.md, "Incremental backups".
"""

import json
import os
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from core.errors import FleeceError, os_reason
from hypervisor.unix_socket import Peer, process_start_time

#: Bytes of a note.
_MAX_NOTE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class BitmapNote:
    """The bitmaps of one VM and storage."""

    pid: int  #: of its QEMU
    start_time: int  #: of that process, clock ticks after boot
    target: str  #: repository, namespace and group
    base: int  #: backup time of the snapshot that the bitmaps count from (Unix seconds)
    devices: tuple[str, ...]  #: that have a bitmap

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """Read what `pack` wrote; None if it did not."""
        try:
            value = json.loads(data)
            devices = tuple(value["devices"])
            note = cls(value["pid"], value["start_time"], value["target"], value["base"], devices)
        except (ValueError, RecursionError, KeyError, TypeError):
            return None
        numbers = (note.pid, note.start_time, note.base)
        texts = (note.target, *note.devices)
        if all(type(one) is int and one > 0 for one in numbers) and all(isinstance(one, str) for one in texts):
            return note
        return None

    def pack(self) -> bytes:
        """The note as JSON."""
        return json.dumps(asdict(self)).encode()

    def holds(self) -> bool:
        """Whether that QEMU still runs."""
        return process_start_time(self.pid) == self.start_time

    def is_of(self, peer: Peer) -> bool:
        """Whether it is about the QEMU `peer`."""
        return (self.pid, self.start_time) == (peer.pid, peer.start_time)


class BitmapNotes:
    """The notes of one storage and VM, in the run folder."""

    def __init__(self, run_dir: Path, storage: str, vmid: int) -> None:
        self._path = run_dir / "provider" / f"{storage}-{vmid}.json"

    def read(self) -> BitmapNote | None:
        """What is noted and still holds; None if nothing is, or it is not to be relied on."""
        try:
            with open(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                    return None
                data = file.read(_MAX_NOTE + 1)
        except OSError:
            return None
        note = BitmapNote.parse(data) if len(data) <= _MAX_NOTE else None
        return note if note is not None and note.holds() else None

    def write(self, peer: Peer | None, target: str, base: int, devices: Iterable[str]) -> None:
        """Note that the bitmaps of `devices` in the QEMU `peer` count from `base`; without either, forget.

        Raises:
            FleeceError: it cannot be written. The snapshot `base` must not be finished then.
        """
        names = tuple(sorted(devices))
        try:
            if peer is None or peer.start_time is None or not names:
                self._path.unlink(missing_ok=True)
                return
            note = BitmapNote(peer.pid, peer.start_time, target, base, names)
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".note-", dir=self._path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(note.pack())
                # Not made durable: after a crash of the host there is no such QEMU.
                Path(temporary).replace(self._path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise FleeceError("note what the bitmaps count from in", str(self._path), os_reason(error)) from error
