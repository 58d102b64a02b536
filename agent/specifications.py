"""What `fleece backup` is told to store: `NAME.pxar:FOLDER`, `NAME.img:SOURCE`, `NAME.conf:FILE`."""

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from core.errors import SourceError, UsageError, os_reason
from datastore.blob import MAX_BLOB_SIZE

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._\-]*\.([a-z0-9]+)")
_ARCHIVE_NAME: Final = re.compile(r"[A-Za-z0-9_\-]+")
_NAMES_HINT: Final = (
    "write NAME.pxar:FOLDER for a folder, NAME.img:DISK for a disk image, NAME.conf:FILE for a small file"
)


class SpecificationKind(Enum):
    """What becomes of a source."""

    ARCHIVE = "pxar"
    IMAGE = "img"
    BLOB = "conf"


@dataclass(frozen=True, slots=True)
class Specification:
    """One archive to be made."""

    name: str  #: without type extension, `root.pxar`, `disk.img`, `web.conf`
    kind: SpecificationKind
    source: str  #: path or NBD URI


def parse_specification(text: str) -> Specification:
    """Read `NAME.pxar:FOLDER`, `NAME.img:SOURCE` or `NAME.conf:FILE` (also .log and .json).

    Raises:
        UsageError: another form, or a kind that this version does not make.
    """
    name, colon, source = text.partition(":")
    match = _NAME.fullmatch(name)
    if not colon or not source or match is None:
        raise UsageError(
            "understand the specification", repr(text), "it is not of the form NAME.EXTENSION:SOURCE", _NAMES_HINT
        )
    extension = match[1]
    if extension == "img":
        return Specification(name, SpecificationKind.IMAGE, source)
    if extension in ("conf", "log", "json"):
        if f"{name}.blob" in ("client.log.blob", "index.json.blob"):
            raise UsageError("store the file as", repr(name), "that name is reserved", "choose another one")
        return Specification(name, SpecificationKind.BLOB, source)
    if extension == "pxar":
        if _ARCHIVE_NAME.fullmatch(name.removesuffix(".pxar")) is None:
            why = "the name of a file archive has letters, digits, '-' and '_' only"
            raise UsageError("store the folder as", repr(name), why, _NAMES_HINT)
        return Specification(name, SpecificationKind.ARCHIVE, source)
    raise UsageError(
        "understand the specification", repr(text), f"the extension .{extension} says nothing", _NAMES_HINT
    )


def parse_specifications(texts: Iterable[str]) -> list[Specification]:
    """All of them, each name once.

    Raises:
        UsageError: as `parse_specification`, or a name twice.
    """
    specifications = [parse_specification(text) for text in texts]
    names = [specification.name for specification in specifications]
    for name in names:
        if names.count(name) > 1:
            raise UsageError("store twice as", repr(name), "each archive of a snapshot has its own name", "rename one")
    return specifications


def read_small_file(path: Path) -> bytes:
    """The whole file, for a blob.

    Raises:
        SourceError: unreadable, no regular file, or more than a blob can hold.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not wait for somebody to write into it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SourceError("store", str(path), "it is no regular file", "a disk is stored as NAME.img:DISK")
            data = file.read(MAX_BLOB_SIZE + 1)
    except OSError as error:
        raise SourceError("read", str(path), os_reason(error)) from error
    if len(data) > MAX_BLOB_SIZE:
        raise SourceError("store", str(path), f"more than {MAX_BLOB_SIZE} bytes", "store it as NAME.img:FILE")
    return data
