"""The datastore and the users of the transcript `wire/rest.json`, and its requests asked of our server."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest

import pxar.create
from agent.file_archives import ChangeDetection, FileArchiveOptions, add_file_archives
from agent.specifications import parse_specifications
from datastore.blob import Blob, BlobKind
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.manifest import Manifest, ManifestFile
from datastore.names import Group
from pxar.patterns import parse_exclude_file
from repository.backup import SnapshotWriter
from repository.local import LocalRepository
from server.access.acl import AclEntry
from server.access.auth_ids import AuthId
from server.access.tickets import Tickets
from server.state import ServerState
from tests.pxar.backups import ext4, run_script
from tests.support.direct_server import Direct, Got
from tests.support.wire_server import WireServer

FIRST: Final = 1_767_225_600
SECOND: Final = FIRST + 86_400
OWNER: Final = "t@pbs!tok"
PASSWORD: Final = "long enough"
CHUNK: Final = 4 << 20
CONFIG: Final = b"name: gold\nmemory: 512\nscsi0: local:vm-100-disk-0,size=40M\n"
LOG: Final = bytes(Blob.make(BlobKind.PLAIN, b"a log of thirty-six bytes for PBS..."))
_STORES: Final = ("wirerest", "wire", "wiretgt")
#: Values that differ from run to run, or between two machines.
_VARYING: Final = frozenset({
    "avail", "total", "used", "upid", "node", "pid", "pstart", "starttime", "endtime", "digest", "ticket",
    "CSRFPreventionToken", "ticket-info", "value", "disk-bytes", "disk-chunks", "index-data-bytes",
    "index-file-count", "hits", "misses", "repoid", "last-run-upid", "last-run-endtime", "last-run-state", "t", "path",
    "fingerprint", "port",
})  # fmt: skip
_UPID: Final = re.compile(r"UPID:[^:]+:[0-9A-F]{8}:[0-9A-F]{8,9}:[0-9A-F]{8}:[0-9A-F]{8}:(.*)")
_NAMED_BY: Final = (
    "filename",
    "filepath",
    "ns",
    "store",
    "ugid",
    "roleid",
    "userid",
    "tokenid",
    "subdir",
    "name",
    "id",
)


# The datastore.


async def fill(repo: LocalRepository, golden: Path, folder: Path) -> None:
    """Make the snapshots: two of a VM, a tree in two modes, an encrypted and a signed image; needs root and ext4."""
    images = folder / "images"
    run_script(golden / "make_disk.py", images)
    first = {name: (images / f"{name}.img").read_bytes() for name in ("drive-scsi0", "drive-scsi1")}
    for ctime in (FIRST, SECOND):
        await _images(repo, Group.parse("vm/100").at(ctime), first, ChunkCodec(), CONFIG)
    key = CryptKey(bytes(range(32)))
    data = {"data": first["drive-scsi1"]}
    for group, mode in (("host/enc", CryptMode.ENCRYPT), ("host/signed", CryptMode.SIGN_ONLY)):
        await _images(repo, Group.parse(group).at(FIRST), data, ChunkCodec(key, mode), None)
    with ext4(folder, 64 << 20) as mounted, _excludes_as_pbs():
        tree = mounted / "tree"
        run_script(golden / "make_tree.py", tree, "--small", "--seed", "small-fleece")
        modes: list[tuple[str, ChangeDetection]] = [("host/tree", "legacy"), ("host/split", "metadata")]
        for group, detection in modes:
            async with repo.backup(Group.parse(group).at(FIRST), owner=OWNER) as session:
                writer = SnapshotWriter(session, ChunkCodec())
                wanted = parse_specifications([f"root.pxar:{tree}"])
                await add_file_archives(writer, repo, wanted, FileArchiveOptions(detection))
                await writer.finish()


async def _images(repo: LocalRepository, snapshot: Any, images: dict[str, bytes], codec: ChunkCodec,
                  config: bytes | None) -> None:  # fmt: skip
    async with repo.backup(snapshot, owner=OWNER) as session:
        manifest = Manifest.new(snapshot)
        for stem, data in images.items():
            name = f"{stem}.img.fidx"
            writer = await session.open_index(name, size=len(data))
            pieces = [data[offset : offset + CHUNK] for offset in range(0, len(data), CHUNK)]
            digests = codec.digest_many(pieces)
            for piece, digest in zip(pieces, digests, strict=True):
                if not session.knows(digest):
                    await session.put_chunk(writer, digest, len(piece), codec.encode(piece))
            await session.append(writer, [(number * CHUNK, digest) for number, digest in enumerate(digests)])
            csum = hashlib.sha256(b"".join(digests)).digest()
            await session.close_index(writer, len(digests), len(data), csum)
            manifest.add(ManifestFile(name, codec.mode, len(data), csum))
        if config is not None:
            blob = codec.encode_blob(config)
            await session.put_blob("qemu-server.conf.blob", blob)
            csum = hashlib.sha256(bytes(blob)).digest()
            manifest.add(ManifestFile("qemu-server.conf.blob", CryptMode.NONE, len(blob), csum))
        await session.put_blob("index.json.blob", manifest.encode(codec))
        await session.finish()


@contextmanager
def _excludes_as_pbs() -> Iterator[None]:
    """Anchored patterns below the root match nothing, which is an error of PBS."""

    def parsed(data: bytes, folder: bytes) -> Any:
        return parse_exclude_file(data, folder if folder == b"/" else b"/nowhere")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pxar.create, "parse_exclude_file", parsed)
        yield


class People:
    """The users of the transcript, and how they show who they are."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self.secrets: dict[str, str] = {}
        for user in ("t@pbs", "u2@pbs", "u3@pbs", "adm@pbs"):
            state.access.add_user(AuthId(user), password=PASSWORD)
        for token in ("t@pbs!tok", "t@pbs!tok2", "u2@pbs!tok", "adm@pbs!tok"):
            self.secrets[token] = state.access.add_token(AuthId.parse(token))
        for who in ("t@pbs", "t@pbs!tok", "t@pbs!tok2"):
            for store in _STORES:
                self.right(f"/datastore/{store}", who, "DatastoreAdmin")
        for who in ("u2@pbs", "u2@pbs!tok"):
            for store in ("wirerest", "wire"):
                self.right(f"/datastore/{store}", who, "DatastorePowerUser")
        for who in ("adm@pbs", "adm@pbs!tok"):
            self.right("/", who, "Admin")

    def right(self, path: str, who: str, role: str) -> None:
        self._state.access.set_right(AclEntry(path, who, role))

    def add_sync_user(self) -> None:
        """The one that pushes arrive as."""
        self._state.access.add_user(AuthId("sync@pbs"))
        self.secrets["sync@pbs!tok"] = self._state.access.add_token(AuthId.parse("sync@pbs!tok"))
        for who in ("sync@pbs", "sync@pbs!tok"):
            self.right("/datastore/wiretgt", who, "DatastoreAdmin")

    @property
    def _tickets(self) -> Tickets:
        return self._state.tickets

    def headers(self, request: dict[str, Any]) -> dict[str, str]:
        """How the request says who it is from."""
        if "credentials" in request:
            return self._by_hand(request["credentials"])
        user = request["user"]
        if user == "none":
            return {}
        if user.endswith(" (ticket)"):
            return self._cookie(user.removesuffix(" (ticket)"))
        return {"authorization": f"PBSAPIToken={user}:{self.secrets[user]}"}

    def _cookie(self, user: str) -> dict[str, str]:
        ticket = quote(self._tickets.ticket(user), safe="")
        return {"cookie": f"PBSAuthCookie={ticket}", "csrfpreventiontoken": self._tickets.csrf_token(user)}

    def _by_hand(self, text: str) -> dict[str, str]:
        ticket, secret = self._tickets.ticket("t@pbs"), self.secrets["t@pbs!tok"]
        if text == "Cookie and CSRFPreventionToken":
            return self._cookie("t@pbs")
        for said, meant in (
            ("<percent-encoded ticket>", quote(ticket, safe="")),
            ("<ticket, not encoded>", ticket),
            ("<ticket>", quote(ticket, safe="")),
            ("<csrf>", self._tickets.csrf_token("t@pbs")),
            ("<secret, every character as %xx>", "".join(f"%{ord(char):02x}" for char in secret)),
            ("<secret>", secret),
        ):
            text = text.replace(said, meant)
        found = {}
        for part in text.split("; "):
            name, _, value = part.partition(": ")
            found[name.lower()] = value
        return found


