"""A server in memory that is as strict as the wire protocol's description, and keeps a log of what it was asked.

It shares no code with Fleece's own server: where both agree with the client, two readers of the description agree.
REST calls come as requests, upgraded connections as streams of `trio.testing`. A connection can be cut before any
frame, and answers can be replaced by lies.
"""

import hashlib
import json
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import trio
import trio.testing
import zstandard
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

from core.dial import DialError
from datastore.s3.wire import Fault, HttpAnswer, HttpError, HttpRequest

CHUNK: Final = 4 << 20
FORM: Final = "application/x-www-form-urlencoded"
RAW: Final = "application/octet-stream"
JSON: Final = "application/json"
_ID: Final = r"[A-Za-z0-9_][A-Za-z0-9._\-]*"
_MAGICS: Final = {
    bytes.fromhex("42ab3807be8370a1"): (12, False, False),
    bytes.fromhex("31b958426fb6a37f"): (12, True, False),
    bytes.fromhex("7b6785be222d4cf0"): (44, False, True),
    bytes.fromhex("e6591bbf0bbfd80b"): (44, True, True),
}
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


@dataclass
class _Index:
    name: str
    size: int | None
    digests: list[bytes]
    ends: list[int]
    reused: bool
    count: int = 0
    tail: bool = False


@dataclass
class _Request:
    headers: dict[str, str]
    body: bytearray = field(default_factory=bytearray)


def plain(raw: bytes) -> bytes:
    """The content of a plain blob."""
    header, packed, encrypted = _MAGICS[bytes(raw[:8])]
    assert not encrypted
    return zstandard.ZstdDecompressor().decompressobj().decompress(raw[header:]) if packed else bytes(raw[header:])


