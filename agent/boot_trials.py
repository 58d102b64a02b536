"""Test boots: a machine out of a snapshot is started to see whether it comes to life. docs/test-boot.md."""

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from agent.nbd_offers import ImageDisk, images
from agent.snapshot_archives import open_snapshot
from agent.vm_restore import read_small_files, small_files
from core.buffers import Buffer
from core.errors import FleeceError, TargetError, UsageError, os_reason
from core.limits import in_io_thread
from core.progress import Progress
from core.units import format_size, parse_size
from datastore.codec import ChunkCodec
from datastore.names import Snapshot, strip_archive_type
from hypervisor.boot_trial import Sign, TrialOptions, try_boot
from hypervisor.children import running
from hypervisor.efi import EFI_VARS_NAME
from hypervisor.efi_firmware import VARIABLES_SIZES, find_firmware
from hypervisor.errors import BootTrialError
from hypervisor.machine import Kernel, Machine, from_files
from hypervisor.nbd_server import ServedDisk, serve_disk
from hypervisor.qemu_tools import private_folder, remove_private
from hypervisor.tpm import STATE_NAME
from repository.archive import ArchiveReader, open_archive_reader, open_cache
from repository.interface import Repository

if TYPE_CHECKING:
    from hypervisor.boot_watch import Trial
    from hypervisor.qmp import Qmp

#: Signs of life by the names a person gives them.
_KINDS: Final = ("guest-agent", "serial", "screen")
DEFAULT_TIMEOUT_S: Final = 300.0
DEFAULT_SETTLE_S: Final = 10.0
DEFAULT_SPACE: Final = 4 << 30
#: Bytes of memory and processors that a machine gets at most, unless a person says otherwise.
MOST_MEMORY: Final = 2 << 30
MOST_CPUS: Final = 2
#: Bytes below which no system starts that is worth trying.
LEAST_MEMORY: Final = 64 << 20
#: Bytes of decoded chunks that are kept for all disks.
_CACHE: Final = 128 << 20
#: Bytes of EFI variables that are read out of an image.
_MAX_VARIABLES: Final = 64 << 20
#: Seconds for swtpm to be there.
_TPM_START_S: Final = 10.0
#: Seconds after which a read of the backup is part of the reason.
_SLOW_READ_S: Final = 5.0
#: Text to look for, and signs of one test.
_MAX_PATTERN: Final = 500


@dataclass(frozen=True, slots=True)
class BootOrder:
    """How a snapshot is tried."""

    signs: Sequence[Sign]
    timeout_s: float = DEFAULT_TIMEOUT_S
    settle_s: float = DEFAULT_SETTLE_S
    memory: int | None = None  #: bytes; None: as the machine has, but not much
    cpus: int | None = None
    accel: str = "auto"
    program: str | None = None
    kernel: Kernel | None = None
    space: int = DEFAULT_SPACE


@dataclass(slots=True)
class BootResult:
    """What became of it."""

    snapshot: str
    trial: "Trial"
    memory: int
    cpus: int
    left_out: Sequence[str]
    duration_s: float
    screenshot: Path | None = None
    serial_log: Path | None = None
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The document of `fleece test-boot`."""
        trial = self.trial
        return {
            "snapshot": self.snapshot,
            "alive": trial.alive,
            "sign": trial.sign,
            "reason": trial.reason,
            "after-s": round(trial.after_s, 3),
            "events": [{"after-s": round(one.after_s, 3), "what": one.what} for one in trial.events],
            "screenshot": None if self.screenshot is None else str(self.screenshot),
            "serial-log": None if self.serial_log is None else str(self.serial_log),
            "accel": trial.accel,
            "accel-reason": trial.accel_reason,
            "qemu": trial.qemu,
            "machine": trial.machine,
            "memory": self.memory,
            "cpus": self.cpus,
            "restarts": trial.restarts,
            "written": trial.written,
            "duration-s": round(self.duration_s, 3),
            "left-out": list(self.left_out),
            "warnings": self.warnings,
        }

    def lines(self) -> list[str]:
        """The same for people."""
        trial = self.trial
        lines = [f"{self.snapshot}: {'alive' if trial.alive else 'NOT alive'}: {trial.reason}"]
        lines += [f"  {one.after_s:7.1f} s  {one.what}" for one in trial.events]
        lines.append(
            f"QEMU {trial.qemu}, machine {trial.machine}, {trial.accel} ({trial.accel_reason}), "
            f"{format_size(self.memory)} of memory, {self.cpus} processors; "
            f"the guest wrote {format_size(trial.written)}"
        )
        if self.left_out:
            lines.append(f"left out of the configuration: {', '.join(self.left_out)}")
        if self.screenshot is not None:
            lines.append(f"the screen: {self.screenshot}")
        if self.serial_log is not None:
            lines.append(f"the serial port: {self.serial_log}")
        return lines


def parse_signs(words: Sequence[str]) -> tuple[Sign, ...]:
    """The signs of life that are meant: `guest-agent`, `serial`, `serial:TEXT`, `serial:/REGEX/`, `screen`, `any`.

    Raises:
        UsageError: something else.
    """
    signs: list[Sign] = []
    for word in words or ["any"]:
        kind, colon, text = word.partition(":")
        if word == "any":
            signs += [Sign(one) for one in _KINDS]
        elif kind == "serial" and colon:
            signs.append(Sign("serial", _pattern(text)))
        elif word in _KINDS:
            signs.append(Sign(word))
        else:
            raise UsageError(
                "wait for", repr(word), "it is no sign of life",
                "guest-agent, serial, serial:TEXT, serial:/REGEX/, screen and any are",
            )  # fmt: skip
    return tuple(signs)


def _pattern(text: str) -> re.Pattern[str]:
    if not text or len(text) > _MAX_PATTERN:
        raise UsageError("wait for", f"serial:{text[:40]}", f"1 to {_MAX_PATTERN} characters make a text")
    if not (len(text) > 2 and text.startswith("/") and text.endswith("/")):
        return re.compile(re.escape(text))
    try:
        return re.compile(text[1:-1], re.MULTILINE)
    except re.error as error:
        raise UsageError("wait for", f"serial:{text}", f"it is no regular expression: {error}") from error


def parse_memory(text: str) -> int:
    """Bytes of memory.

    Raises:
        UsageError: no size, or too little for any system.
    """
    size = parse_size(text)
    if size < LEAST_MEMORY:
        raise UsageError("give the machine", text, f"it needs {format_size(LEAST_MEMORY)} at least")
    return size


def _available() -> int:
    """Bytes of memory that this host could give."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return MOST_MEMORY if match is None else int(match[1]) << 10


