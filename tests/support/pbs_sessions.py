"""Backup and reader sessions of the double of a PBS server: sections 8 and 9 of the wire protocol."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import trio

from tests.support.pbs_store import (
    CHUNK,
    FORM,
    JSON,
    RAW,
    SAFE_ID,
    Asked,
    Folder,
    Key,
    PbsStore,
    RefusedError,
    check_blob,
    index_entries,
    make_blob,
    plain,
)

#: Endpoint -> its parameters with type; `?` behind the name: may be missing.
BACKUP_CALLS: Final[dict[tuple[str, str], dict[str, type]]] = {
    ("GET", "previous_backup_time"): {},
    ("GET", "previous"): {"archive-name": str},
    ("POST", "fixed_index"): {"archive-name": str, "size": int, "reuse-csum?": str},
    ("PUT", "fixed_index"): {"wid": int, "digest-list": list, "offset-list": list},
    ("POST", "fixed_chunk"): {"wid": int, "digest": str, "size": int, "encoded-size": int},
    ("POST", "fixed_close"): {"wid": int, "chunk-count": int, "size": int, "csum": str},
    ("POST", "dynamic_index"): {"archive-name": str},
    ("PUT", "dynamic_index"): {"wid": int, "digest-list": list, "offset-list": list},
    ("POST", "dynamic_chunk"): {"wid": int, "digest": str, "size": int, "encoded-size": int},
    ("POST", "dynamic_close"): {"wid": int, "chunk-count": int, "size": int, "csum": str},
    ("POST", "blob"): {"file-name": str, "encoded-size": int},
    ("POST", "finish"): {},
}  # fmt: skip
READER_CALLS: Final[dict[tuple[str, str], dict[str, type]]] = {
    ("GET", "download"): {"file-name": str},
    ("GET", "chunk"): {"digest": str},
}
_RAW_CALLS: Final = {"previous", "fixed_chunk", "dynamic_chunk", "blob", "download", "chunk"}


@dataclass
class _Index:
    name: str
    size: int | None
    digests: list[bytes]
    ends: list[int]
    reused: bool
    count: int = 0
    tail: bool = False


class PbsSession:
    """A backup or a reader session: sections 8 and 9."""

    def __init__(self, store: PbsStore, protocol: str, query: dict[str, str], user: str) -> None:
        self.store, self.protocol = store, protocol
        ns, kind, backup_id, ctime = (
            query.pop("ns", ""),
            *(query.pop(f"backup-{name}") for name in ("type", "id", "time")),
        )
        if query.pop("store") != store.store:
            raise RefusedError(400, "no such datastore")
        query.pop("debug", None)
        query.pop("benchmark", None)
        if query:
            raise RefusedError(400, f"schema does not allow additional properties: {sorted(query)}")
        self.key: Key = (ns, kind, backup_id, int(ctime))
        self.group = self.key[:3]
        self.known: dict[bytes, int] = {}
        self.indexes: dict[int, _Index] = {}
        self.opened = 0
        self.stats = {"count": 0, "size": 0, "compressed_size": 0, "duplicates": 0}
        self.finished = False
        self.over = False
        if ns not in store.namespaces:
            raise RefusedError(404 if protocol == "backup" else 400, "namespace not found")
        if protocol == "reader":
            if self.key not in store.folders:
                raise RefusedError(400, f"snapshot {self.key} does not exist.")
            if store.folders[self.key].locked:
                raise RefusedError(400, "unable to acquire lock on snapshot - EWOULDBLOCK")
            store.folders[self.key].readers += 1
            return
        if self.group in store.busy:
            raise RefusedError(400, "while creating locked backup group: unable to acquire lock")
        owner = store.owners.setdefault(self.group, user)
        if owner != user and not owner.startswith(f"{user}!"):
            raise RefusedError(400, f"backup owner check failed ({user} != {owner})")
        finished = [key for key, one in store.folders.items() if key[:3] == self.group and one.manifest]
        self.previous = max(finished, default=None)
        if self.previous is not None and store.folders[self.previous].failed:
            self.previous = None
        if self.previous is not None and self.previous[3] >= self.key[3]:
            raise RefusedError(400, "backup timestamp is older than last backup.")
        if self.key in store.folders:
            raise RefusedError(400, "backup directory already exists.")
        store.busy.add(self.group)
        store.folders[self.key] = Folder(locked=True)

    def end(self) -> None:
        if self.protocol == "reader":
            self.store.folders[self.key].readers -= 1
        elif not self.finished:
            del self.store.folders[self.key]
            self.store.busy.discard(self.group)

    def request(self, headers: dict[str, str], body: bytes) -> tuple[int, bytes, str]:
        """Status, body and content type of the answer to a request."""
        method, target = headers[":method"], headers[":path"]
        parts = urlsplit(target)
        name = parts.path.removeprefix("/")
        content = headers.get("content-type", "")
        asked = Asked(self.protocol, method, parts.path, {}, content, len(body))
        self.store.asked.append(asked)
        try:
            if name in self.store.hold_answers:
                self.store.hold_answers.discard(name)
                self._call(method, name, parts.query, content, body, asked)
                raise trio.BrokenResourceError
            result = self._call(method, name, parts.query, content, body, asked)
        except RefusedError as error:
            asked.status = error.status
            return error.status, error.text.encode(), "application/json;charset=UTF-8"
        asked.status = 200
        raw = isinstance(result, bytes)
        answer: bytes = result if raw else json.dumps({"data": result}).encode()
        if self.store.lie is not None:
            answer = self.store.lie(name, asked.parameters, answer)
        return 200, answer, RAW if raw else "application/json;charset=UTF-8"

    def _call(self, method: str, name: str, query: str, content: str, body: bytes, asked: Asked) -> Any:
        calls = BACKUP_CALLS if self.protocol == "backup" else READER_CALLS
        specified = calls.get((method, name))
        if specified is None:
            raise RefusedError(404, f"Path '{name}' not found.")
        given: dict[str, Any] = {}
        for key, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
            if key in given:
                raise RefusedError(400, f"'{key}' twice")
            given[key] = value
        if content == JSON:
            if given or name in _RAW_CALLS or method == "GET":
                raise RefusedError(400, "JSON where it does not belong")
            if len(body) >= 512 << 10:
                raise RefusedError(400, "Request body too large")
            given = json.loads(body)
        elif name in _RAW_CALLS or content in ("", FORM):
            if body and name not in _RAW_CALLS:
                raise RefusedError(400, "a body where none belongs")
            for key, kind in specified.items():
                plain_key = key.removesuffix("?")
                if kind is int and plain_key in given:
                    given[plain_key] = int(given[plain_key])
        else:
            raise RefusedError(400, f"unsupported content type {content}")
        asked.parameters = given
        names = {key.removesuffix("?"): kind for key, kind in specified.items()}
        for key, value in given.items():
            if key not in names or type(value) is not names[key]:
                raise RefusedError(400, f"parameter verification failed - '{key}': unknown or wrong type")
        missing = [key for key in specified if not key.endswith("?") and key not in given]
        if missing:
            raise RefusedError(400, f"parameter verification failed - '{missing[0]}': property is missing")
        handler = getattr(self, f"_{method.lower()}_{name.replace('fixed_', '').replace('dynamic_', '')}")
        arguments = {key.replace("-", "_"): value for key, value in given.items()}
        if name in _RAW_CALLS and method == "POST":
            arguments["body"] = body
        if name.startswith(("fixed_", "dynamic_")):
            arguments["fixed"] = name.startswith("fixed_")
        return handler(**arguments)

    # --- backup ------------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Folder:
        return self.store.folders[self.key]

    def _get_previous_backup_time(self) -> int | None:
        return None if self.previous is None else self.previous[3]

    def _get_previous(self, archive_name: str) -> bytes:
        raw = None if self.previous is None else self.store.folders[self.previous].files.get(archive_name)
        if raw is None:
            raise RefusedError(404 if archive_name.endswith(".blob") else 400, "no such file")
        if not archive_name.endswith(".blob"):
            self.known |= index_entries(raw)
        return raw

    def _post_index(
        self, fixed: bool, archive_name: str, size: int | None = None, reuse_csum: str | None = None
    ) -> int:
        if self.over or self.opened >= 256:
            raise RefusedError(400, "too many writers, or the session is over")
        if not archive_name.endswith(".fidx" if fixed else ".didx") or re.fullmatch(SAFE_ID, archive_name) is None:
            raise RefusedError(400, f"wrong archive extension: '{archive_name}'")
        if archive_name in self.folder.files or any(one.name == archive_name for one in self.indexes.values()):
            raise RefusedError(400, "opened twice")
        digests = [bytes(32)] * -(-(size or 0) // CHUNK)
        if reuse_csum is not None:
            raw = None if self.previous is None else self.store.folders[self.previous].files.get(archive_name)
            if raw is None or hashlib.sha256(raw[4096:]).hexdigest() != reuse_csum:
                raise RefusedError(400, "expected csum did not match last backup's csum")
            old = [raw[at : at + 32] for at in range(4096, len(raw), 32)]
            if len(old) != len(digests):
                raise RefusedError(400, "other number of chunks")
            digests = old
        self.opened += 1
        index = _Index(archive_name, size if fixed else None, digests if fixed else [], [], reuse_csum is not None)
        self.indexes[self.opened] = index
        return self.opened

    def _index(self, wid: int, fixed: bool) -> _Index:
        index = self.indexes.get(wid)
        if index is None or fixed != (index.size is not None):
            raise RefusedError(400, f"{wid} already closed, or of another kind")
        return index

    def _post_chunk(self, fixed: bool, wid: int, digest: str, size: int, encoded_size: int, body: bytes) -> str:
        index = self._index(wid, fixed)
        name = bytes.fromhex(digest)
        if re.fullmatch("[a-f0-9]{64}", digest) is None or not 1 <= size <= 16 << 20:
            raise RefusedError(400, "parameter verification failed")
        encrypted = check_blob(body, encoded_size, crc=False)
        if not encrypted:
            data = plain(body)
            if hashlib.sha256(data).digest() != name or len(data) != size:
                raise RefusedError(400, "digest or size does not fit")
        if fixed and size != CHUNK:
            if size > CHUNK or index.tail:
                raise RefusedError(400, "got more than one small chunk")
            index.tail = True
        self.stats["count"] += 1
        self.stats["size"] += size
        self.stats["compressed_size"] += len(body)
        self.stats["duplicates"] += name in self.store.chunks
        self.store.chunks.setdefault(name, body)
        self.known[name] = size
        return digest

    def _put_index(self, fixed: bool, wid: int, digest_list: list[str], offset_list: list[int]) -> None:
        index = self._index(wid, fixed)
        if len(digest_list) != len(offset_list) or not all(type(offset) is int for offset in offset_list):
            raise RefusedError(400, "lists of other lengths")
        for text, offset in zip(digest_list, offset_list, strict=True):
            digest = bytes.fromhex(text)
            if digest not in self.known:
                raise RefusedError(400, f"no such chunk {text}")
            size = self.known[digest]
            if index.size is None:
                if offset != (index.ends[-1] if index.ends else 0):
                    raise RefusedError(400, f"wrong offset {offset}")
                index.ends.append(offset + size)
                index.digests.append(digest)
            else:
                end = offset + size
                if end > index.size or offset % CHUNK or (size != CHUNK and end != index.size):
                    raise RefusedError(400, f"wrong offset {offset}")
                index.digests[offset // CHUNK] = digest
            index.count += 1

    def _post_close(self, fixed: bool, wid: int, chunk_count: int, size: int, csum: str) -> None:
        index = self._index(wid, fixed)
        if chunk_count != index.count:
            raise RefusedError(400, f"unexpected chunk count {chunk_count} != {index.count}")
        if index.size is not None:
            if not index.reused and (chunk_count != len(index.digests) or size != index.size):
                raise RefusedError(400, "unexpected chunk count or size")
            area = b"".join(index.digests)
            head = bytes.fromhex("2f7f41ed91fd0fcd") + bytes(24) + hashlib.sha256(area).digest()
            head += index.size.to_bytes(8, "little") + CHUNK.to_bytes(8, "little")
        else:
            if not index.ends or size != index.ends[-1]:
                raise RefusedError(400, "unexpected size")
            pairs = zip(index.ends, index.digests, strict=True)
            area = b"".join(end.to_bytes(8, "little") + digest for end, digest in pairs)
            head = bytes.fromhex("1c914ea5 19baB3cd") + bytes(24) + hashlib.sha256(area).digest()
        if hashlib.sha256(area).hexdigest() != csum:
            raise RefusedError(400, "index checksum does not match")
        self.folder.files[index.name] = head.ljust(4096, b"\0") + area
        del self.indexes[wid]

    def _post_blob(self, file_name: str, encoded_size: int, body: bytes) -> None:
        if not file_name.endswith(".blob") or re.fullmatch(SAFE_ID, file_name) is None or self.over:
            raise RefusedError(400, f"wrong blob file extension: '{file_name}'")
        check_blob(body, encoded_size)
        self.folder.files[file_name] = body

    def _post_finish(self) -> None:
        if self.over:
            raise RefusedError(400, "backup is already in the process of finishing.")
        if self.indexes:
            raise RefusedError(400, "found open index writer - unable to finish backup")
        if not self.folder.files:
            raise RefusedError(400, "backup does not contain valid files (file count == 0)")
        self.over = True
        manifest = self.folder.manifest
        if manifest is None:
            raise RefusedError(400, "unable to update manifest blob")
        manifest.setdefault("unprotected", {})["chunk_upload_stats"] = self.stats
        self.folder.files["index.json.blob"] = make_blob(json.dumps(manifest).encode())
        self.folder.locked = False
        self.finished = True
        self.store.busy.discard(self.group)
        if self.store.on_finish is not None:
            self.store.on_finish(self.key)

    # --- reader ------------------------------------------------------------------------------------------------------

    def _get_download(self, file_name: str) -> bytes:
        raw = self.folder.files.get(file_name)
        if raw is None:
            raise RefusedError(404 if file_name.endswith(".blob") else 400, "No such file or directory (os error 2)")
        if not file_name.endswith(".blob"):
            self.known |= index_entries(raw)
        return raw

    def _get_chunk(self, digest: str) -> bytes:
        name = bytes.fromhex(digest)
        if name not in self.known:
            raise RefusedError(401, f"download chunk {digest} not allowed")
        if name not in self.store.chunks:
            raise RefusedError(400, "No such file or directory (os error 2)")
        return self.store.chunks[name]