# The requests.


class Replay:
    """Asks what the transcript asked; UPIDs in it stand for those that our server gave."""

    def __init__(self, direct: Direct, people: People, server: WireServer) -> None:
        self._direct, self._people, self._server = direct, people, server
        self.upids: dict[str, str] = {}

    def add_sync_user(self) -> None:
        """Make the user that pushes arrive as."""
        self._people.add_sync_user()

    async def ask(self, entry: dict[str, Any]) -> Got:
        """One request; the remote in it is our server itself."""
        request = entry["request"]
        path = str(request["path"]).removeprefix("/api2/json")
        path, _, query = path.partition("?")
        for theirs, ours in self.upids.items():
            path = path.replace(quote(theirs, safe=""), quote(ours, safe=""))
        headers = self._people.headers(request)
        if "content-type" in request:
            headers["content-type"] = request["content-type"]
        document = request.get("json")
        if isinstance(document, dict):
            own = {"port": self._server.port, "fingerprint": self._server.certificate.fingerprint}
            document = {key: own.get(key, value) for key, value in document.items()}
            if document.get("password") == "<secret>":
                document["password"] = self._password(entry["what"])
        return await self._direct.call(
            request["method"], path, None, query=request.get("query") or query, json_body=document,
            body=self._body(request.get("body"), entry["what"]), headers=headers,
        )  # fmt: skip

    def _password(self, what: str) -> str:
        if what.startswith("remote"):
            return self._people.secrets.get("sync@pbs!tok", "none")
        if what == "renew":
            return self._direct.state.tickets.ticket("t@pbs")
        return "wrong" if "wrong" in what else PASSWORD

    def _body(self, body: Any, what: str) -> bytes:
        if isinstance(body, str):
            return body.replace("<password>", quote(PASSWORD)).encode()
        if body is None:
            return b""
        match what:
            case "log bad crc":
                return LOG[:8] + bytes([LOG[8] ^ 1]) + LOG[9:]
            case "log not a blob":
                return b"x" * int(body["length"])
            case _:
                return LOG if body["length"] == len(LOG) else bytes(Blob.make(BlobKind.PLAIN, b"x"))


