"""What disks are called: names of archives, and QEMU's names of images. docs/hypervisor.md, "Disks and their names"."""

import json
import re
from pathlib import PurePosixPath
from typing import Final

from hypervisor.errors import DiskNameError

#: Characters between `drive-` and `.img`: with index ending and temporary suffix a file name has 255.
MAX_NAME: Final = 200
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.-]")
#: `scheme:` of a file name that is no path: `nbd://host`, `rbd:pool/image`, `json:{...}`.
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def archive_name(name: str) -> str:
    """`drive-<name>.img`, what is not allowed in it replaced by `_`; a name of that form is kept.

    Raises:
        DiskNameError: nothing is left of the name, or it is too long for an archive.
    """
    inner = name.removesuffix(".img").removeprefix("drive-") if _is_archive_name(name) else name
    safe = _UNSAFE.sub("_", inner)
    if not safe or len(safe) > MAX_NAME:
        raise DiskNameError("name a disk", repr(name[:60]), "1 to 200 letters, digits, '.', '_' and '-' make a name")
    return f"drive-{safe}.img"


def _is_archive_name(name: str) -> bool:
    return name.startswith("drive-") and name.endswith(".img") and len(name) > len("drive-.img")


def given_name(name: str) -> str:
    """`archive_name` of what the configuration calls a disk, where nothing is replaced.

    Raises:
        DiskNameError: characters that are not allowed, none, or too many.
    """
    inner = name.removesuffix(".img").removeprefix("drive-") if _is_archive_name(name) else name
    if _UNSAFE.search(inner):
        raise DiskNameError("name a disk", repr(name[:60]), "only letters, digits, '.', '_' and '-' are allowed")
    return archive_name(name)


def image_path(name: str) -> str | None:
    """The path of a file or device in QEMU's name of an image; None where there is none (network storage)."""
    if name.startswith("json:"):
        try:
            part = json.loads(name.removeprefix("json:"))
        except (ValueError, RecursionError):
            return None
        for _ in range(100):  # filters and formats, each over its `file`
            if not isinstance(part, dict):
                return None
            filename = part.get("filename")
            if isinstance(filename, str) and part.get("driver") in ("file", "host_device", None):
                return filename
            part = part.get("file")
        return None
    name = name.removeprefix("file:") if not name.startswith("file://") else ""
    return None if not name or _SCHEME.match(name) else name


def base_name(name: str) -> str:
    """The last part of QEMU's name of an image; empty where it has none."""
    return PurePosixPath(image_path(name) or ("" if name.startswith("json:") else name)).name
