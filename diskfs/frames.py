"""What the process that reads an image and the one that asks say to each other, over a stream socket.

A frame is two lengths (u32, little endian), a JSON document and raw bytes. The asking side sends a request; until the
answer comes it may be asked for parts of disks (`{"op": "fetch"}`). Both sides check what they get: one of them works
on hostile data.
"""

import json
from struct import Struct
from typing import Any, Final

from core.errors import FormatError

HEADER: Final = Struct("<II")
#: Bytes of a document: a page of entries with long names and targets.
MAX_DOCUMENT: Final = 16 << 20
#: Bytes behind it: a part of a disk or of a file.
MAX_DATA: Final = 4 << 20
#: Entries in one answer.
PAGE_ENTRIES: Final = 256
#: Runs in one answer.
PAGE_RUNS: Final = 4096
#: Bytes of a file in one answer.
PAGE_CONTENT: Final = 1 << 20


def pack(document: Any, data: bytes | bytearray | memoryview = b"") -> list[bytes | bytearray | memoryview]:
    """A frame, in pieces to be sent one after the other."""
    text = json.dumps(document, separators=(",", ":")).encode()
    return [HEADER.pack(len(text), len(data)) + text, data]


def lengths(header: bytes) -> tuple[int, int]:
    """Bytes of the document and of what follows it.

    Raises:
        FormatError: more than there may be.
    """
    document, data = HEADER.unpack(header)
    if document > MAX_DOCUMENT or data > MAX_DATA:
        raise FormatError("read", "frame", f"{document} and {data} bytes")
    return document, data
