"""What Fleece tells the kernel about its mounts: options, request sizes, read-ahead."""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Final

#: KiB the kernel reads ahead on a mount. Its default of 128 makes every request 128 KiB; libfuse allows 1 MiB.
READ_AHEAD_KIB: Final = 1024
#: MNT_DETACH of umount(2).
_MNT_DETACH: Final = 2
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
#: None where the C library is not glibc.
_MALLOC_TRIM: Final = getattr(_LIBC, "malloc_trim", None)
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")


def mount_options(source: str, extra: Iterable[str] = ()) -> set[str]:
    """The options for libfuse: what every mount of Fleece has, and `extra`.

    `source` is what /proc/mounts shows in its first column.
    """
    options = ("ro", "nosuid", "nodev", "default_permissions", "subtype=fleece", f"fsname={source}", *extra)
    # The library splits its options at commas; a backslash keeps one that belongs to a value.
    escaped = (option.replace("\\", "\\\\").replace(",", "\\,") for option in options)
    # pyfuse3 takes nothing but ASCII.
    return {option.encode("ascii", "replace").decode() for option in escaped}


def raise_read_ahead(mountpoint: str) -> bool:
    """Let the kernel read more at once from the mount at `mountpoint`; only root may, False if it was not allowed.

    The mount itself is not asked: this runs in the process that would have to answer.
    """
    device = _device(mountpoint)
    if device is None:
        return False
    try:
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))
    except OSError:
        return False
    return True


def is_served(mountpoint: str) -> bool:
    """Ask the mount for its root and wait for the answer; False if it is gone. Blocks, so it needs a thread."""
    try:
        found = Path(mountpoint).stat()
    except OSError:
        return False
    # Where the mount is gone, the folder beneath answers.
    return f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}" == _device(mountpoint)


def detach(mountpoint: str) -> bool:
    """Take the mount away from its folder, though it is in use; True if that was done. Blocks, so it needs a thread."""
    if _LIBC.umount2(os.fsencode(mountpoint), _MNT_DETACH) == 0:
        return True
    # For users the helper does it that also made the mount.
    program = shutil.which("fusermount3")
    if program is None:
        return False
    words = [program, "-u", "-z", "-q", "--", mountpoint]
    return subprocess.run(words, check=False, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def give_back_memory() -> None:
    """Return to the kernel what was freed.

    Chunks of file archives have all sizes; what one leaves in glibc's heaps seldom fits the next, so that the heaps
    grow to more than twice of what is in use. Disk images, whose chunks are all of one size, need no such help.
    """
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)


def _device(mountpoint: str) -> str | None:
    # mountinfo: id, parent, major:minor, root, mount point with octal escapes, ...; the last mount is the upper one.
    found = None
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if len(fields) > 4 and unescape(fields[4]) == mountpoint:
            found = fields[2]
    return found


def unescape(text: str) -> str:
    """A path as /proc/self/mountinfo writes it, with `\\040` for a space, in plain form."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)