def differences(got: object, wanted: object, where: str = "") -> Iterator[str]:
    """Where two documents differ in shape or in values that do not vary."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        if set(got) != set(wanted):
            yield f"{where}: has {sorted(set(got) - set(wanted))}, lacks {sorted(set(wanted) - set(got))}"
        for key in set(got) & set(wanted):
            if not _varies(key, wanted):
                yield from differences(got[key], wanted[key], f"{where}.{key}")
            elif type(got[key]) is not type(wanted[key]):
                yield f"{where}.{key}: {got[key]!r} is of another type than {wanted[key]!r}"
    elif isinstance(wanted, list) and isinstance(got, list):
        ours, theirs = sorted(got, key=_identity), sorted(wanted, key=_identity)
        if [_identity(one) for one in ours] != [_identity(one) for one in theirs]:
            yield f"{where}: {[_identity(one) for one in ours]} instead of {[_identity(one) for one in theirs]}"
        else:
            for one, other in zip(ours, theirs, strict=True):
                yield from differences(one, other, f"{where}[{_identity(one)}]")
    elif isinstance(wanted, str) and isinstance(got, str) and (match := _UPID.fullmatch(wanted)):
        if (own := _UPID.fullmatch(got)) is None or own[1] != match[1]:
            yield f"{where}: {got} instead of {wanted}"
    elif type(got) is not type(wanted) or got != wanted:
        yield f"{where}: {got!r} instead of {wanted!r}"


def _identity(one: object) -> str:
    if not isinstance(one, dict):
        return json.dumps(one)
    for name in _NAMED_BY:
        if name in one:
            return str(one[name])
    return json.dumps([one.get(name) for name in ("backup-type", "backup-id", "backup-time", "path", "ugid", "n")])


def _varies(key: str, within: dict[str, Any]) -> bool:
    # What zstd makes of a manifest; and descriptions of roles are ours.
    sizes = within.get("filename") == "index.json.blob" or "backup-time" in within
    return key in _VARYING or (key == "size" and sizes) or (key == "comment" and "roleid" in within)
