"""Orders of calls of the real programs (spec 10), replayed: each request with its parameters, each answer compared.

What transcripts have of chunks is their digest, so each is sent as an encrypted one, whose content a server cannot see;
everything else (digests, sizes, offsets, checksums, names, orders) is as it was.
"""

import hashlib
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
from hyperframe.frame import Frame, SettingsFrame, WindowUpdateFrame

from datastore.blob import Blob, BlobKind
from datastore.codec import ChunkCodec
from repository.local import LocalRepository
from server.answers import RAW
from server.errors import ApiError
from tests.support.direct_server import Direct, Got, Session, query_of
from tests.support.golden_rest import differences
from tests.support.wire_server import wire_server

JSON = "application/json;charset=UTF-8"
USER = "t@pbs"
#: Of push, what came before the source was changed by other programs; of readers, what was backed up in `backup.json`.
PUSHES = ("push1", "push2", "push3", "push4")
NOT_THERE = ("mount-meta",)


def sealed(name: str) -> bytes:
    """A blob as an encrypted chunk looks."""
    content = hashlib.sha256(name.encode()).digest()
    return bytes(Blob.make(BlobKind.ENCRYPTED, content, iv=bytes(16), tag=bytes(16)))


class Sessions:
    """The requests of scenarios, in the order in which they were begun."""

    def __init__(self, direct: Direct) -> None:
        self._direct = direct
        self._blobs: dict[str, dict[str, bytes]] = {}
        #: Writers by their numbers in the transcript: two that are opened at once may come in either order.
        self._writers: dict[str, dict[int, int]] = {}
        self.compared = 0

    async def scenario(self, scenario: dict[str, Any]) -> list[str]:
        """Replay one; what differs."""
        faults: list[str] = []
        steps: list[tuple[int, int, dict[str, Any]]] = []
        for number, connection in enumerate(scenario["connections"]):
            requests = [*connection["http1"], *connection.get("http2", [])]
            steps += [(request["order"][0], number, request) for request in requests]
        opened: dict[int, Session] = {}
        async with AsyncExitStack() as stack:
            for _, number, request in sorted(steps, key=lambda step: step[0]):
                what = f"{scenario['scenario']} {request['method']} {request['path']} {request.get('query')}"
                if request["status"] == 101:
                    kind = request["path"].rpartition("/")[2]
                    query = {**request["query"], "store": "main"}
                    try:
                        opened[number] = await stack.enter_async_context(self._direct.session(kind, USER, query))
                    except ApiError as error:
                        return [*faults, f"{what}: {error.message}"]
                    self._blobs[f"{number}"], self._writers[f"{number}"] = {}, {}
                    continue
                if number in opened:
                    got = await self._in_session(opened[number], f"{number}", request)
                else:
                    path = request["path"].removeprefix("/api2/json").replace("/wiretgt/", "/main/")
                    body = request.get("body", {}).get("json")
                    query = request.get("query", "")
                    got = await self._direct.call(request["method"], path, USER, query=query, json_body=body)
                faults += [f"{what}: {one}" for one in compare(got, request)]
                self.compared += 1
        return faults

    async def _in_session(self, session: Session, connection: str, request: dict[str, Any]) -> Got:
        query, body = dict(request.get("query", {})), request.get("body", {})
        data = b""
        if request["path"].endswith("_chunk"):
            data = sealed(query["digest"])
        elif request["path"] == "/blob":
            data = self._blob(query["file-name"], body.get("decoded", body), connection)
        if data:
            query["encoded-size"] = str(len(data))
        writers, document = self._writers[connection], body.get("json")
        if "wid" in query:
            query["wid"] = str(writers[int(query["wid"])])
        if isinstance(document, dict):
            document = {**document, "wid": writers[document["wid"]]}
        got = await session.call(
            request["method"], request["path"], query, json_body=document, body=data,
            content_type=request["content-type"],
        )  # fmt: skip
        if request["method"] == "POST" and request["path"].endswith("_index") and got.status == 200:
            writers[request["response"]["json"]["data"]] = got.data
            request["response"]["json"]["data"] = got.data
        return got

    def _blob(self, name: str, said: dict[str, Any], connection: str) -> bytes:
        known = self._blobs[connection]
        if name != "index.json.blob":
            known[name] = bytes(Blob.make(BlobKind.PLAIN, bytes(said["length"])))
            return known[name]
        manifest = json.loads(json.dumps(said["json"]))
        for file in manifest["files"]:
            if file["filename"] in known:
                stored = known[file["filename"]]
                file["size"], file["csum"] = len(stored), hashlib.sha256(stored).hexdigest()
        return bytes(ChunkCodec().encode_blob(json.dumps(manifest).encode()))


