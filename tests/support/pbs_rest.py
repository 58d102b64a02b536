"""The REST calls of the double of a PBS server."""

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.support.pbs_store import (
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
    stamp,
)


class PbsRest(PbsStore):
    """A store that answers REST calls."""

    def __init__(self, store: str = "store") -> None:
        super().__init__(store)
        self.logins = 0
        self.tasks: dict[str, list[str]] = {}
        self.running: set[str] = set()
        self.keep_running = False  #: tasks go on until they are stopped
        self.version = ("4.1", "1")

    def rest(self, method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to a request."""
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
            user = None if path == "/access/ticket" else self.user_of(method, headers)
            data = self._rest(method, path, dict(query), user or "", content == JSON, body)
            beside = data.pop("beside") if isinstance(data, dict) and "beside" in data else {}
            asked.status = 200
            return 200, json.dumps({"data": data.get("lines") if beside else data, **beside}).encode()
        except RefusedError as error:
            asked.status = error.status
            return error.status, error.text.encode()

    def user_of(self, method: str, headers: dict[str, str]) -> str:
        """Who asks, by ticket or token."""
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
            assert re.fullmatch(SAFE_ID, backup_id)
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
