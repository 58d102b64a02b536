"""What files, devices and their users have in common for sources and targets: kinds, formats, locks, mounts.

QEMU marks an open image with OFD locks on single bytes of the file: byte 100 + n is held by those who use
permission n, byte 200 + n by those who do not want others to use it. The same marks are read and set here, so that
a running VM's image is left alone, and no VM starts on an image while it is read or written.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Final

from core.errors import FleeceError, UsageError, os_reason
from hypervisor.errors import DiskInUseError

#: QEMU's numbers of the permissions that matter here.
_READ: Final = 0
_WRITE: Final = 1
_WRITE_UNCHANGED: Final = 2
_RESIZE: Final = 3
_USES: Final = 100
_REFUSES: Final = 200
_FLOCK: Final = struct.Struct("@hhqqi4x")

#: Formats that are named by the end of a file's name.
_BY_SUFFIX: Final = {".qcow2": "qcow2"}
_OTHER_SUFFIXES: Final = {
    ".vmdk": "vmdk", ".vdi": "vdi", ".vhd": "vpc", ".vhdx": "vhdx", ".qed": "qed", ".qcow": "qcow", ".hdd": "parallels",
    ".dmg": "dmg",
}  # fmt: skip
_CONTAINER_SUFFIXES: Final = (
    ".vma", ".ova", ".gz", ".xz", ".zst", ".bz2", ".lz4", ".lzo", ".zip", ".7z", ".tar",
)  # fmt: skip
#: First bytes of images that were perhaps meant to be opened in their own format.
_MAGICS: Final = {
    b"QFI\xfb": "qcow2",
    b"KDMV": "vmdk",
    b"# Disk DescriptorFile": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vhd",
    b"QED\0": "qed",
    b"<<< ": "vdi",
}
MAGIC_SIZE: Final = 32


def image_format(path: Path, given: str | None) -> str:
    """`raw` or `qcow2`: as given, else by the end of the file's name; the content is never asked.

    A guest writes what it likes into its raw disk, a qcow2 header that names a file of the host included.

    Raises:
        UsageError: another format, which QEMU can convert.
    """
    if given is not None:
        if given not in ("raw", "qcow2"):
            hint = f"convert it first: qemu-img convert -f {given} -O qcow2 ... ..."
            raise UsageError("use", str(path), f"the format {given!r} is not supported, only raw and qcow2", hint)
        return given
    suffix = path.suffix.lower()
    if suffix in _OTHER_SUFFIXES:
        raise UsageError(
            "use",
            str(path),
            f"images in the format {suffix[1:]} are not supported, only raw and qcow2",
            f"convert it first: qemu-img convert -f {_OTHER_SUFFIXES[suffix]} -O qcow2 ... ...; "
            "or name the format raw if it is one",
        )
    if suffix in _CONTAINER_SUFFIXES:
        raise UsageError(
            "use",
            str(path),
            f"a {suffix[1:]} file is no disk image",
            "unpack it first, or name the format raw if it is one",
        )
    return _BY_SUFFIX.get(suffix, "raw")


def foreign_magic(start: bytes) -> str | None:
    """The format whose magic a raw image starts with, if any."""
    return next((name for magic, name in _MAGICS.items() if start.startswith(magic)), None)


def check_kind(mode: int, what: str, where: str, fault: type[FleeceError]) -> bool:
    """True for a block device, False for a file.

    Raises:
        FleeceError: neither; the class is `fault`.
    """
    if stat.S_ISBLK(mode):
        return True
    if stat.S_ISREG(mode):
        return False
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
    }
    kind = kinds.get(stat.S_IFMT(mode), "no file")
    hint = "a folder is backed up as an archive: NAME.pxar:FOLDER" if stat.S_ISDIR(mode) and what == "read" else ""
    raise fault(what, where, f"it is {kind}, neither a file nor a block device", hint)


def lock_for_reading(fd: int, where: str, what: str = "read") -> None:
    """Mark the image as QEMU does when it reads and nobody may write; the marks go when `fd` is closed.

    Raises:
        DiskInUseError: somebody writes to it, or does not want it to be read.
    """
    _lock(fd, what, where, uses=(_READ,), refuses=(_WRITE, _RESIZE))


def lock_for_writing(fd: int, where: str) -> None:
    """Mark the image as one that nobody else may open; the marks go when `fd` is closed.

    Raises:
        DiskInUseError: somebody has it open.
    """
    _lock(fd, "write to", where, uses=(_READ, _WRITE, _RESIZE), refuses=(_READ, _WRITE, _WRITE_UNCHANGED, _RESIZE))


def in_use(what: str, where: str) -> DiskInUseError:
    """The error for an image or device that another process holds; names the process if it can be seen."""
    hint = "stop it, or back up the running VM by its QMP socket" if what.startswith("read") else "stop it first"
    return DiskInUseError(what, where, f"it is in use{_user_of(where)}", hint)


def unlock(fd: int) -> None:
    """Take all marks of `fd` off again."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, _USES, 2 * (_REFUSES - _USES), 0))


