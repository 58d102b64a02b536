"""What the double of a PBS server keeps, and the formats of it: blobs and indexes, as the specification has them.

Nothing of Fleece's own code reads or writes them here: where both agree, two readers of the description agree.
"""

import json
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import zstandard

CHUNK: Final = 4 << 20
FORM: Final = "application/x-www-form-urlencoded"
RAW: Final = "application/octet-stream"
JSON: Final = "application/json"
#: What names of groups, archives and namespaces look like.
SAFE_ID: Final = r"[A-Za-z0-9_][A-Za-z0-9._\-]*"
_MAGICS: Final = {
    bytes.fromhex("42ab3807be8370a1"): (12, False, False),
    bytes.fromhex("31b958426fb6a37f"): (12, True, False),
    bytes.fromhex("7b6785be222d4cf0"): (44, False, True),
    bytes.fromhex("e6591bbf0bbfd80b"): (44, True, True),
}
#: Namespace, type, id.
GroupKey = tuple[str, str, str]
#: The same and the time.
Key = tuple[str, str, str, int]


class RefusedError(Exception):
    """An answer with an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


@dataclass
class Folder:
    """One snapshot."""

    files: dict[str, bytes] = field(default_factory=dict)
    locked: bool = False  #: being written
    readers: int = 0
    protected: bool = False
    notes: str = ""
    failed: bool = False  #: a verification finds it damaged
    verification: dict[str, str] | None = None

    @property
    def manifest(self) -> dict[str, Any] | None:
        raw = self.files.get("index.json.blob")
        return None if raw is None else json.loads(plain(raw))


@dataclass
class Asked:
    """One request, as it came."""

    protocol: str  #: rest, backup, reader
    method: str
    path: str
    parameters: dict[str, Any]
    content_type: str
    body: int  #: bytes
    status: int = 0


class PbsStore:
    """One datastore and those who use it. `tickets` and `secrets` decide who may come in."""

    def __init__(self, store: str = "store") -> None:
        self.store = store
        self.folders: dict[Key, Folder] = {}
        self.owners: dict[GroupKey, str] = {}
        self.group_notes: dict[GroupKey, str] = {}
        self.chunks: dict[bytes, bytes] = {}
        self.namespaces = {""}
        self.secrets = {"root@pam": "geheim", "root@pam!tok": "s3cret+/ %"}
        self.tickets: dict[str, str] = {}
        self.asked: list[Asked] = []
        self.busy: set[GroupKey] = set()  #: groups with a backup
        self.lie: Callable[[str, dict[str, Any], bytes], bytes] | None = None
        self.hold_answers: set[str] = set()  #: endpoints that get no answer; the connection ends instead
        self.on_finish: Callable[[object], None] | None = None  #: called when a snapshot was finished


def plain(raw: bytes) -> bytes:
    """The content of a plain blob."""
    header, packed, encrypted = _MAGICS[bytes(raw[:8])]
    assert not encrypted
    return zstandard.ZstdDecompressor().decompressobj().decompress(raw[header:]) if packed else bytes(raw[header:])


def stamp(ctime: int) -> str:
    """A backup time in the name of a snapshot."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ctime))


def make_blob(data: bytes) -> bytes:
    """A plain, uncompressed blob."""
    return bytes.fromhex("42ab3807be8370a1") + zlib.crc32(data).to_bytes(4, "little") + data


def check_blob(body: bytes, encoded_size: int, *, crc: bool = True) -> bool:
    """Refuse what is no blob; True if it is encrypted."""
    if len(body) != encoded_size or bytes(body[:8]) not in _MAGICS or len(body) > (16 << 20) + 44:
        raise RefusedError(400, "wrong blob, or another size than announced")
    header, _, encrypted = _MAGICS[bytes(body[:8])]
    if crc and int.from_bytes(body[8:12], "little") != zlib.crc32(body[header:]):
        raise RefusedError(400, "Data blob has wrong CRC checksum.")
    return encrypted


def index_entries(raw: bytes) -> dict[bytes, int]:
    """Digest -> size of all chunks of an index."""
    if raw[:8] == bytes.fromhex("2f7f41ed91fd0fcd"):
        size = int.from_bytes(raw[64:72], "little")
        count = (len(raw) - 4096) // 32
        return {raw[4096 + 32 * n : 4128 + 32 * n]: min(CHUNK, size - n * CHUNK) for n in range(count)}
    entries: dict[bytes, int] = {}
    before = 0
    for at in range(4096, len(raw), 40):
        end = int.from_bytes(raw[at : at + 8], "little")
        entries[raw[at + 8 : at + 40]] = end - before
        before = end
    return entries
