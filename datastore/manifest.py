"""Manifest (`index.json.blob`): what a snapshot holds, signed when there is a key.

Format: docs/formats.md, "Manifest". A plain blob (never encrypted) with JSON in it. The signature covers every key but
`signature` and `unprotected`, also keys that only others know, so the parsed document is kept as it came.
"""

import hmac
import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final, Self, TypeGuard

from core.buffers import Buffer
from core.errors import FleeceError, FormatError, NotFoundError, UsageError
from datastore.blob import Blob
from datastore.codec import ChunkCodec, CryptKey, decode_plain, encode_plain, format_fingerprint, parse_fingerprint
from datastore.crypt_mode import CryptMode
from datastore.errors import KeyNeededError
from datastore.names import CLIENT_LOG_NAME, MANIFEST_NAME, BackupType, Group, Snapshot, archive_kind, is_safe_id

#: Bytes of JSON a manifest may have: 25 000 files. Checked before anything is parsed, which may take 35 times as much
#: memory (a list of empty lists).
MAX_MANIFEST_SIZE: Final = 4 << 20
#: Levels of nesting; PBS's parser has the same bound.
_MAX_DEPTH: Final = 128
#: Last second of the year 9999: later times have no folder name.
_MAX_CTIME: Final = 253_402_300_799
_U64: Final = 1 << 64
_HEX_32: Final = re.compile(r"[0-9a-fA-F]{64}")
_UNLISTED: Final = frozenset((MANIFEST_NAME, CLIENT_LOG_NAME))
_FINGERPRINT_KEY: Final = "key-fingerprint"


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One archive of a snapshot."""

    filename: str  #: with type extension
    crypt_mode: CryptMode
    size: int  #: bytes: of an image or stream plain, of a blob its encoded file
    csum: bytes  #: of an index its csum, of a blob SHA-256 of its encoded file


class Manifest:
    """What a snapshot holds: who it is, its files in order of upload, and the unprotected part.

    Made by `new` or `parse`; `files` grows by `add`, the unprotected part changes by `with_unprotected`.
    """

    __slots__ = ("_document", "_files", "signature", "snapshot", "unprotected")

    def __init__(
        self,
        snapshot: Snapshot,
        files: list[ManifestFile],
        document: dict[str, Any],
        signature: str | None,
        unprotected: dict[str, Any],
    ) -> None:
        #: Type, id and time as the manifest says (the namespace is not in it: the root).
        self.snapshot: Final = snapshot
        #: 64 hex digits, None if unsigned.
        self.signature = signature
        #: Notes, verify state and the like; anyone who can write to the store may change it.
        self.unprotected: Final = unprotected
        self._files = files
        self._document = document  # everything that a signature covers, as it came

    @classmethod
    def new(cls, snapshot: Snapshot) -> Self:
        """A manifest of `snapshot` without files."""
        document: dict[str, Any] = {
            "backup-type": snapshot.group.type.value,
            "backup-id": snapshot.group.id,
            "backup-time": snapshot.ctime,
            "files": [],
        }
        return cls(snapshot, [], document, None, {})

    @classmethod
    def parse(cls, blob: Buffer, *, where: str, key: CryptKey | None = None) -> Self:
        """Read the encoded manifest blob; with `key`, a signature is checked (an unsigned manifest passes).

        Raises:
            FormatError: broken or encrypted blob, no JSON, or content that no writer makes; a wrong signature.
            KeyNeededError: it was signed with another key than `key`; if it names none, that or altered.
        """
        text = decode_plain(blob, max_size=MAX_MANIFEST_SIZE, where=where)
        document = _load(text, where)
        signature = document.pop("signature", None)
        if signature is not None and not (isinstance(signature, str) and _HEX_32.fullmatch(signature)):
            raise _error(where, "its signature is not 64 hex digits")
        unprotected = document.pop("unprotected", None)
        if unprotected is None:
            unprotected = {}
        if not isinstance(unprotected, dict):
            raise _error(where, "'unprotected' is no object")
        _check_unprotected(unprotected, where)
        manifest = cls(_snapshot(document, where), _files(document, where), document, signature, unprotected)
        if key is not None and signature is not None:
            manifest._check_signature(key, signature, where)
        return manifest

    @property
    def type(self) -> BackupType:
        """The group's type."""
        return self.snapshot.group.type

    @property
    def id(self) -> str:
        """The group's id."""
        return self.snapshot.group.id

    @property
    def ctime(self) -> int:
        """Backup time, Unix seconds."""
        return self.snapshot.ctime

    @property
    def files(self) -> list[ManifestFile]:
        """The archives in order of upload (a copy of the list)."""
        return list(self._files)

    def add(self, file: ManifestFile) -> None:
        """Append `file`; a signature made before no longer counts.

        Raises:
            UsageError: a name that is unsafe or never listed.
            FleeceError: the name is listed already.
        """
        archive_kind(file.filename)
        if file.filename in _UNLISTED:
            raise UsageError("list in the manifest", file.filename, "this name is never listed")
        if any(other.filename == file.filename for other in self._files):
            raise FleeceError("list in the manifest", file.filename, "it is listed already")
        if not 0 <= file.size < _U64 or len(file.csum) != 32:
            raise FleeceError("list in the manifest", file.filename, f"size {file.size}, csum {file.csum.hex()}")
        entry = {
            "filename": file.filename,
            "crypt-mode": file.crypt_mode.value,
            "size": file.size,
            "csum": file.csum.hex(),
        }
        self._document["files"].append(entry)
        self._files.append(file)
        self.signature = None

    def file(self, name: str) -> ManifestFile:
        """The archive `name` (full file name).

        Raises:
            NotFoundError: not listed.
        """
        for file in self._files:
            if file.filename == name:
                return file
        listed = ", ".join(file.filename for file in self._files) or "nothing"
        raise NotFoundError("find archive", f"{self.snapshot}/{name}", f"the snapshot holds {listed}")

    def canonical(self) -> bytes:
        """The bytes that a signature covers.

        Raises:
            FormatError: a null or a number that is no 64-bit integer, of which no canonical form is defined.
        """
        return canonical_json(self._document, where=f"{self.snapshot}/{MANIFEST_NAME}")

    def encode(self, codec: ChunkCodec | None = None) -> Blob:
        """The blob to be stored: compressed, never encrypted; signed if `codec` has a key.

        Without a key, a signature that the manifest came with is written again.
        """
        signature, unprotected = self.signature, self.unprotected
        if codec is not None and codec.key is not None:
            signature = codec.key.sign(self.canonical()).hex()
            unprotected = {**unprotected, _FINGERPRINT_KEY: codec.key.fingerprint_text}
        document = {**self._document, "signature": signature, "unprotected": unprotected}
        text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return encode_plain(text.encode())

    def with_unprotected(self, changes: Mapping[str, Any]) -> Self:
        """A copy whose unprotected part has `changes`; the value None removes a key. The signature stays valid.

        Raises:
            FormatError: a value that JSON cannot carry.
        """
        unprotected = deepcopy(self.unprotected)
        for name, value in changes.items():
            if value is None:
                unprotected.pop(name, None)
            else:
                unprotected[name] = deepcopy(value)
        where = f"{self.snapshot}/{MANIFEST_NAME}"
        _check_tree(unprotected, where)
        _check_unprotected(unprotected, where)
        return type(self)(self.snapshot, list(self._files), deepcopy(self._document), self.signature, unprotected)

    def codec(self, key: CryptKey | None) -> ChunkCodec:
        """A codec that reads this snapshot; its messages name the key that is needed."""
        return ChunkCodec(key, needs=self.fingerprint)

    @property
    def notes(self) -> str:
        """The snapshot's notes, empty if there are none."""
        notes: str = self.unprotected.get("notes", "")
        return notes

    @property
    def verify_state(self) -> dict[str, Any] | None:
        """`{"state": "ok" | "failed", "upid": ...}`, None if it was never verified."""
        state: dict[str, Any] | None = self.unprotected.get("verify_state")
        return state

    @property
    def chunk_upload_stats(self) -> dict[str, Any] | None:
        """`{"count", "size", "compressed_size", "duplicates"}` of the run that made the snapshot."""
        stats: dict[str, Any] | None = self.unprotected.get("chunk_upload_stats")
        return stats

    @property
    def fingerprint(self) -> bytes | None:
        """The 32-byte fingerprint of the key the snapshot was made with (encrypted or signed), None without."""
        text = self.unprotected.get(_FINGERPRINT_KEY)
        return None if text is None else parse_fingerprint(text)

    @property
    def lost_signature(self) -> bool:
        """True if it says that it was made with a key but has no signature: no writer does that, so it was removed."""
        made_with_key = self.fingerprint is not None or any(
            file.crypt_mode is not CryptMode.NONE for file in self._files
        )
        return made_with_key and self.signature is None

    def _check_signature(self, key: CryptKey, signature: str, where: str) -> None:
        if self.fingerprint is not None and self.fingerprint != key.fingerprint:
            needed = format_fingerprint(self.fingerprint)
            why = f"it is signed with the key {needed}, given is {key.fingerprint_text}"
            raise KeyNeededError("check the signature of", where, why)
        if not hmac.compare_digest(key.sign(canonical_json(self._document, where=where)).hex(), signature.lower()):
            if self.fingerprint is None:
                why = f"it names no key, and its signature is not one of {key.fingerprint_text}"
                raise KeyNeededError("check the signature of", where, why, "another key is needed, or it was altered")
            raise FormatError("check the signature of", where, "it does not match: the manifest was altered")


