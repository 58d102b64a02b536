"""The disks of a machine that runs while they are restored: block nodes, jobs, and how far they are.

    qcow2 target    device -> ID (qcow2, the target) -> ID-backup (NBD)                       block-stream fills ID
    raw target      device -> ID-live (qcow2, for the time being) -> ID-backup (NBD)          blockdev-mirror fills ID,
                    ID (raw, the target)                                                      then the device goes to it

Until its data is whole, the header of each qcow2 file names the backup, so that nobody takes it for a whole disk. A
read that the server does not answer within `RECONNECT_S` stops guest and job; `Streaming` lets both go on when it is
back, so that no error reaches the guest. docs/vm-restore.md, "Live".
"""

import contextlib
import json
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import trio

from core.errors import TargetError, os_reason
from core.limits import in_io_thread
from hypervisor import checked
from hypervisor.block_graph import children
from hypervisor.errors import QmpCommandError, VmStateError
from hypervisor.machine import Backing
from hypervisor.qmp import Qmp

#: Seconds for which QEMU holds requests back until a lost server is there again; then they fail, and the guest is
#: stopped. Guests with SCSI or SATA disks lose patience after 30 s.
RECONNECT_S: Final = 15
#: Seconds for QEMU to reach the server at its start.
_OPEN_S: Final = 30
#: Bytes that a mirror copies at a time: a guest's write to them waits until they are there. A chunk of the backup.
_MIRROR_BUFFER: Final = 4 << 20
#: Seconds for QEMU to bring everything to the disk.
_FLUSH_TIMEOUT_S: Final = 900.0
#: Seconds between two looks.
POLL_S: Final = 0.25
#: Seconds until a job that has failed is begun anew.
_AGAIN_S: Final = 10.0
#: Seconds, at most, between two tries to let go on what stops again at once.
_MOST_PAUSE_S: Final = 5.0
#: Seconds until the same trouble is told again.
_TELL_AGAIN_S: Final = 60.0
#: QEMU has whole sectors.
SECTOR: Final = 512
#: Devices that stop the guest at an error if they are told to; NVMe cannot.
_CAN_STOP: Final = re.compile(r"(virtio-blk-pci|scsi-hd|ide-hd|usb-storage)\b")


