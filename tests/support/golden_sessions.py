"""Connections of the real programs (spec 10, 12 and 13), asked of our server: each request, and what it answers.

What transcripts have of chunks is their digest, so each is sent as an encrypted one, whose content a server cannot see;
everything else (digests, sizes, offsets, checksums, names, orders) is as it was.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from datastore.blob import Blob, BlobKind
from datastore.codec import ChunkCodec
from datastore.names import MANIFEST_NAME
from server.answers import RAW
from server.errors import ApiError
from tests.support.direct_server import Direct, Got, Session
from tests.support.golden_rest import differences

JSON: Final = "application/json;charset=UTF-8"
#: The datastores of the transcripts; ours is `main`.
_STORES: Final = ("wiretgt", "wire")


def transcript(golden: Path, name: str) -> list[dict[str, Any]]:
    """The scenarios of a file."""
    scenarios: list[dict[str, Any]] = json.loads((golden / f"wire/{name}.json").read_text())
    return scenarios


def sealed(name: str) -> bytes:
    """A blob as an encrypted chunk looks."""
    content = hashlib.sha256(name.encode()).digest()
    return bytes(Blob.make(BlobKind.ENCRYPTED, content, iv=bytes(16), tag=bytes(16)))


@dataclass
class _Connection:
    """An upgraded connection of ours."""

    session: Session
    snapshot: tuple[str, ...]
    blobs: dict[str, bytes] = field(default_factory=dict)  #: that were sent, by name
    #: Writers by their numbers in the transcript: two that are opened at once may come in either order.
    writers: dict[int, int] = field(default_factory=dict)


class Sessions:
    """The requests of scenarios, in the order in which they were begun, asked by one user.

    `who`: the headers that tell who it is; `base`: the folder of the datastore, which texts name.
    """

    def __init__(self, direct: Direct, who: Mapping[str, str], base: Path) -> None:
        self._direct, self._who, self._base = direct, who, base
        self._more: dict[tuple[str, ...], int] = {}  #: bytes of blobs beyond those of the transcript, by snapshot
        self.compared = 0

    async def scenario(self, scenario: dict[str, Any]) -> list[str]:
        """Replay one; what differs."""
        faults: list[str] = []
        steps: list[tuple[int, int, dict[str, Any]]] = []
        for number, connection in enumerate(scenario.get("connections") or [{"http1": scenario["requests"]}]):
            requests = [*connection["http1"], *connection.get("http2", [])]
            steps += [(request["order"][0], number, request) for request in requests]
        opened: dict[int, _Connection] = {}
        async with AsyncExitStack() as stack:
            for _, number, request in sorted(steps, key=lambda step: step[0]):
                what = f"{scenario['scenario']} {request['method']} {request['path']} {request.get('query')}"
                if request["status"] == 101:
                    kind, query = request["path"].rpartition("/")[2], {**request["query"], "store": "main"}
                    try:
                        session = await stack.enter_async_context(self._direct.session(kind, self._who, query))
                    except ApiError as error:
                        return [*faults, f"{what}: {error.message}"]
                    snapshot = tuple(query.get(name, "") for name in ("ns", "backup-type", "backup-id", "backup-time"))
                    opened[number] = _Connection(session, snapshot)
                    if kind == "backup":
                        self._more[snapshot] = 0
                    continue
                over = opened.get(number)
                got = await (self._rest(request) if over is None else self._in_session(over, request))
                faults += [f"{what}: {one}" for one in self._compare(got, request, over)]
                self.compared += 1
        return faults

    async def _rest(self, request: dict[str, Any]) -> Got:
        path = request["path"].removeprefix("/api2/json")
        for store in _STORES:
            path = path.replace(f"/datastore/{store}/", "/datastore/main/")
        query = dict(request.get("query", {}))
        if query.get("store") in _STORES:
            query["store"] = "main"
        said, body = request.get("body", {}), b""
        if "decoded" in said:
            body = bytes(Blob.make(BlobKind.PLAIN, bytes(said["decoded"]["length"])))
        headers = {**self._who, "content-type": request["headers"]["content-type"]}
        return await self._direct.call(
            request["method"], path, None, query=query, json_body=said.get("json"), body=body, headers=headers
        )

    async def _in_session(self, over: _Connection, request: dict[str, Any]) -> Got:
        query, body = dict(request.get("query", {})), request.get("body", {})
        data = b""
        if request["path"].endswith("_chunk"):
            data = sealed(query["digest"])
        elif request["path"] == "/blob":
            data = _blob(query["file-name"], body.get("decoded", body), over.blobs)
            self._more[over.snapshot] += len(data) - body["length"]
        if data:
            query["encoded-size"] = str(len(data))
        document = body.get("json")
        if "wid" in query:
            query["wid"] = str(over.writers[int(query["wid"])])
        if isinstance(document, dict):
            document = {**document, "wid": over.writers[document["wid"]]}
        got = await over.session.call(
            request["method"], request["path"], query, json_body=document, body=data,
            content_type=request["content-type"],
        )  # fmt: skip
        if request["method"] == "POST" and request["path"].endswith("_index") and got.status == 200:
            over.writers[request["response"]["json"]["data"]] = got.data
            request["response"]["json"]["data"] = got.data
        return got

    def _compare(self, got: Got, request: dict[str, Any], over: _Connection | None) -> Iterator[str]:
        """What is different about an answer."""
        response = request.get("response") or {}
        if got.status != request["status"]:
            yield f"{got.status} instead of {request['status']}: {got.text[:200]}"
            return
        kind = request.get("response-type") or request.get("response-headers", {}).get("content-type", JSON)
        if got.content_type != kind:
            yield f"labelled {got.content_type} instead of {kind}"
        if "index" in response:
            theirs = response["index"]
            ours = entries(got.body, fixed=response["kind"].startswith("fixed"))
            if ours != theirs.get("digests", theirs.get("entries")):
                yield "the index is another one"
        elif "json" in response.get("decoded", {}):
            assert over is not None
            manifest = json.loads(ChunkCodec().decode_blob(got.body, crypt_mode=None, where=MANIFEST_NAME))
            names = ("backup-type", "backup-id", "backup-time")  # it may be that of the previous snapshot
            snapshot = (over.snapshot[0], *(str(manifest[name]) for name in names))
            yield from _other_manifest(manifest, response["decoded"]["json"], self._more.get(snapshot))
        elif "text" in response:
            text = got.text.replace(str(self._base), "/datastore")
            wanted = response["text"]
            for store in _STORES:
                wanted = wanted.replace(f"/datastore/{store}/", "/datastore/")
            if text != wanted:
                yield f"{text!r} instead of {wanted!r}"
        elif kind != RAW and "json" in response:
            yield from differences(json.loads(got.body), response["json"])


def _blob(name: str, said: dict[str, Any], known: dict[str, bytes]) -> bytes:
    """A blob of another content in the place of one; the manifest is what it was, and names those in `known`."""
    if name != MANIFEST_NAME:
        known[name] = bytes(Blob.make(BlobKind.PLAIN, bytes(said["length"])))
        return known[name]
    manifest = deepcopy(said["json"])
    for file in manifest["files"]:
        if file["filename"] in known:
            stored = known[file["filename"]]
            file["size"], file["csum"] = len(stored), hashlib.sha256(stored).hexdigest()
    return bytes(ChunkCodec().encode_blob(json.dumps(manifest).encode()))


def _other_manifest(ours: dict[str, Any], theirs: dict[str, Any], more: int | None) -> Iterator[str]:
    """What differs in a manifest; `more`: bytes of blobs that were sent to ours beyond what was sent to theirs."""
    theirs = deepcopy(theirs)
    for manifest in (ours, theirs):
        for file in manifest["files"]:
            if file["filename"].endswith(".blob"):
                file.update(csum="", size=0)
    counted, known = (one["unprotected"]["chunk_upload_stats"] for one in (ours, theirs))
    known["compressed_size"] = counted["compressed_size"]
    known["size"] = counted["size"] if more is None else known["size"] + more
    yield from differences(ours, theirs)


def entries(raw: bytes, *, fixed: bool) -> list[Any]:
    """The entries of an index as the transcripts write them."""
    body = raw[4096:]
    if fixed:
        return [body[at : at + 32].hex() for at in range(0, len(body), 32)]
    return [
        [int.from_bytes(body[at : at + 8], "little"), body[at + 8 : at + 40].hex()] for at in range(0, len(body), 40)
    ]
