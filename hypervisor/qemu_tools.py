"""QEMU's own programs as child processes: `qemu-img` to create images, `qemu-nbd` to serve them on a unix socket.

Images are always opened with an explicit format, and file names never reach QEMU where they could be taken for
options or for a protocol. `qemu-nbd` ends by itself when its last client leaves, so even a killed agent leaves no
server behind that would hold the image.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from core.errors import FleeceError, SourceError, TargetError, UsageError, os_reason
from core.limits import in_io_thread
from hypervisor import checked
from hypervisor.image_files import in_use
from hypervisor.nbd_client import NbdAddress, NbdConnection

#: Seconds until a `qemu-nbd` must be ready; opening an image on a slow network file system takes time.
START_TIMEOUT_S: Final = 60.0
#: Seconds between SIGTERM and SIGKILL: `qemu-nbd` closes its image, which may write metadata.
STOP_TIMEOUT_S: Final = 15.0
#: Seconds for a killed `qemu-nbd` to be gone; one that waits for a broken disk is not, as long as that lasts.
_KILL_TIMEOUT_S: Final = 5.0
#: Connections one server takes: ours, and the one that keeps it alive.
_SHARED: Final = 8
#: Bytes of a program's complaint that go into an error.
_MAX_COMPLAINT: Final = 2000
_EXPORT: Final = "image"
#: Bytes that one command of qemu-io makes zero.
_ZERO_STEP: Final = 1 << 30
_FOLDER_PREFIX: Final = "fleece-nbd-"
_MAX_SOCKET_PATH: Final = 107
_LOG = logging.getLogger(__name__)


def find_tool(name: str, fault: type[FleeceError] = SourceError) -> str:
    """Path of QEMU's program `name`.

    Raises:
        FleeceError: it is not installed; the class is `fault`.
    """
    path = shutil.which(name)
    if path is None:
        raise fault("run", name, "it is not installed", "apt install qemu-utils")
    return path


async def create_qcow2(path: Path, size: int) -> None:
    """Make the existing file `path` an empty qcow2 image of `size` bytes (rounded up to 512 by QEMU).

    Cancelled, the file may be half an image.

    Raises:
        TargetError: no space, no right, or QEMU is missing.
        DiskInUseError: another process holds the image.
    """
    tool = await in_io_thread(find_tool, "qemu-img", TargetError)
    await _run_tool([tool, "create", "-q", "-f", "qcow2", _absolute(path), str(size)], "create", path)


async def qcow2_of(path: Path, *, force: bool = False) -> Path:
    """Copy the small raw image `path` to a qcow2 image beside it, with the name's end `.qcow2`, which is returned.

    With `force` one that is there is replaced. Cancelled or failed, it is as before.

    Raises:
        TargetError: there is one, no space, no right, or QEMU is missing.
    """
    tool = await in_io_thread(find_tool, "qemu-img", TargetError)
    target = path.with_suffix(".qcow2")
    partial = path.with_name(f".{target.name}.fleece")
    if not force and await in_io_thread(target.exists):
        raise TargetError("write to", str(target), "it is there already", "--force overwrites it")
    try:
        await _run_tool(
            [tool, "convert", "-f", "raw", "-O", "qcow2", _absolute(path), _absolute(partial)], "write to", target
        )
        await in_io_thread(partial.replace, target)
    except OSError as error:
        raise TargetError("write to", str(target), os_reason(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    return target


async def prepare_overlay(
    path: Path, size: int, identity: str, server: Path, *, zeros: Sequence[tuple[int, int]] = ()
) -> None:
    """Make `path` a qcow2 image of `size` bytes over what the NBD server at the socket `server` has, or see that it is.

    The image's header calls that by `identity`, as the name of an export, so that no other disk is put below it.

    Args:
        path: the image.
        size: bytes.
        identity: tells what the server has from anything else.
        server: path of its socket; it need not be there yet.
        zeros: offsets and lengths of what is known to be zeros, whole clusters of 64 KiB: in a new image it is so
            without looking below. They cost no space.

    Raises:
        TargetError: it cannot be made or read, or QEMU is missing.
        DiskInUseError: somebody has it open.
        UsageError: it is an image over something else.
    """
    tool = await in_io_thread(find_tool, "qemu-img", TargetError)
    named = f"nbd+unix:///{urllib.parse.quote(identity, safe='')}?socket="
    below = ["-u", "-F", "raw", "-b", named + urllib.parse.quote(os.fspath(server))]
    if not await in_io_thread(lambda: path.exists() and path.stat().st_size > 0):
        await _run_tool([tool, "create", "-q", "-f", "qcow2", *below, _absolute(path), str(size)], "create", path)
        if zeros:
            await _mark_zeros(path, zeros)
        return
    await _check_overlay(tool, path, named, identity)
    await _run_tool([tool, "rebase", "-q", "-f", "qcow2", *below, _absolute(path)], "write to", path)


async def _mark_zeros(path: Path, zeros: Sequence[tuple[int, int]]) -> None:
    """Let ranges of an image be zeros of its own; what is below is not opened for it."""
    program = await in_io_thread(find_tool, "qemu-io", TargetError)
    lines = "".join(f"write -q -z {at} {min(_ZERO_STEP, offset + length - at)}\n"
                    for offset, length in zeros for at in range(offset, offset + length, _ZERO_STEP))  # fmt: skip
    options = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": _absolute(path)}}
    await _run_tool([program, f"json:{json.dumps(options)}"], "write to", path, stdin=lines.encode())


async def _check_overlay(tool: str, path: Path, named: str, identity: str) -> None:
    out = await _run_tool([tool, "info", "-U", "-f", "qcow2", "--output=json", _absolute(path)], "read", path)
    try:
        found = checked.of_type(json.loads(out), dict, f"qemu-img info {path}").get("backing-filename")
    except ValueError as error:
        raise TargetError("read", str(path), f"qemu-img told nonsense: {error}") from error
    if not isinstance(found, str) or not found.startswith(named):
        other = urllib.parse.unquote(str(found or "no backup").removeprefix("nbd+unix:///").partition("?socket=")[0])
        raise UsageError(
            "use the overlay", str(path), f"it was made for {checked.printable(other)}", f"this is {identity}"
        )


async def _run_tool(line: Sequence[str], what: str, path: Path, *, stdin: bytes = b"") -> bytes:
    done = await trio.run_process(
        line, capture_stdout=True, capture_stderr=True, check=False, env=_environment(), stdin=stdin
    )
    if done.returncode:
        raise _complaint(done.stderr, what, path, TargetError)
    return bytes(done.stdout)


@asynccontextmanager
async def serve_image(
    path: Path, image_format: str, *, writable: bool = False, shared: bool = False, fault: type[FleeceError]
) -> AsyncIterator[NbdAddress]:
    """Serve the image at `path` with `qemu-nbd` on a private socket while the block runs.

    QEMU locks the image as usual: nobody writes to it meanwhile, or it is refused. `shared` reads an image that
    somebody else may be writing. The caller closes its connections before the block ends.

    Raises:
        DiskInUseError: somebody else holds the image.
        FleeceError: QEMU cannot open it, or is missing; the class is `fault`.
    """
    tool = await in_io_thread(find_tool, "qemu-nbd", fault)
    is_device = await in_io_thread(path.is_block_device)
    options = {
        "driver": image_format,
        "file.driver": "host_device" if is_device else "file",
        "file.filename": _absolute(path),
    }
    if writable:
        options |= {"discard": "unmap", "detect-zeroes": "unmap", "file.discard": "unmap"}
    elif shared:
        options |= {"force-share": "on"}
    folder, claim = await in_io_thread(private_folder)
    try:
        socket = folder / "nbd"
        arguments = [tool, f"--socket={socket}", f"--shared={_SHARED}", f"--export-name={_EXPORT}", "--image-opts"]
        # Commas are doubled in QEMU's options.
        image = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())
        mode = [] if writable else ["--read-only"]
        with (folder / "stderr").open("w+b", buffering=0) as complaints:
            process = await trio.lowlevel.open_process(
                [*arguments, *mode, image],
                stdin=subprocess.DEVNULL,
                stdout=complaints,
                stderr=complaints,
                env=_environment(),
                start_new_session=True,  # a Ctrl-C at the terminal is for us: the image must not vanish under us
            )
            keeper = NbdConnection(NbdAddress.unix(socket, _EXPORT))
            try:
                await _until_ready(process, keeper, folder / "stderr", path, fault)
                yield keeper.address
            finally:
                # As long as the keeper is connected, qemu-nbd does not mind that a cancelled read closes the others.
                keeper.close()
                await _stop(process)
    finally:
        remove_private(folder, claim)  # two entries: no thread, so that cancellation cannot come between


async def _until_ready(
    process: trio.Process, keeper: NbdConnection, complaints: Path, path: Path, fault: type[FleeceError]
) -> None:
    deadline = trio.current_time() + START_TIMEOUT_S
    pause_s = 0.005
    while True:
        ended = process.poll() is not None
        if await in_io_thread(Path(keeper.address.socket).exists):
            try:
                await in_io_thread(keeper.connect)
            except SourceError:
                # Not listening yet, or already gone.
                pass
            else:
                return
        if ended:
            text = await in_io_thread(_read_start, complaints)
            raise _complaint(text, "open", path, fault)
        if trio.current_time() > deadline:
            raise fault("open", str(path), f"qemu-nbd was not ready after {START_TIMEOUT_S:.0f} s")
        await trio.sleep(pause_s)
        pause_s = min(0.1, pause_s * 1.5)


async def _stop(process: trio.Process) -> None:
    """End `process`, kindly at first; it has ended when this returns, unless its disk hangs."""
    for end, timeout_s in ((process.terminate, STOP_TIMEOUT_S), (process.kill, _KILL_TIMEOUT_S)):
        end()
        with trio.move_on_after(timeout_s, shield=True):
            await process.wait()
            return
    _LOG.warning("qemu-nbd (process %d) was killed, but it waits for a disk that hangs and is left behind", process.pid)


def _absolute(path: Path) -> str:
    """A path that can be neither an option nor a protocol such as `nbd:`."""
    return os.fspath(path.absolute())


def _complaint(stderr: bytes, what: str, path: Path, fault: type[FleeceError]) -> FleeceError:
    """What QEMU wrote, as an error of ours."""
    text = " ".join(stderr[:_MAX_COMPLAINT].decode("utf-8", "replace").split())
    text = re.sub(r"^qemu-(nbd|img): ", "", text)
    if re.search(r"Failed to get .* lock|Failed to lock", text):
        return in_use("read" if issubclass(fault, SourceError) else "write to", str(path))
    return fault(what, str(path), text or "QEMU gave no reason")


def _read_start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_COMPLAINT)


def private_folder() -> tuple[Path, int]:
    """A new folder that only we can enter, with a path short enough for sockets, and the descriptor that claims it.

    Folders of runs that were killed are removed on the way: nobody claims them any more.
    """
    candidates: Sequence[str | None] = (os.environ.get("XDG_RUNTIME_DIR"), "/run/fleece", None, "/tmp")
    for parent in candidates:
        if parent is not None and not (Path(parent).is_dir() and os.access(parent, os.W_OK)):
            continue
        while True:
            folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=parent))
            if len(os.fsencode(folder / "nbd")) > _MAX_SOCKET_PATH:
                folder.rmdir()
                break
            claim = _claim(folder)
            if claim is None:
                continue  # another run took it for a left-over in this very moment
            for other in folder.parent.glob(f"{_FOLDER_PREFIX}*"):
                if other != folder and _is_ours(other) and (left := _claim(other)) is not None:
                    remove_private(other, left)
            return folder, claim
    raise SourceError("make", "a folder for a socket", "no temporary folder has a short enough path", "set TMPDIR")


def _is_ours(folder: Path) -> bool:
    try:
        return folder.lstat().st_uid == os.geteuid()
    except OSError:
        return False


def _claim(folder: Path) -> int | None:
    """A descriptor that holds the lock of `folder`; None if somebody else has it, or the folder is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), folder.lstat()):
            return descriptor
    except OSError:
        pass  # claimed, or gone
    os.close(descriptor)
    return None


def remove_private(folder: Path, claim: int) -> None:
    """Remove what `private_folder` made."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(claim)


def _environment() -> dict[str, str]:
    """Ours, with messages in English: locks are recognised by their words."""
    return {**os.environ, "LC_ALL": "C"}
