"""What is written down of a live restore in the machine's folder, from before QEMU starts until its disks are whole."""

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Self

from agent.cli_restore import LIVE_STATE_NAME
from agent.vm_restore import RestoredDisk, RestoredVm
from core.errors import NotFoundError, TargetError, UsageError, os_reason
from hypervisor import checked
from hypervisor.live_restore import LiveDisk

STATE_NAME: Final = LIVE_STATE_NAME
_VERSION: Final = 1
_MAX_STATE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class LiveState:
    """A live restore, as it is written down."""

    snapshot: str
    ns: str
    name: str
    folder: str
    disks: Sequence[LiveDisk]
    ready: Sequence[RestoredDisk]  #: disks that are no disks of the guest (EFI variables, TPM) are whole from the start
    files: Mapping[str, str]  #: small files by name
    left_out: Sequence[str]
    line: Sequence[str]  #: QEMU's command line
    qmp: str  #: the socket that is Fleece's
    script: Mapping[str, str | None] | None  #: options of the script that is written at the end; None: without one
    made: Sequence[Path] = ()  #: files of this run, which go if the machine cannot be started; not written down
    emptied: Sequence[Path] = ()  #: files that were there, and had no content; not written down either
    made_folders: Sequence[Path] = ()
    there: Sequence[Path] = ()  #: files that were there, where those of this run go; not written down either

    @property
    def fresh(self) -> bool:
        """Whether this run has begun it."""
        return bool(self.made or self.emptied or self.made_folders)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote. Blocks.

        Raises:
            NotFoundError: there is none: nothing is under way in this folder.
            UsageError: somebody else may have written it, or nobody has written it so, or of another folder.
        """
        path = folder / STATE_NAME
        where = str(path)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                text = file.read(_MAX_STATE)
        except FileNotFoundError as error:
            raise NotFoundError("resume the restore in", str(folder), "no live restore is under way there") from error
        except OSError as error:
            raise UsageError("resume the restore in", str(folder), os_reason(error)) from error
        # It has a command line that will be run.
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise UsageError("use", where, "others than its owner can write to it, or it is somebody else's")
        try:
            value = checked.of_type(json.loads(text), dict, where)
        except (ValueError, RecursionError) as error:
            raise UsageError("use", where, f"it is damaged: {error}") from error
        if value.get("version") != _VERSION:
            raise UsageError("use", where, "another version of Fleece has written it")
        disks = [
            LiveDisk(
                number=checked.field(disk, "number", int, where),
                archive=checked.field(disk, "archive", str, where),
                target=checked.field(disk, "target", str, where),
                format=checked.field(disk, "format", str, where),
                size=checked.field(disk, "size", int, where),
                socket=checked.field(disk, "socket", str, where),
                overlay=checked.optional(disk, "overlay", str, where),
            )
            for disk in checked.objects(value.get("disks"), where)
        ]
        ready = [
            RestoredDisk(
                archive=checked.field(disk, "archive", str, where),
                target=checked.field(disk, "target", str, where),
                format=checked.field(disk, "format", str, where),
                size=checked.field(disk, "size", int, where),
                kind=checked.field(disk, "kind", str, where),
            )
            for disk in checked.objects(value.get("ready"), where)
        ]
        begun = checked.field(value, "folder", str, where)
        if os.path.realpath(begun) != os.path.realpath(folder):
            # Its disks and its QEMU may still be those of the other folder.
            hint = f"'fleece vm restore --resume {checked.printable(begun)}', or move the folder back"
            raise UsageError("resume the restore in", str(folder), f"it was begun in {checked.printable(begun)}", hint)
        texts = [checked.of_type(word, str, where) for word in checked.field(value, "line", list, where)]
        files = checked.field(value, "files", dict, where)
        return cls(
            snapshot=checked.field(value, "snapshot", str, where),
            ns=checked.field(value, "ns", str, where),
            name=checked.field(value, "name", str, where),
            folder=begun,
            disks=disks,
            ready=ready,
            files={name: checked.of_type(path, str, where) for name, path in files.items()},
            left_out=[checked.of_type(one, str, where) for one in checked.field(value, "left_out", list, where)],
            line=texts,
            qmp=checked.field(value, "qmp", str, where),
            script=checked.optional(value, "script", dict, where),
        )

    def save(self) -> None:
        """Write it, durable when this returns. Blocks.

        Raises:
            TargetError: it cannot be written.
        """
        path = Path(self.folder) / STATE_NAME
        temporary = path.with_name(f".{STATE_NAME}.new")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(
                    {"version": _VERSION, **asdict(replace(self, made=(), emptied=(), made_folders=(), there=()))},
                    file,
                    indent=1,
                )
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise TargetError("write", str(path), os_reason(error)) from error

    def vm(self) -> RestoredVm:
        """The machine that comes of it."""
        disks = [
            RestoredDisk(
                disk.archive, disk.target, disk.format, disk.size,
                "device" if Path(disk.target).is_block_device() else "file",
            )
            for disk in self.disks
        ]  # fmt: skip
        files = {name: Path(path) for name, path in self.files.items()}
        return RestoredVm(
            self.snapshot, self.name, Path(self.folder), [*disks, *self.ready], files, list(self.left_out)
        )