class PbsDouble:
    """The server. `tickets` and `secrets` decide who may come in."""

    def __init__(self, store: str = "store") -> None:
        self.store = store
        self.folders: dict[Key, Folder] = {}
        self.owners: dict[tuple[str, str, str], str] = {}
        self.group_notes: dict[tuple[str, str, str], str] = {}
        self.chunks: dict[bytes, bytes] = {}
        self.namespaces = {""}
        self.secrets = {"root@pam": "geheim", "root@pam!tok": "s3cret+/ %"}
        self.tickets: dict[str, str] = {}
        self.logins = 0
        self.asked: list[Asked] = []
        self.busy: set[tuple[str, str, str]] = set()  #: groups with a backup
        self.tasks: dict[str, list[str]] = {}
        self.running: set[str] = set()
        self.keep_running = False  #: tasks go on until they are stopped
        self.version = ("4.1", "1")
        self.frames = 0  #: of upgraded connections, both directions
        self.cut_at: int | None = None  #: the frame before which every connection ends, once
        self.away = False  #: nobody can connect
        self.lie: Callable[[str, dict[str, Any], bytes], bytes] | None = None
        self.hold_answers: set[str] = set()  #: endpoints that get no answer; the connection ends instead
        self.silent: set[str] = set()  #: endpoints that are not carried out and get no answer; pings do
        self.fell_silent = trio.Event()  #: one of them was asked
        self.refuse_upgrades: tuple[int, str] | None = None  #: status and text for every new connection
        self.on_finish: Callable[[object], None] | None = None  #: called when a snapshot was finished
        self.connections = 0
        self.port = 0  #: of `listen`
        self.client_settings: dict[int, int] = {}  #: of the last upgraded connection

    # --- the two ways in ---------------------------------------------------------------------------------------------

    async def exchange(
        self, request: HttpRequest, *, limit: Callable[[int], int], on_sent: Callable[[], None], fresh: bool = False
    ) -> HttpAnswer:
        """As `HttpPool.exchange`."""
        if self.away:
            raise HttpError(Fault.CONNECT, "Connection refused")
        await trio.lowlevel.checkpoint()
        on_sent()
        headers = {name.lower(): value for name, value in request.headers}
        body = b"".join(bytes(part) for part in request.body)
        status, answer = self.rest(request.method, request.target, headers, body)
        if len(answer) > limit(status):
            raise HttpError(Fault.MALFORMED, "too long")
        return HttpAnswer(status, {}, answer)

    async def connect(self, scheme: str, host: str, port: int) -> trio.abc.Stream:
        """As `Dialer.connect`."""
        if self.away:
            raise DialError("Connection refused")
        ours, theirs = trio.testing.memory_stream_pair()
        self.connections += 1
        self.nursery.start_soon(self._serve, theirs)
        return ours

    nursery: trio.Nursery

    async def listen(self, context: ssl.SSLContext) -> int:
        """Serve on a free port of 127.0.0.1, with TLS, in `nursery`; returns the port."""
        listeners = await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1", https_compatible=True)
        self.nursery.start_soon(trio.serve_listeners, self._serve, listeners)
        port: int = listeners[0].transport_listener.socket.getsockname()[1]  # type: ignore[attr-defined]
        return port

    # --- REST --------------------------------------------------------------------------------------------------------

    def rest(self, method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        parts = urlsplit(target)
        path = unquote(parts.path).removeprefix("/api2/json")
        content = headers.get("content-type", "")
        asked = Asked("rest", method, path, {}, content, len(body))
        self.asked.append(asked)
        try:
            if len(target) > 3072:
                raise RefusedError(414, "")
            query: dict[str, Any] = {}
            for name, value in parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)):
                if name in query:
                    raise RefusedError(400, f"parameter verification failed - '{name}': duplicate parameter.")
                query[name] = value
            if content == JSON:
                if method in ("GET", "DELETE") or query:
                    raise RefusedError(400, "JSON where a query belongs")
                query = json.loads(body)
            elif content not in ("", FORM, RAW):
                raise RefusedError(400, "unsupported content type")
            asked.parameters = query
            user = None if path == "/access/ticket" else self._user(method, headers)
            data = self._rest(method, path, dict(query), user or "", content == JSON, body)
            beside = data.pop("beside") if isinstance(data, dict) and "beside" in data else {}
            asked.status = 200
            return 200, json.dumps({"data": data.get("lines") if beside else data, **beside}).encode()
        except RefusedError as error:
            asked.status = error.status
            return error.status, error.text.encode()

    def _user(self, method: str, headers: dict[str, str]) -> str:
        cookie = headers.get("cookie", "")
        if cookie:
            name, _, value = cookie.partition("=")
            user = self.tickets.get(unquote(value))
            if name not in ("PBSAuthCookie", "__Host-PBSAuthCookie") or user is None:
                raise RefusedError(401, "authentication failed - invalid ticket")
            if method != "GET" and headers.get("csrfpreventiontoken") != f"CSRF:{user}":
                raise RefusedError(401, "authentication failed - invalid csrf token")
            return user
        match = re.fullmatch(r"PBSAPIToken[= ]([^:]+):(.*)", headers.get("authorization", ""))
        if match is None:
            raise RefusedError(401, "authentication failed - no authentication credentials provided.")
        if "!" not in match[1] or self.secrets.get(match[1]) != unquote(match[2]):
            raise RefusedError(401, "authentication failed - invalid token secret")
        return match[1]

    def _rest(self, method: str, path: str, given: dict[str, Any], user: str, typed: bool, body: bytes) -> Any:
        def take(name: str, kind: type = str, default: Any = ...) -> Any:
            if name not in given:
                if default is ...:
                    raise RefusedError(400, f"parameter verification failed - '{name}': property is missing")
                return default
            value = given.pop(name)
            if typed:
                if type(value) is not kind:
                    raise RefusedError(400, f"parameter verification failed - '{name}': wrong type")
                return value
            if kind is bool:
                if value.lower() not in ("1", "on", "yes", "true", "0", "off", "no", "false"):
                    raise RefusedError(400, f"parameter verification failed - '{name}': no boolean")
                return value.lower() in ("1", "on", "yes", "true")
            return kind(value)

        def done() -> None:
            if given:
                raise RefusedError(400, f"schema does not allow additional properties: {sorted(given)}")

        def group() -> tuple[str, str, str]:
            ns, kind, backup_id = take("ns", str, ""), take("backup-type"), take("backup-id")
            assert kind in ("vm", "ct", "host")
            assert re.fullmatch(_ID, backup_id)
            return ns, kind, backup_id

        base = f"/admin/datastore/{self.store}"
        match (method, path.removeprefix(base) if path.startswith(base + "/") else path):
            case "GET", "/version":
                return {"version": self.version[0], "release": self.version[1], "repoid": "x"}
            case "POST", "/access/ticket":
                name, password = take("username"), take("password")
                done()
                if self.secrets.get(name) != password and self.tickets.get(password) != name:
                    raise RefusedError(401, "permission check failed.")
                self.logins += 1
                ticket = f"PBS:{name}:{self.logins:08X}::c2ln/+="
                self.tickets[ticket] = name
                return {"username": name, "ticket": ticket, "CSRFPreventionToken": f"CSRF:{name}"}
            case "GET", "/status":
                done()
                return {"total": 1000, "used": 400, "avail": 600}
            case "GET", "/snapshots":
                ns = take("ns", str, "")
                self._need_namespace(ns)
                kind, backup_id = take("backup-type", str, None), take("backup-id", str, None)
                done()
                return [
                    self._entry(key, folder)
                    for key, folder in self.folders.items()
                    if key[0] == ns and kind in (None, key[1]) and backup_id in (None, key[2])
                ]
            case "GET", "/groups":
                ns = take("ns", str, "")
                done()
                self._need_namespace(ns)
                return [self._group(one) for one in self.owners if one[0] == ns]
            case "DELETE", "/groups":
                one, strict = group(), take("error-on-protected", bool, True)
                done()
                if one not in self.owners:
                    raise RefusedError(400, "ENOENT: No such file or directory")
                return self._remove_groups([one], strict)
            case "DELETE", "/namespace":
                ns, groups, strict = take("ns"), take("delete-groups", bool), take("error-on-protected", bool, True)
                done()
                gone = {other for other in self.namespaces if other == ns or other.startswith(f"{ns}/")}
                held = [one for one in self.owners if one[0] in gone]
                if held and not groups:
                    raise RefusedError(400, "namespace is not empty")
                removed = self._remove_groups(held, strict)
                self.namespaces -= gone - {one[0] for one in self.owners}
                return removed
            case "DELETE", "/snapshots":
                key = (*group(), take("backup-time", int))
                done()
                folder = self._folder(key)
                if folder.protected:
                    raise RefusedError(400, 'failed to delete snapshot - "cannot remove protected snapshot"')
                if folder.locked or folder.readers:
                    raise RefusedError(400, "unable to acquire lock on snapshot - EWOULDBLOCK")
                del self.folders[key]
                if all(other[:3] != key[:3] for other in self.folders):
                    del self.owners[key[:3]]
                return None
            case "GET", "/notes":
                key = (*group(), take("backup-time", int))
                done()
                return self._folder(key).notes
            case "PUT", "/notes":
                key, notes = (*group(), take("backup-time", int)), take("notes")
                done()
                self._folder(key).notes = notes
                return None
            case "PUT", "/protected":
                key, protected = (*group(), take("backup-time", int)), take("protected", bool)
                done()
                self._folder(key).protected = protected
                return None
            case "POST", "/upload-backup-log":
                key = (*group(), take("backup-time", int))
                done()
                if "client.log.blob" in self._folder(key).files:
                    raise RefusedError(400, "backup already contains a log.")
                check_blob(body, len(body))
                self._folder(key).files["client.log.blob"] = body
                return None
            case "GET", "/namespace":
                parent, depth = take("parent", str, ""), take("max-depth", int, 7)
                done()
                level = len(parent.split("/")) if parent else 0
                below = [
                    ns for ns in self.namespaces | {parent}
                    if (not parent or ns == parent or ns.startswith(f"{parent}/"))
                    and (len(ns.split("/")) if ns else 0) <= level + depth
                ]  # fmt: skip
                return [{"ns": ns} for ns in sorted(below)]
            case "POST", "/namespace":
                parent, name = take("parent", str, ""), take("name")
                done()
                self._need_namespace(parent)
                self.namespaces.add(f"{parent}/{name}".lstrip("/"))
                return f"{parent}/{name}".lstrip("/")
            case "POST", "/prune":
                one, last, dry = group(), take("keep-last", int, 0), take("dry-run", bool, False)
                done()
                keys = sorted(key for key in self.folders if key[:3] == one)
                kept = [key for key in keys if not last or key in keys[-last:] or self.folders[key].protected]
                if not dry:
                    self.folders = {
                        key: folder for key, folder in self.folders.items() if key in kept or key not in keys
                    }
                return [
                    {"backup-type": key[1], "backup-id": key[2], "backup-time": key[3], "keep": key in kept,
                     "protected": False} for key in keys
                ]  # fmt: skip
            case "POST", "/verify":
                ns, kind, backup_id = take("ns", str, ""), take("backup-type", str, None), take("backup-id", str, None)
                ctime, ignore = take("backup-time", int, None), take("ignore-verified", bool, True)
                take("max-depth", int, 7)
                done()
                upid = self._task("verify", ["verify store"])
                for key, folder in self.folders.items():
                    if key[0] != ns or any(
                        a not in (None, b) for a, b in zip((kind, backup_id, ctime), key[1:], strict=True)
                    ):
                        continue
                    if ignore and folder.verification is not None and folder.verification["state"] == "ok":
                        continue
                    self.tasks[upid].append(f"verify {self.store}:{key[1]}/{key[2]}/{stamp(key[3])}")
                    if folder.failed:
                        self.tasks[upid].append("chunk aa was not loaded: verify failed")
                    folder.verification = {"upid": upid, "state": "failed" if folder.failed else "ok"}
                failed = any(folder.failed for folder in self.folders.values())
                self.tasks[upid].append("TASK verification failed" if failed else "TASK OK")
                return upid
            case "POST", "/gc":
                done()
                return self._task("garbage_collection", ["starting garbage collection", "TASK OK"])
            case "GET", "/gc":
                done()
                names = ("index-file-count", "index-data-bytes", "disk-bytes", "disk-chunks", "removed-bytes",
                         "removed-chunks", "pending-bytes", "pending-chunks", "removed-bad", "still-bad")  # fmt: skip
                return {"store": self.store, "upid": next(iter(self.tasks), None), **dict.fromkeys(names, 7)}
            case _, other if other.startswith("/nodes/localhost/tasks/"):
                return self._tasks(method, other.removeprefix("/nodes/localhost/tasks/"), take, done)
        raise RefusedError(404, f"Path '{path}' not found.")

    def _tasks(self, method: str, rest: str, take: Callable[..., Any], done: Callable[[], None]) -> Any:
        upid, _, what = rest.partition("/")
        if upid not in self.tasks:
            raise RefusedError(400, "no such task")
        if method == "DELETE":
            self.running.discard(upid)
            self.tasks[upid].append("received abort request")
            return None
        if what == "status":
            ended = {} if upid in self.running else {"exitstatus": self.tasks[upid][-1].removeprefix("TASK ")}
            return {"upid": upid, "status": "running" if upid in self.running else "stopped", **ended}
        start, limit, test = take("start", int, 0), take("limit", int, 50), take("test-status", bool, False)
        done()
        lines = [
            {"n": number, "t": f"2026-01-02T03:04:05+00:00: {text}"}
            for number, text in enumerate(self.tasks[upid], 1)
            if number > start
        ][: limit or None]
        active = {"active": upid in self.running} if test else {}
        return {"lines": lines, "beside": {"total": len(self.tasks[upid]), "success": 1, **active}}

    def _task(self, kind: str, lines: list[str]) -> str:
        upid = f"UPID:pbs:00000001:00000002:{len(self.tasks):08X}:69000000:{kind}:{self.store}:root@pam:"
        self.tasks[upid] = lines
        if self.keep_running:
            self.running.add(upid)
        return upid

    def _remove_groups(self, groups: list[tuple[str, str, str]], strict: bool) -> dict[str, int]:
        keys = [key for key in self.folders if key[:3] in groups]
        kept = [key for key in keys if self.folders[key].protected]
        if kept and strict:
            raise RefusedError(400, "group has protected snapshots")
        if any(self.folders[key].locked or self.folders[key].readers for key in keys):
            raise RefusedError(400, "unable to acquire lock on snapshot - EWOULDBLOCK")
        for key in set(keys) - set(kept):
            del self.folders[key]
        gone = [one for one in groups if all(key[:3] != one for key in kept)]
        for one in gone:
            del self.owners[one]
        return {
            "removed-groups": len(gone),
            "protected-snapshots": len(kept),
            "removed-snapshots": len(keys) - len(kept),
        }

    def _need_namespace(self, ns: str) -> None:
        if ns not in self.namespaces:
            raise RefusedError(400, "ENOENT: No such file or directory")

    def _folder(self, key: Key) -> Folder:
        if key not in self.folders:
            raise RefusedError(400, f"snapshot {key} does not exist!")
        return self.folders[key]

    def _entry(self, key: Key, folder: Folder) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "backup-type": key[1], "backup-id": key[2], "backup-time": key[3],
            "owner": self.owners[key[:3]], "protected": folder.protected,
        }  # fmt: skip
        manifest = folder.manifest
        if manifest is None:
            return {**entry, "files": [{"filename": name} for name in folder.files]}
        files = [{key: file[key] for key in ("filename", "crypt-mode", "size")} for file in manifest["files"]]
        mode = "none" if manifest.get("signature") is None else "sign-only"
        files.append({"filename": "index.json.blob", "crypt-mode": mode, "size": len(folder.files["index.json.blob"])})
        entry |= {"files": files, "size": sum(file["size"] for file in files)}
        verification = folder.verification or manifest["unprotected"].get("verify_state")
        if verification is not None:
            entry["verification"] = verification
        if folder.notes:
            entry["comment"] = folder.notes.split("\n")[0]
        return entry

    def _group(self, group: tuple[str, str, str]) -> dict[str, Any]:
        keys = sorted(key for key in self.folders if key[:3] == group)
        last = self.folders[keys[-1]] if keys else None
        return {
            "backup-type": group[1], "backup-id": group[2], "owner": self.owners[group], "backup-count": len(keys),
            "last-backup": keys[-1][3] if keys else 0, "files": list(last.files) if last else [],
        }  # fmt: skip

    # --- upgraded connections ----------------------------------------------------------------------------------------

    async def _serve(self, stream: trio.abc.Stream) -> None:
        try:
            await self._upgrade(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError, ProtocolError):
            pass
        finally:
            await trio.aclose_forcefully(stream)

    async def _upgrade(self, stream: trio.abc.Stream) -> None:
        engine = h11.Connection(h11.SERVER)
        request, body = h11.Request(method="GET", target="/", headers=[("Host", "x")]), bytearray()
        while True:
            event = engine.next_event()
            if isinstance(event, h11.Request):
                request, body = event, bytearray()
            elif isinstance(event, h11.Data):
                body += event.data
            elif event is h11.NEED_DATA:
                data = await stream.receive_some(65536)
                if not data:
                    return
                engine.receive_data(bytes(data))
            elif isinstance(event, h11.EndOfMessage) or event is h11.PAUSED:
                if urlsplit(request.target.decode()).path in ("/api2/json/backup", "/api2/json/reader"):
                    break
                named = {name.decode().lower(): value.decode() for name, value in request.headers}
                status, answer = self.rest(request.method.decode(), request.target.decode(), named, bytes(body))
                head = h11.Response(status_code=status, headers=[("Content-Length", str(len(answer)))])
                sent = [engine.send(head), engine.send(h11.Data(data=answer)), engine.send(h11.EndOfMessage())]
                await stream.send_all(b"".join(piece or b"" for piece in sent))
                engine.start_next_cycle()
            else:
                return
        headers = {name.decode(): value.decode() for name, value in request.headers}
        parts = urlsplit(request.target.decode())
        protocol = parts.path.removeprefix("/api2/json/")
        query = dict(parse_qsl(parts.query, strict_parsing=True))
        asked = Asked(protocol, "GET", parts.path, dict(query), headers.get("content-type", ""), 0)
        self.asked.append(asked)
        try:
            user = self._user("GET", headers)
            if self.refuse_upgrades is not None:
                raise RefusedError(*self.refuse_upgrades)
            wanted = f"proxmox-backup-{'reader-' if protocol == 'reader' else ''}protocol-v1"
            if protocol not in ("backup", "reader") or headers.get("upgrade") != wanted:
                raise RefusedError(400, f"expected upgrade to {wanted}")
            session = _Session(self, protocol, query, user)
        except RefusedError as error:
            asked.status = error.status
            text = error.text.encode()
            await stream.send_all(
                (
                    engine.send(h11.Response(status_code=error.status, headers=[("Content-Length", str(len(text)))]))
                    or b""
                )
                + (engine.send(h11.Data(data=text)) or b"")
            )
            return
        asked.status = 101
        try:
            http2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
            settings = {
                SettingCodes.INITIAL_WINDOW_SIZE: 32 << 20,
                SettingCodes.MAX_FRAME_SIZE: 4 << 20,
                SettingCodes.MAX_CONCURRENT_STREAMS: 200,
                SettingCodes.MAX_HEADER_LIST_SIZE: 16 << 10,
            }
            http2.local_settings = Settings(client=False, initial_values=settings)
            http2.max_inbound_frame_size = 4 << 20
            http2.initiate_connection()
            http2.increment_flow_control_window((32 << 20) - 65535)
            answer = engine.send(
                h11.InformationalResponse(status_code=101, headers=[("Connection", "upgrade"), ("Upgrade", wanted)])
            )
            # The first frames come in one piece with the answer: they must not be lost.
            await stream.send_all((answer or b"") + http2.data_to_send())
            await _Http2(self, stream, http2, session).run(engine.trailing_data[0])
        finally:
            session.end()


