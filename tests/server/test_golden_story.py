"""One long probe of a real PBS, asked of ours in its order: what each session left is what the next one found.

Sessions that nothing depends on are those of `test_golden_checks.py`. What Fleece decides otherwise is named here.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import trio

from datastore.blob import Blob, BlobKind
from datastore.manifest import Manifest, ManifestFile
from datastore.names import Group
from repository.local import LocalRepository
from tests.server.test_golden_checks import rebuilt
from tests.support.direct_server import Direct, Got, Session
from tests.support.snapshots import CODEC, write_snapshot

FIRST = 1_767_225_600
OWNER, SIBLING, STRANGER = "t@pbs!tok", "t@pbs!tok2", "u2@pbs!tok"
#: The first session that leaves something.
START = 5
#: A chunk whose content nobody knows any more, its index, and what stands for them here.
UNKNOWN_CHUNK = "7176018b17181f9dc25944a25072be5603ac6dea5f87ba8cd419fcd49d0651f5"
UNKNOWN_CSUM = "acf40e41cf7a369c046ad9ec0da0f34398fa931b69936a4d9c61d3906a6a3b56"
CHUNK = bytes(63)
CHUNK_DIGEST = hashlib.sha256(CHUNK).hexdigest()
#: Sessions that stay open until another entry is over, and their requests before that.
HELD = {5: (12, 14), 61: (99, 66), 67: (99, 70), 68: (99, 70)}
#: Notes need a manifest, which appears with `finish` only; a finished snapshot gets no further file.
NOTES_TOO_EARLY, LATE = 10, "x.blob"
#: Longer than a request may be: the connection's business, see `test_server.py`.
TOO_LONG = "<20000 characters>"
#: The session in which PBS lets two writers share a name, which Fleece refuses.
TWO_WRITERS = 46
#: Texts with debug forms, calls or paths of PBS's own code.
OWN_TEXTS = ("while ", "Unable to open", "open file", "failed to delete snapshot")


def entries(golden: Path) -> list[dict[str, Any]]:
    csum = hashlib.sha256(len(CHUNK).to_bytes(8, "little") + bytes.fromhex(CHUNK_DIGEST)).hexdigest()
    text = (golden / "wire/checks.json").read_text()
    text = text.replace(f".chunks/{UNKNOWN_CHUNK[:4]}/", f".chunks/{CHUNK_DIGEST[:4]}/")
    text = text.replace(":wire\\\\x3a", ":main\\\\x3a").replace(UNKNOWN_CHUNK, CHUNK_DIGEST).replace(UNKNOWN_CSUM, csum)
    text = text.replace("/datastore/wire/", "/datastore/main/").replace('"wire"', '"main"').replace('"wire:', '"main:')
    return list(json.loads(text))


class Story:
    """Asks, compares, and keeps what differs."""

    def __init__(self, direct: Direct, repo: LocalRepository) -> None:
        self._direct, self._repo = direct, repo
        self._who: dict[str, Mapping[str, str]] = {one: direct.token(one) for one in (OWNER, SIBLING, STRANGER)}
        self._who["t@pbs (ticket)"] = direct.ticket("t@pbs")
        wrong = {"authorization": f"{self._who[OWNER]['authorization']}x"}
        self._who["t@pbs!tok (wrong secret)"] = wrong
        for who, role in ((OWNER, "DatastoreAdmin"), (SIBLING, "DatastoreAdmin"), (STRANGER, "DatastorePowerUser")):
            for one in (who, who.partition("!")[0]):
                direct.right("/datastore/main", one, role)
        self._upid = ""
        self.faults: list[str] = []
        self.compared = 0

    async def tell(self, number: int, entry: dict[str, Any], open_ones: AsyncExitStack) -> "Session | None":
        """One entry; a session is opened on `open_ones`."""
        if "rest" in entry:
            self._compare(f"{number} {entry['rest']} {entry['path']}", await self._rest(entry), entry, number)
            return None
        who = self._who.get(entry["user"], {})
        if entry["status"] != 101:
            got = await self._direct.refused(entry["upgrade"], who, entry["query"], protocol=entry.get("protocol"))
            expected = {**entry, "response": {"text": entry["text"]}}
            self._compare(f"{number} {entry['upgrade']}", got, expected, number)
            return None
        opened = self._direct.session(entry["upgrade"], who, entry["query"])
        return await open_ones.enter_async_context(opened)

    async def _rest(self, entry: dict[str, Any]) -> Got:
        path = entry["path"]
        if "UPID" in path:
            path = f"/nodes/localhost/tasks/{quote(self._upid, safe='')}/{path.rpartition('/')[2]}"
            task = self._direct.state.tasks.get(self._upid)
            if task is not None:
                with trio.fail_after(60):
                    await task.over.wait()
        got = await self._direct.call(
            entry["rest"], path, None, query=entry.get("query") or "", json_body=entry.get("json"),
            headers=self._who[OWNER],
        )  # fmt: skip
        if entry["path"].endswith("/verify"):
            self._upid = got.data
        return got

    async def ask(self, number: int, entry: dict[str, Any], session: Session, first: int, last: int) -> None:
        """Requests of a session."""
        files: list[ManifestFile] = []
        for request in entry["requests"]:
            if isinstance(request, dict) and request["path"].endswith("_close") and request["status"] == 200:
                files.append(self._closed(entry, request))
        for request in entry["requests"][first:last]:
            query = dict(request.get("query") or {}) if isinstance(request, dict) else {}
            if not isinstance(request, dict) or query.get("_dc") == TOO_LONG:
                continue
            if isinstance(query.get("_dc"), str):
                query["_dc"] = "x" * int(query["_dc"][1:].split()[0])
            document, kind = request.get("json"), request.get("content-type")
            body = self._body(entry, request, files)
            if isinstance(document, str):  # "<435534 bytes>"
                document, kind = None, "application/json"
            if request["path"] in ("/blob", "/fixed_chunk", "/dynamic_chunk"):
                query["encoded-size"] = len(body)
            got = await session.call(
                request["method"], request["path"], query, json_body=document, body=body, content_type=kind
            )
            where = f"{number} {request['method']} {request['path']} {query or document}"[:200]
            if number == TWO_WRITERS and got.status == 400 and (query.get("wid") == 2 or "one already" in got.text):
                continue
            late = query.get("file-name", query.get("archive-name")) == LATE
            self._compare(where, got, {**request, "status": (400 if body else 404)} if late else request, number)

    def _closed(self, entry: dict[str, Any], request: dict[str, Any]) -> ManifestFile:
        wid, what = request["query"]["wid"], request["path"].replace("_close", "_index")
        opened = [
            one["query"]["archive-name"] for one in entry["requests"]
            if isinstance(one, dict) and one["path"] == what and one.get("response") == {"json": {"data": wid}}
        ]  # fmt: skip
        csum = bytes.fromhex(request["query"]["csum"])
        return ManifestFile(opened[0], CODEC.mode, request["query"]["size"], csum)

    def _body(self, entry: dict[str, Any], request: dict[str, Any], files: list[ManifestFile]) -> bytes:
        query, said = request.get("query") or {}, request.get("body")
        if isinstance(request.get("json"), str):
            size = int(request["json"][1:].split()[0])
            digests = ["a" * 64] * (size // 80)
            return (
                json.dumps({"wid": 9, "digest-list": digests, "offset-list": [0] * len(digests)}).encode().ljust(size)
            )
        if said is None:
            return b""
        if query.get("file-name") == "index.json.blob":
            if said["length"] < 100:
                return bytes(Blob.make(BlobKind.PLAIN, b"no JSON!"))
            manifest = Manifest.new(
                Group.parse(f"host/{entry['query']['backup-id']}").at(entry["query"]["backup-time"])
            )
            for file in files:
                manifest.add(file)
            return bytes(manifest.encode(CODEC))
        if query.get("digest") == CHUNK_DIGEST:
            return bytes(Blob.make(BlobKind.PLAIN, CHUNK))
        if said["first-bytes"].startswith("7b6785be222d4cf0"):
            return bytes(Blob.make(BlobKind.ENCRYPTED, bytes(said["length"] - 44), iv=bytes(16), tag=bytes(16)))
        if said["first-bytes"].startswith(b'{"wid":9,"di'.hex()):
            return b'{"wid":9,"digest-list":[],"offset-list":[]'.ljust(said["length"] - 1) + b"}"
        if "file-name" in query:
            return bytes(Blob.make(BlobKind.PLAIN, bytes(said["length"] - 12)))
        return rebuilt(request) or bytes(said["length"])

    def _compare(self, where: str, got: Got, wanted: dict[str, Any], number: int) -> None:
        self.compared += 1
        if number == NOTES_TOO_EARLY:
            wanted = {"status": 400}
        expected = wanted.get("response") or {}
        if got.status != wanted["status"]:
            self.faults.append(f"{where}: {got.status} instead of {wanted['status']}: {got.text[:300]}")
        elif "json" in expected and got.status == 200:
            ours, theirs = (self._bare(one, number) for one in (json.loads(got.body), expected["json"]))
            if ours != theirs:
                self.faults.append(f"{where}: {ours} instead of {theirs}")
        elif "text" in expected and not expected["text"].startswith(OWN_TEXTS):
            text = got.text.replace(str(self._repo.store.base), "/datastore/main")
            if text != expected["text"] and number != NOTES_TOO_EARLY:
                self.faults.append(f"{where}: {text!r} instead of {expected['text']!r}")

    def _bare(self, document: Any, number: int) -> Any:
        """A document without what depends on the manifest's bytes, the task, and others' groups."""
        data = document["data"]
        if isinstance(data, str) and data.startswith("UPID:"):
            return data.split(":")[6:]
        if isinstance(data, dict) and "exitstatus" in data:
            return {key: data[key] for key in ("exitstatus", "id", "status", "tokenid", "type", "user")}
        if not isinstance(data, list) or (data and not isinstance(data[0], dict)):
            return document
        kept = [one for one in data if one.get("backup-id", "c1") in ("c1", "c2") and "n" not in one]
        return [self._bare_entry(one, number) for one in kept]

    def _bare_entry(self, one: dict[str, Any], number: int) -> dict[str, Any]:
        entry = dict(one)
        if isinstance(entry.get("verification"), dict):
            entry["verification"] = entry["verification"]["state"]
        files = [file for file in entry.pop("files", ()) if file not in (LATE, {"filename": LATE})]
        listed = [file for file in files if isinstance(file, dict) and file["filename"] != "index.json.blob"]
        if number < 15:  # in progress until `finish`, which is told by the size that is missing
            entry.pop("size", None)
            return entry | {"names": sorted(file["filename"] for file in listed)}
        if "size" in entry:
            entry["size"] = sum(file["size"] for file in listed)
        names = sorted(file["filename"] if isinstance(file, dict) else file for file in files)
        return entry | {"listed": sorted(listed, key=lambda file: str(file["filename"])), "names": names}


async def test_what_sessions_leave_and_find(
    golden: Path, direct: Direct, local: LocalRepository, no_delays: None
) -> None:
    story = Story(direct, local)
    await write_snapshot(local, Group.parse("host/enc"), FIRST, {"x.blob": b"x"})
    await local.set_owner(Group.parse("host/enc"), "t@pbs")
    chunk = local.store.base / ".chunks" / CHUNK_DIGEST[:4] / CHUNK_DIGEST
    everything = list(enumerate(entries(golden)))[START:]
    held: list[tuple[int, int, AsyncExitStack, Session]] = []
    async with AsyncExitStack() as whole:
        for number, entry in everything:
            stack = await whole.enter_async_context(AsyncExitStack())
            session = await story.tell(number, entry, stack)
            if session is not None:
                first, until = HELD.get(number, (10_000, 0))
                await story.ask(number, entry, session, 0, first)
                if until:
                    held.append((number, until, stack, session))
                else:
                    await stack.aclose()
            for one in [one for one in reversed(held) if one[1] == number]:
                held.remove(one)
                await story.ask(one[0], dict(everything)[one[0]], one[3], HELD[one[0]][0], 10_000)
                await one[2].aclose()
                if one[0] == START:
                    await local.set_notes(Group.parse("host/c1").at(FIRST), "n1")
            if number == 71:
                chunk.unlink()
    assert story.compared > 110
    assert not story.faults, "\n".join(story.faults)