@dataclass(frozen=True, slots=True)
class LiveDisk:
    """A disk of a machine that runs while it is restored."""

    number: int
    archive: str  #: `drive-scsi0.img`
    target: str  #: path of the file or block device
    format: str  #: `raw` or `qcow2`
    size: int  #: bytes
    socket: str  #: where the backup's disk is served
    overlay: str | None  #: for a raw target: the qcow2 file that the guest writes to meanwhile

    @property
    def node(self) -> str:
        """The node that stays."""
        return f"disk{self.number}"

    @property
    def top(self) -> str:
        """The node that the device uses at the start."""
        return self.node if self.overlay is None else f"{self.node}-live"

    @property
    def backup(self) -> str:
        """The node of the backup."""
        return f"{self.node}-backup"

    @property
    def job(self) -> str:
        """The block job's id."""
        return f"fleece-r{self.number}"

    def backing(self) -> Backing:
        """The nodes at the start."""
        below = {
            "driver": "nbd",
            "node-name": self.backup,
            "server": {"type": "unix", "path": self.socket},
            "reconnect-delay": RECONNECT_S,
            "open-timeout": _OPEN_S,
            "read-only": True,
        }
        image = {
            "driver": "qcow2",
            "node-name": self.top,
            "file": {"driver": "file", "filename": self.overlay or self.target, "discard": "unmap"},
            "backing": self.backup,
            "discard": "unmap",
            "detect-zeroes": "unmap",
        }
        nodes: list[Mapping[str, Any]] = [below, image]
        if self.overlay is not None:
            (target,) = Backing.file(Path(self.target), self.node).nodes
            # A device may be larger, as logical volumes are: a mirror has both ends of one size.
            nodes.append({**target, "size": -(-self.size // SECTOR) * SECTOR})
        return Backing(nodes, self.top)

    def whole(self) -> Backing:
        """The nodes of the disk when it is whole."""
        return Backing.file(Path(self.target), self.node, format=self.format)


def stopping_at_errors(line: Sequence[str]) -> tuple[list[str], list[str]]:
    """QEMU's command line `line`, its disks such that errors stop the guest; and the devices that cannot be so."""
    result: list[str] = []
    cannot = []
    for position, word in enumerate(line):
        if position and line[position - 1] == "-device" and ",drive=" in word:
            if _CAN_STOP.match(word):
                word += ",rerror=stop,werror=stop"
            else:
                cannot.append(word.partition(",")[0])
        result.append(word)
    return result, cannot


async def _nothing(_disk: LiveDisk) -> None:
    pass


def gone_over(line: Sequence[str], disk: LiveDisk) -> list[str]:
    """QEMU's command line `line` for a time when the device of `disk` has gone over to its raw target."""
    result: list[str] = []
    old = {disk.top, disk.backup}
    for word in line:
        before = result[-1] if result else ""
        if before == "-blockdev" and word.startswith("{") and json.loads(word).get("node-name") in old:
            result.pop()
        elif before == "-device":
            result.append(",".join(f"drive={disk.node}" if part == f"drive={disk.top}" else part
                                   for part in word.split(",")))  # fmt: skip
        else:
            result.append(word)
    return result


class Look(NamedTuple):
    """How far the disks are."""

    done: int  #: bytes
    size: int  #: bytes of all disks
    whole: bool  #: every disk is, and QEMU needs the server no more
    stopped: bool  #: the guest stands still because of an error


@dataclass(slots=True)
class _Tries:
    """When something that stops at errors is let go on: at once, but more and more rarely if that is of no use."""

    tried: float = -math.inf
    told: float = -math.inf
    pause_s: float = POLL_S

    def due(self) -> bool:
        """Whether it is to be tried now; True counts as a try."""
        now = trio.current_time()
        if now < self.tried + self.pause_s:
            return False
        in_vain = now < self.tried + 2 * _MOST_PAUSE_S
        self.pause_s = min(2 * self.pause_s, _MOST_PAUSE_S) if in_vain else POLL_S
        self.tried = now
        return True

    def news(self) -> bool:
        """Whether it is to be told; True counts as told."""
        now = trio.current_time()
        if now < self.told + _TELL_AGAIN_S:
            return False
        self.told = now
        return True


@dataclass(slots=True)
class Streaming:
    """The filling of the disks of one machine; it can be begun anew at any time, with the same QEMU or another."""

    disks: Sequence[LiveDisk]
    say: Callable[[str], None] = lambda _text: None
    #: Called before a device goes over to its raw target, which holds everything then: from there on the overlay is
    #: old, and who starts the machine again must not use it. The guest's requests to the disk wait meanwhile, also
    #: while it raises a `TargetError`: it is called again then.
    going_over: Callable[[LiveDisk], Awaitable[None]] = _nothing
    _failed: dict[str, float] = field(default_factory=dict)  #: jobs, and when they failed
    _tries: dict[str, _Tries] = field(default_factory=dict)  #: by job, and of the guest

    async def look(self, qmp: Qmp) -> Look:
        """Begin what is not begun, let go on what had to stop, end what is ready; and tell how far everything is.

        Raises:
            VmStateError: a job cannot be begun or ended.
            QmpError, QmpAnswerError: as `Qmp.execute`.
        """
        where = f"{qmp.where}, query-block-jobs"
        jobs = {
            checked.field(job, "device", str, where): job
            for job in checked.objects(await qmp.execute("query-block-jobs"), where)
        }
        graph = await children(qmp)
        done, whole = 0, True
        for disk in self.disks:
            job = jobs.get(disk.job)
            if job is not None:
                done += await self._under_way(qmp, disk, job)
                whole = False
            elif await self._filled(qmp, disk, graph):
                done += disk.size
            else:
                if self._failed.get(disk.job, -_AGAIN_S) + _AGAIN_S <= trio.current_time():
                    await self._begin(qmp, disk)
                whole = False
        stopped = await self._let_go_on(qmp)
        return Look(done, sum(disk.size for disk in self.disks), whole and not stopped, stopped)

    async def _under_way(self, qmp: Qmp, disk: LiveDisk, job: dict[str, Any]) -> int:
        where = f"{qmp.where}, job {disk.job}"
        with contextlib.suppress(QmpCommandError):  # it may end in between
            status = checked.field(job, "status", str, where)
            if status == "pending":
                if await self._may_go_over(disk):
                    await qmp.execute("job-finalize", {"id": disk.job})
            elif status == "concluded":
                await qmp.execute("job-dismiss", {"id": disk.job})
                if (words := checked.optional(job, "error", str, where)) is not None:
                    # The guest goes on over the backup meanwhile; what it needs may come back.
                    self._failed[disk.job] = trio.current_time()
                    self.say(f"{disk.archive}: the job failed: {words}; it begins again in {_AGAIN_S:.0f} s")
                    return 0
            elif checked.field(job, "paused", bool, where):
                # Its I/O status tells more than nothing, but `cont` makes it "ok", and leaves the job as it is.
                full = job.get("io-status") == "nospace"
                if (tries := self._tries.setdefault(disk.job, _Tries())).due():
                    await qmp.execute("block-job-resume", {"device": disk.job})
                    if tries.news():
                        why = "no space is left where its target lies" if full else "it could not be read or written"
                        self.say(f"{disk.archive}: {why}; that is tried again and again")
            elif checked.field(job, "ready", bool, where) and checked.field(job, "type", str, where) == "mirror":
                await qmp.execute("block-job-complete", {"device": disk.job})
        length, offset = checked.field(job, "len", int, where), checked.field(job, "offset", int, where)
        return min(disk.size, disk.size * offset // length) if length > 0 else 0

    async def _may_go_over(self, disk: LiveDisk) -> bool:
        if not (tries := self._tries.setdefault(f"{disk.job}, over", _Tries())).due():
            return False
        try:
            await self.going_over(disk)
        except TargetError as error:
            # The guest's requests wait for this process.
            if tries.news():
                self.say(f"{disk.archive}: {error}; that is tried again and again")
            return False
        return True

    async def _filled(self, qmp: Qmp, disk: LiveDisk, graph: Mapping[str, Mapping[str, str]]) -> bool:
        """Whether the device needs the backup no more; what then nobody needs is removed."""
        if disk.overlay is None:
            if "backing" in graph.get(disk.node, {"backing": ""}):  # what is not there is not filled
                return False
            gone = [disk.backup]
        else:
            if await self._used(qmp, disk.top):
                return False
            gone = [disk.top, disk.backup]
        for node in gone:
            if node in graph:
                with contextlib.suppress(QmpCommandError):  # looked at again
                    await qmp.execute("blockdev-del", {"node-name": node})
        return True

    async def _used(self, qmp: Qmp, node: str) -> bool:
        where = f"{qmp.where}, query-block"
        for entry in checked.objects(await qmp.execute("query-block"), where):
            inserted = checked.optional(entry, "inserted", dict, where)
            if inserted is not None and inserted.get("node-name") == node:
                return True
        return False

    async def _begin(self, qmp: Qmp, disk: LiveDisk) -> None:
        # A job that is not dismissed by itself tells how it ended.
        common = {"job-id": disk.job, "device": disk.top, "auto-dismiss": False}
        try:
            if disk.overlay is None:
                await qmp.execute("block-stream", {**common, "on-error": "stop"})
            else:
                await qmp.execute(
                    "blockdev-mirror",
                    {
                        **common,
                        "target": disk.node,
                        "sync": "full",
                        # The guest's writes go to both at once: however much it writes, the end comes.
                        "copy-mode": "write-blocking",
                        "buf-size": _MIRROR_BUFFER,
                        # When both are the same, and durable, it waits for a word, and the guest's requests wait.
                        "auto-finalize": False,
                        "on-source-error": "stop",
                        "on-target-error": "stop",
                    },
                )
        except QmpCommandError as error:
            raise VmStateError("restore into the running machine", disk.archive, error.desc) from error

    async def _let_go_on(self, qmp: Qmp) -> bool:
        """Whether an error had stopped the guest; it is told to try again."""
        status = checked.of_type(await qmp.execute("query-status"), dict, f"{qmp.where}, query-status")
        if status.get("status") != "io-error":
            return False
        tries = self._tries.setdefault("", _Tries())
        if not tries.due():
            return True
        if tries.news():
            self.say("the guest was stopped by an error of a disk; it is let go on again and again")
        with contextlib.suppress(QmpCommandError):
            await qmp.execute("cont")
        return True

    async def until_whole(self, qmp: Qmp, told: Callable[[Look], None] = lambda _look: None) -> None:
        """Return when every disk is whole, and durable.

        Raises:
            VmStateError: as `look`; or QEMU says that a disk is filled, but its file says that it is not.
            QmpError, QmpAnswerError: as `look`.
        """
        while not (found := await self.look(qmp)).whole:
            told(found)
            await trio.sleep(POLL_S)
        for disk in self.disks:
            # The end of a job is no flush: tables of a qcow2 image may be in QEMU's memory only. QMP has no other way.
            line = f'qemu-io {disk.node} "flush"'
            await qmp.execute("human-monitor-command", {"command-line": line}, timeout_s=_FLUSH_TIMEOUT_S)
            if disk.overlay is None and await in_io_thread(_names_backup, Path(disk.target)):
                why = f"{disk.target} still says that it needs the backup, although QEMU says that it is filled"
                raise VmStateError("end the restore of", disk.archive, why, "end the machine, then go on with --resume")
        told(found)


def _names_backup(path: Path) -> bool:
    """Whether the header of the qcow2 file `path` says that the file is not whole. Blocks.

    Raises:
        TargetError: it is no qcow2 file, or unreadable.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)  # magic, version, offset of the backing file's name
    except OSError as error:
        raise TargetError("read", str(path), os_reason(error)) from error
    if len(head) < 16 or head[:4] != b"QFI\xfb":
        raise TargetError("read", str(path), "it is no qcow2 file")
    return any(head[8:])