def canonical_json(value: object, *, where: str) -> bytes:
    """`value` as PBS signs it: keys sorted by bytes, no white space, UTF-8, integers only.

    Raises:
        FormatError: a null, or a number that is no 64-bit integer.
    """
    _check_tree(value, where, signed=True)
    # Python sorts by code points, which is the order of the UTF-8 bytes.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _load(text: bytes, where: str) -> dict[str, Any]:
    try:
        # Decoded here, for json.loads would guess UTF-16 and UTF-32.
        document = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise _error(where, "its JSON is nested too deep") from None
    except ValueError as error:
        raise _error(where, f"it is no valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise _error(where, "its JSON is no object")
    _check_tree(document, where)
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Parsers differ in which of two equal keys counts, so that what is signed could be read in two ways.
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_tree(tree: object, where: str, *, signed: bool = False) -> None:
    """Refuse what cannot be written again (lone surrogates, too deep) or, `signed`, has no canonical form."""
    level: list[object] = [tree]
    depth = 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise _error(where, f"its JSON is nested deeper than {_MAX_DEPTH} levels")
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value)
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
            elif isinstance(value, str):
                if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                    raise _error(where, "a text in it is no Unicode")
            elif isinstance(value, bool):
                pass
            elif isinstance(value, int):
                if signed and not -(1 << 63) <= value < _U64:
                    raise _error(where, "a number in its signed part has more than 64 bits")
            elif signed:
                raise _error(where, "a null or a fraction in its signed part")
            elif value is not None and not isinstance(value, float):
                raise _error(where, f"{type(value).__name__} is nothing that JSON can carry")
        level = below