async def try_snapshot(
    repository: Repository,
    snapshot: Snapshot,
    order: BootOrder,
    *,
    codec: ChunkCodec,
    progress: Progress,
    linger: "Callable[[Qmp, Trial], Awaitable[None]] | None" = None,
) -> BootResult:
    """Start the machine of `snapshot`; the backup stays as it is, and cannot be removed meanwhile.

    Args:
        repository: where it lies.
        snapshot: which one.
        order: how.
        codec: with the key, if there is one.
        progress: told of what happens, and warned.
        linger: called when it is certain whether it lives, before the machine ends.

    Raises:
        NotFoundError: it has no disk image.
        KeyNeededError, FormatError: it cannot be read.
        BootTrialError: QEMU is missing or does not start the machine.
    """
    started = trio.current_time()
    async with AsyncExitStack() as stack:
        cache = await stack.enter_async_context(open_cache(_CACHE))
        opened = await stack.enter_async_context(open_snapshot(repository, snapshot, codec, cache, progress))
        readers: dict[str, ArchiveReader] = {}
        for filename in images(opened, ()):
            opened.needs_key(opened.manifest.file(filename))
            readers[strip_archive_type(filename)] = await open_archive_reader(
                opened.reader, opened.codec, opened.manifest, filename, cache
            )
        files = await read_small_files(opened, small_files(opened))
        machine = from_files(files, list(readers))
        if order.kernel is None and machine.direct_kernel:
            progress.warn("the machine was started with a kernel of its host, which no backup has: give --kernel")
        variables = await _variables(machine, files, readers)
        firmware = await _firmware(machine, variables, progress)
        tpm = await stack.enter_async_context(emulated_tpm(machine, files, progress))
        disks = {}
        watched: list[WatchedDisk] = []
        for disk in machine.disks:
            served = WatchedDisk(ImageDisk(readers[disk.archive]))
            watched.append(served)
            where = f"{snapshot} {disk.archive}"
            disks[disk.archive] = (await stack.enter_async_context(serve_disk(served, where=where)), served.size)
        for text in machine.left_out:
            progress.log(f"left out of the configuration: {text}")
        options = _options(machine, order, vnc=linger is not None)
        trial = await try_boot(
            machine, disks, options, firmware=firmware, variables=variables, tpm=tpm, say=progress.log, linger=linger
        )
        if not trial.alive:
            # A backup that cannot be read is another matter than a system that does not start.
            trial.reason += "".join(f"; {text}" for text in [one.trouble() for one in watched] if text)
        for text in trial.warnings:
            progress.warn(text)
        return BootResult(
            str(snapshot), trial, options.memory, options.cpus, machine.left_out,
            trio.current_time() - started, warnings=progress.warnings,
        )  # fmt: skip


class WatchedDisk:
    """A disk that is served, and what went wrong with reading it."""

    def __init__(self, disk: ServedDisk) -> None:
        self._disk = disk
        self._failure: FleeceError | None = None
        self._waiting: dict[object, float] = {}  #: reads under way, and since when

    @property
    def size(self) -> int:
        """Bytes."""
        return self._disk.size

    async def read(self, offset: int, length: int) -> Buffer:
        """As `ServedDisk.read`."""
        mark = object()
        self._waiting[mark] = trio.current_time()
        try:
            return await self._disk.read(offset, length)
        except FleeceError as error:
            self._failure = self._failure or error
            raise
        finally:
            del self._waiting[mark]

    def zeros(self, offset: int, length: int) -> Sequence[tuple[int, bool]]:
        """As `ServedDisk.zeros`."""
        return self._disk.zeros(offset, length)

    def trouble(self) -> str:
        """In words, empty if there was none."""
        if self._failure is not None:
            return str(self._failure)
        longest = max((trio.current_time() - since for since in self._waiting.values()), default=0.0)
        return f"the backup has not answered for {longest:.0f} s" if longest > _SLOW_READ_S else ""