def _lock(fd: int, what: str, where: str, uses: tuple[int, ...], refuses: tuple[int, ...]) -> None:
    try:
        # First the marks, then the look: of two who do this at the same time at least one sees the other.
        for byte in (*(_USES + one for one in uses), *(_REFUSES + one for one in refuses)):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        for byte in (*(_REFUSES + one for one in uses), *(_USES + one for one in refuses)):
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                break
        else:
            return
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            # A file system without locks: QEMU goes on without them too.
            return
    raise in_use(what, where)


def _user_of(path: str) -> str:
    """` by NAME (pid N)` of a process that has the image open, if one can be seen."""
    try:
        wanted = Path(path).stat()
    except OSError:
        return ""
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        try:
            with os.scandir(process / "fd") as descriptors:
                if any(os.path.samestat(entry.stat(), wanted) for entry in descriptors):
                    return f" by {(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue  # gone, or somebody else's
    return ""


def refuse_users(fd: int, what: str, where: str) -> None:
    """Refuse an image or device that is in use without QEMU's marks: by a process that has it open for writing, as far
    as this user may see that, or a file by a loop device. Blocks.

    Raises:
        DiskInUseError: it is.
    """
    status = os.fstat(fd)
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        try:
            for descriptor in (process / "fd").iterdir():
                if _same_image(descriptor.stat(), status) and _writes(process / "fdinfo" / descriptor.name):
                    name = (process / "comm").read_text().strip()
                    raise DiskInUseError(what, where, f"it is in use by {name} (pid {process.name})", "stop it first")
        except OSError:
            continue  # gone, or somebody else's
    for loop in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if os.path.samestat(Path(loop.read_text().removesuffix("\n")).stat(), status):
                device = f"/dev/{loop.parts[3]}"
                raise DiskInUseError(what, where, f"it is the loop device {device}", f"losetup -d {device}")


def _same_image(one: os.stat_result, other: os.stat_result) -> bool:
    if stat.S_ISBLK(other.st_mode):  # it may have several names
        return stat.S_ISBLK(one.st_mode) and one.st_rdev == other.st_rdev
    return os.path.samestat(one, other)


def _writes(information: Path) -> bool:
    for line in information.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "flags":
            return int(value, 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def mounted_on(device: int) -> list[str]:
    """Where the block device with the number `device` (`st_rdev`), or a partition of it, is mounted for writing."""
    numbers = {f"{os.major(device)}:{os.minor(device)}"}
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    with contextlib.suppress(OSError):  # the device went away; the mounts of the device itself are still looked at
        numbers |= {file.read_text().strip() for file in folder.glob("*/dev")}
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        number = fields[2]
        if number not in numbers and len(tail) > 1:
            number = _number_of(tail[1])  # btrfs has numbers of its own
        if number in numbers and "rw" in fields[5].split(","):
            found.append(fields[4].replace("\\040", " "))
    return found


def _number_of(path: str) -> str:
    """`major:minor` of the device file at `path`, empty if it is none."""
    if not path.startswith("/dev/"):
        return ""
    try:
        status = Path(path).stat()
    except OSError:
        return ""
    if not stat.S_ISBLK(status.st_mode):
        return ""
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def size_of(fd: int) -> int:
    """Bytes of an open file or block device."""
    return os.lseek(fd, 0, os.SEEK_END)


def open_error(error: OSError, what: str, where: str, fault: type[FleeceError]) -> FleeceError:
    """A failed open in words."""
    hints = {
        errno.EACCES: "run as a user who may open it",
        errno.EPERM: "run as a user who may open it",
        errno.ENOENT: "see that the path is right",
    }
    if error.errno == errno.EBUSY:
        return DiskInUseError(what, where, "the device is mounted or in use", "unmount it, or stop who uses it")
    return fault(what, where, os_reason(error), hints.get(error.errno or 0, ""))