def _check_unprotected(unprotected: dict[str, Any], where: str) -> None:
    # null counts as absent, as it does for PBS.
    for name, kind in (("notes", str), ("verify_state", dict), ("chunk_upload_stats", dict), (_FINGERPRINT_KEY, str)):
        value = unprotected.get(name)
        if value is None:
            unprotected.pop(name, None)
        elif not isinstance(value, kind):
            raise _error(where, f"'{name}' in its unprotected part has the wrong type")
    try:
        parse_fingerprint(unprotected.get(_FINGERPRINT_KEY, "0" * 64))
    except UsageError as error:
        raise _error(where, f"'{_FINGERPRINT_KEY}': {error.why}") from None


def _snapshot(document: dict[str, Any], where: str) -> Snapshot:
    kind, backup_id, ctime = (document.get(name) for name in ("backup-type", "backup-id", "backup-time"))
    if kind not in [known.value for known in BackupType]:
        raise _error(where, "'backup-type' is none of vm, ct, host")
    if not isinstance(backup_id, str) or not is_safe_id(backup_id):
        raise _error(where, "'backup-id' is missing or unsafe")
    if not _is_integer(ctime) or not 1 <= ctime <= _MAX_CTIME:
        raise _error(where, "'backup-time' is missing or no time")
    return Group(BackupType(kind), backup_id).at(ctime)


def _files(document: dict[str, Any], where: str) -> list[ManifestFile]:
    entries = document.get("files")
    if not isinstance(entries, list):
        raise _error(where, "'files' is missing or no list")
    files = [_file(entry, number, where) for number, entry in enumerate(entries)]
    if len({file.filename for file in files}) != len(files):
        raise _error(where, "a file is listed twice")
    return files


def _file(entry: object, number: int, where: str) -> ManifestFile:
    if not isinstance(entry, dict):
        raise _error(where, f"file {number} is no object")
    name, size, csum = entry.get("filename"), entry.get("size"), entry.get("csum")
    if not isinstance(name, str):
        raise _error(where, f"file {number} has no name")
    try:
        archive_kind(name)
    except UsageError as error:
        raise _error(where, f"the name of file {number}, {name[:80]!r}: {error.why}") from None
    if name in _UNLISTED:
        raise _error(where, f"it lists {name}, which no writer does")
    try:
        crypt_mode = CryptMode(entry.get("crypt-mode", CryptMode.NONE.value))
    except ValueError:
        raise _error(where, f"{name} has an unknown crypt mode") from None
    if not _is_integer(size) or not 0 <= size < _U64:
        raise _error(where, f"the size of {name} is missing or no 64-bit number")
    if not isinstance(csum, str) or _HEX_32.fullmatch(csum) is None:
        raise _error(where, f"the csum of {name} is not 64 hex digits")
    return ManifestFile(name, crypt_mode, size, bytes.fromhex(csum))


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _error(where: str, why: str) -> FormatError:
    return FormatError("read manifest", where, why)