def compare(got: Got, request: dict[str, Any]) -> list[str]:
    """What is different about an answer."""
    if got.status != request["status"]:
        return [f"{got.status} instead of {request['status']}: {got.text[:200]}"]
    kind = request.get("response-type") or request.get("response-headers", {}).get("content-type", JSON)
    if got.content_type != kind:
        return [f"labelled {got.content_type} instead of {kind}"]
    response = request.get("response") or {}
    if "index" in response:
        theirs = response["index"]
        ours = entries(got.body, fixed=response["kind"].startswith("fixed"))
        return [] if ours == theirs.get("digests", theirs.get("entries")) else ["the index is another one"]
    if kind == RAW or "json" not in response:
        return []
    wanted = json.loads(json.dumps(response["json"]).replace("sync@pbs!tok", USER).replace("t@pbs!tok", USER))
    return list(differences(json.loads(got.body), wanted))


def entries(raw: bytes, *, fixed: bool) -> list[Any]:
    """The entries of an index as the transcripts write them."""
    body = raw[4096:]
    if fixed:
        return [body[at : at + 32].hex() for at in range(0, len(body), 32)]
    return [
        [int.from_bytes(body[at : at + 8], "little"), body[at + 8 : at + 40].hex()] for at in range(0, len(body), 40)
    ]


@pytest.mark.timeout(600)
async def test_backups_and_then_restores(golden: Path, direct: Direct, local: LocalRepository, no_delays: None) -> None:
    direct.right("/datastore/main", USER, "DatastoreAdmin")
    sessions = Sessions(direct)
    faults: list[str] = []
    for name in ("backup", "reader"):
        for scenario in json.loads((golden / f"wire/{name}.json").read_text()):
            if scenario["scenario"] not in NOT_THERE:
                faults += await sessions.scenario(scenario)
    assert sessions.compared > 120
    assert not faults, "\n".join(faults)
    assert len(await local.snapshots()) == 9


@pytest.mark.timeout(600)
async def test_pushes(golden: Path, direct: Direct, no_delays: None) -> None:
    direct.right("/datastore/main", USER, "DatastoreAdmin")
    sessions = Sessions(direct)
    faults: list[str] = []
    for scenario in json.loads((golden / "wire/push.json").read_text()):
        if scenario["scenario"] in PUSHES:
            faults += await sessions.scenario(scenario)
    assert sessions.compared > 80
    assert not faults, "\n".join(faults)


async def test_settings_of_the_connection(golden: Path, local: LocalRepository, tmp_path: Path) -> None:
    connection = json.loads((golden / "wire/backup.json").read_text())[0]["connections"][0]
    query = {**connection["http1"][0]["query"], "store": "main"}
    async with wire_server(tmp_path / "server", {"main": local}) as server:
        server.right("/datastore/main", "t@pbs", "DatastoreAdmin")
        server.right("/datastore/main", "t@pbs!tok", "DatastoreAdmin")
        stream = await server.connect()
        headers = [("connection", "upgrade"), ("upgrade", "proxmox-backup-protocol-v1")]
        target = f"//api2/json/backup?{query_of(query)}"
        reply = await server.request("GET", target, "t@pbs!tok", headers=headers, stream=stream)
        assert reply.status == 101
        assert {name: reply.headers[name] for name in ("connection", "upgrade")} == connection["http1"][0][
            "response-headers"
        ]
        await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize())
        data = bytearray(reply.rest)
        frames: dict[str, Frame] = {}
        with trio.fail_after(60):
            while not {"SettingsFrame", "WindowUpdateFrame"} <= set(frames):
                data += await stream.receive_some()
                while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3], "big"):
                    frame, length = Frame.parse_frame_header(memoryview(data)[:9])
                    frame.parse_body(memoryview(data[9 : 9 + length]))
                    del data[: 9 + length]
                    frames.setdefault(type(frame).__name__, frame)
        await trio.aclose_forcefully(stream)
    settings, theirs = frames["SettingsFrame"], connection["http2-settings"]["server"]
    assert isinstance(settings, SettingsFrame)
    # What clients may send in one frame: larger ones cost h2 more than they save.
    del theirs["max-frame-size"]
    for name, value in theirs.items():
        assert settings.settings[getattr(SettingsFrame, name.upper().replace("-", "_"))] == value, name
    window = frames["WindowUpdateFrame"]
    assert isinstance(window, WindowUpdateFrame)
    assert window.window_increment == connection["first-connection-window-increment"]["server"]