class _Http2:
    """One connection, frame by frame."""

    def __init__(self, double: PbsDouble, stream: trio.abc.Stream, http2: H2Connection, session: "_Session") -> None:
        self.double, self.stream, self.http2, self.session = double, stream, http2, session
        self.requests: dict[int, _Request] = {}
        self.answers: dict[int, memoryview] = {}

    def frame(self) -> None:
        """Count one; cut the connection before the planned one."""
        self.double.frames += 1
        if self.double.cut_at is not None and self.double.frames >= self.double.cut_at:
            self.double.cut_at = None
            raise trio.BrokenResourceError

    async def send(self) -> None:
        data = self.http2.data_to_send()
        while data:
            length = 9 + int.from_bytes(data[:3], "big") if data[:3] != b"PRI" else len(data)
            self.frame()
            await self.stream.send_all(data[:length])
            data = data[length:]

    async def run(self, data: bytes) -> None:
        if not data:
            data = bytes(await self.stream.receive_some(1 << 20))
        pending = b""
        preface = 24
        while True:
            pending += data
            while len(pending) >= preface + 9:
                length = preface + 9 + int.from_bytes(pending[preface : preface + 3], "big")
                if len(pending) < length:
                    break
                self.frame()
                for event in self.http2.receive_data(pending[:length]):
                    if isinstance(event, ConnectionTerminated):
                        return
                    self.handle(event)
                pending, preface = pending[length:], 0
                self.answer()
                await self.send()
            data = bytes(await self.stream.receive_some(1 << 20))
            if not data:
                return

    def handle(self, event: Any) -> None:
        if isinstance(event, RequestReceived):
            self.requests[event.stream_id] = _Request({str(name): str(value) for name, value in event.headers})
        elif isinstance(event, DataReceived):
            self.requests[event.stream_id].body += event.data
            self.http2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, RemoteSettingsChanged):
            self.double.client_settings = {int(code): one.new_value for code, one in event.changed_settings.items()}
        elif isinstance(event, StreamReset):
            self.requests.pop(event.stream_id, None)
            self.answers.pop(event.stream_id, None)
        elif isinstance(event, StreamEnded):
            request = self.requests.pop(event.stream_id)
            if urlsplit(request.headers[":path"]).path.strip("/") in self.double.silent:
                self.double.fell_silent.set()
                return
            status, body, kind = self.session.request(request)
            headers = [(":status", str(status)), ("content-type", kind)]
            self.http2.send_headers(event.stream_id, headers, end_stream=not body)
            if body:
                self.answers[event.stream_id] = memoryview(body)

    def answer(self) -> None:
        for number in list(self.answers):
            while (rest := self.answers.get(number)) is not None:
                size = min(len(rest), self.http2.local_flow_control_window(number), self.http2.max_outbound_frame_size)
                if size <= 0:
                    break
                self.http2.send_data(number, bytes(rest[:size]), end_stream=size == len(rest))
                if size == len(rest):
                    del self.answers[number]
                else:
                    self.answers[number] = rest[size:]