def _options(machine: Machine, order: BootOrder, *, vnc: bool) -> TrialOptions:
    usual = max(LEAST_MEMORY, min(machine.memory, MOST_MEMORY, _available() // 2))
    return TrialOptions(
        order.signs,
        order.timeout_s,
        order.settle_s,
        memory=usual if order.memory is None else order.memory,
        cpus=order.cpus or min(machine.cpus, MOST_CPUS, os.cpu_count() or 1),
        accel=order.accel,
        program=order.program,
        kernel=order.kernel,
        vnc=vnc,
        space=order.space,
    )


# -- firmware and TPM -------------------------------------------------------------------------------------------------


async def _variables(machine: Machine, files: dict[str, bytes], readers: dict[str, ArchiveReader]) -> bytes | None:
    """The EFI variables as they were backed up."""
    if not machine.efi:
        return None
    if EFI_VARS_NAME in files:
        return files[EFI_VARS_NAME]
    if machine.efi_archive is None:
        return None
    reader = readers[machine.efi_archive]
    content = bytes(await reader.read(0, min(reader.size, _MAX_VARIABLES)))
    # A volume may be larger than what is in it.
    size = next((one for one in VARIABLES_SIZES if one == len(content)), None)
    return content if size is not None else content[: VARIABLES_SIZES[0]]


async def _firmware(machine: Machine, variables: bytes | None, progress: Progress) -> Path | None:
    if not machine.efi:
        return None
    size = None if variables is None else len(variables)
    found = await in_io_thread(lambda: find_firmware(machine.arch, variables=size, secure=machine.secure_boot))
    if found is None:
        package = "qemu-efi-aarch64" if machine.arch == "aarch64" else "ovmf"
        raise BootTrialError(
            "start",
            "a machine with EFI firmware",
            "this host has none that fits its variables",
            f"apt install {package}",
        )
    progress.log(f"firmware {found}")
    return found


@asynccontextmanager
async def emulated_tpm(machine: Machine, files: dict[str, bytes], progress: Progress) -> AsyncIterator[Path | None]:
    """Control socket of a TPM with the state of the backup, while the block runs; None without one.

    Args:
        machine: the machine.
        files: the backup's small files by name.
        progress: warned if it cannot be as it was.

    Raises:
        BootTrialError: swtpm does not start.
    """
    import shutil

    states = {name: data for name, data in files.items() if STATE_NAME.fullmatch(name)}
    if machine.tpm is None:
        yield None
        return
    if await in_io_thread(shutil.which, "swtpm") is None:
        progress.warn("the machine has a TPM, and swtpm is not installed: it starts without one (apt install swtpm)")
        yield None
        return
    if not states:
        progress.warn("the backup has no state of the machine's TPM: it starts with an empty one")
    folder, claim = await in_io_thread(private_folder)
    try:
        for name, data in states.items():
            (folder / name).write_bytes(data)
        two = ["--tpm2"] if not states or any(name.startswith("tpm2") for name in states) else []
        control = folder / "nbd"  # a name that is known to be short enough
        line = ["swtpm", "socket", *two, "--tpmstate", f"dir={folder}", "--ctrl", f"type=unixio,path={control}"]
        async with running(line, fault=BootTrialError) as child:
            deadline = trio.current_time() + _TPM_START_S
            while not control.exists():
                if child.code is not None or trio.current_time() > deadline:
                    raise BootTrialError("start", "a TPM", child.heard or "swtpm does not start")
                await trio.sleep(0.02)
            yield control
    finally:
        remove_private(folder, claim)


# -- what is kept -----------------------------------------------------------------------------------------------------


async def keep_evidence(
    result: BootResult, screenshot: Path | None, serial_log: Path | None, progress: Progress
) -> None:
    """Write the last picture as a PNG file, and what the serial port said.

    What cannot be written is a warning: whether the machine lives is known all the same.
    """
    picture = result.trial.picture
    if screenshot is not None and picture is not None:
        png = await in_io_thread(picture.png)
        result.screenshot = await _kept(screenshot, png, progress)
    if serial_log is not None:
        result.serial_log = await _kept(serial_log, result.trial.serial, progress)


async def _kept(path: Path, content: bytes, progress: Progress) -> Path | None:
    try:
        await in_io_thread(_write, path, content)
    except TargetError as error:
        progress.warn(str(error))
        return None
    return path


def _write(path: Path, content: bytes) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            new.write_bytes(content)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise TargetError("write", str(path), os_reason(error)) from error