class _Session:
    """A backup or a reader session: sections 8 and 9."""

    def __init__(self, double: PbsDouble, protocol: str, query: dict[str, str], user: str) -> None:
        self.double, self.protocol = double, protocol
        ns, kind, backup_id, ctime = (
            query.pop("ns", ""),
            *(query.pop(f"backup-{name}") for name in ("type", "id", "time")),
        )
        if query.pop("store") != double.store:
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
        if ns not in double.namespaces:
            raise RefusedError(404 if protocol == "backup" else 400, "namespace not found")
        if protocol == "reader":
            if self.key not in double.folders:
                raise RefusedError(400, f"snapshot {self.key} does not exist.")
            if double.folders[self.key].locked:
                raise RefusedError(400, "unable to acquire lock on snapshot - EWOULDBLOCK")
            double.folders[self.key].readers += 1
            return
        if self.group in double.busy:
            raise RefusedError(400, "while creating locked backup group: unable to acquire lock")
        owner = double.owners.setdefault(self.group, user)
        if owner != user and not owner.startswith(f"{user}!"):
            raise RefusedError(400, f"backup owner check failed ({user} != {owner})")
        finished = [key for key, one in double.folders.items() if key[:3] == self.group and one.manifest]
        self.previous = max(finished, default=None)
        if self.previous is not None and double.folders[self.previous].failed:
            self.previous = None
        if self.previous is not None and self.previous[3] >= self.key[3]:
            raise RefusedError(400, "backup timestamp is older than last backup.")
        if self.key in double.folders:
            raise RefusedError(400, "backup directory already exists.")
        double.busy.add(self.group)
        double.folders[self.key] = Folder(locked=True)

    def end(self) -> None:
        if self.protocol == "reader":
            self.double.folders[self.key].readers -= 1
        elif not self.finished:
            del self.double.folders[self.key]
            self.double.busy.discard(self.group)

    def request(self, request: _Request) -> tuple[int, bytes, str]:
        method, target = request.headers[":method"], request.headers[":path"]
        parts = urlsplit(target)
        name = parts.path.removeprefix("/")
        content = request.headers.get("content-type", "")
        asked = Asked(self.protocol, method, parts.path, {}, content, len(request.body))
        self.double.asked.append(asked)
        try:
            if name in self.double.hold_answers:
                self.double.hold_answers.discard(name)
                self._call(method, name, parts.query, content, bytes(request.body), asked)
                raise trio.BrokenResourceError
            result = self._call(method, name, parts.query, content, bytes(request.body), asked)
        except RefusedError as error:
            asked.status = error.status
            return error.status, error.text.encode(), "application/json;charset=UTF-8"
        asked.status = 200
        raw = isinstance(result, bytes)
        body = result if raw else json.dumps({"data": result}).encode()
        if self.double.lie is not None:
            body = self.double.lie(name, asked.parameters, body)
        return 200, body, RAW if raw else "application/json;charset=UTF-8"

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
        return self.double.folders[self.key]

    def _get_previous_backup_time(self) -> int | None:
        return None if self.previous is None else self.previous[3]

    def _get_previous(self, archive_name: str) -> bytes:
        raw = None if self.previous is None else self.double.folders[self.previous].files.get(archive_name)
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
        if not archive_name.endswith(".fidx" if fixed else ".didx") or re.fullmatch(_ID, archive_name) is None:
            raise RefusedError(400, f"wrong archive extension: '{archive_name}'")
        if archive_name in self.folder.files or any(one.name == archive_name for one in self.indexes.values()):
            raise RefusedError(400, "opened twice")
        digests = [bytes(32)] * -(-(size or 0) // CHUNK)
        if reuse_csum is not None:
            raw = None if self.previous is None else self.double.folders[self.previous].files.get(archive_name)
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
        self.stats["duplicates"] += name in self.double.chunks
        self.double.chunks.setdefault(name, body)
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
        if not file_name.endswith(".blob") or re.fullmatch(_ID, file_name) is None or self.over:
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
        self.double.busy.discard(self.group)
        if self.double.on_finish is not None:
            self.double.on_finish(self.key)

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
        if name not in self.double.chunks:
            raise RefusedError(400, "No such file or directory (os error 2)")
        return self.double.chunks[name]


def stamp(ctime: int) -> str:
    """A backup time in the name of a snapshot."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ctime))


def make_blob(data: bytes) -> bytes:
    """A plain, uncompressed blob."""
    import zlib

    return bytes.fromhex("42ab3807be8370a1") + zlib.crc32(data).to_bytes(4, "little") + data


def check_blob(body: bytes, encoded_size: int, *, crc: bool = True) -> bool:
    """Refuse what is no blob; True if it is encrypted."""
    import zlib

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
