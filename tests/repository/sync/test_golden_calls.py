"""All pushes and pulls that a real server made, made by ours: what is asked, with which values, in which order.

The source has what theirs had, as far as names, times, modes and verify states go; and the target too, which is told of
what others did to it between two runs.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.errors import SnapshotNotFoundError
from datastore.filters import GroupFilter
from datastore.manifest import Manifest, ManifestFile
from datastore.names import Group, Namespace
from repository.interface import BackupSession
from repository.local import LocalRepository
from tests.repository.sync.conftest import Pair
from tests.support.pbs_double import PbsDouble
from tests.support.pbs_store import Folder, make_blob
from tests.support.remote import remote
from tests.support.snapshots import CODEC
from tests.support.syncs import pull, push

FIRST, SECOND = 1_767_225_600, 1_767_312_000
SYNC = "root@pam!tok"  #: as whom pushes arrive at the double
CHUNK = 4 << 20
DISKS = ("drive-scsi0.img.fidx", "drive-scsi1.img.fidx", "qemu-server.conf.blob")
SPLIT, TREE = ("root.ppxar.didx", "root.mpxar.didx"), ("root.pxar.didx", "catalog.pcat1.didx")
VERIFIED = {"verify_state": {"state": "ok", "upid": "UPID:vm:00002E34:00014943:00000147:6B00FA23:verify:x:t@pbs!tok:"}}
#: Asked by every session of ours, and by no push of PBS.
OURS = "GET previous_backup_time"
#: What says nothing of what is wanted: sizes and digests of other data, the store, and what every upgrade carries.
NOT_COMPARED = {"store", "benchmark", "debug", "size", "encoded-size", "csum", "chunk-count", "wid", "digest",
                "digest-list", "offset-list"}  # fmt: skip


async def snapshot(
    repo: LocalRepository, group: str, ctime: int, names: Sequence[str], *, codec: ChunkCodec = CODEC,
    unprotected: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """One snapshot with such files, and in each of them its name."""
    one = Group.parse(group.rpartition(":")[2], Namespace.parse(group.rpartition(":")[0])).at(ctime)
    manifest = Manifest.new(one)
    async with repo.backup(one) as session:
        for name in names:
            data = f"{group} {name}".encode()
            if name.endswith(".blob"):
                blob = codec.encode_blob(data)
                await session.put_blob(name, blob)
                manifest.add(ManifestFile(name, codec.mode, len(blob), hashlib.sha256(bytes(blob)).digest()))
            else:
                manifest.add(await archive(session, name, data, codec))
        raw = manifest.with_unprotected(dict(unprotected or {})) if unprotected else manifest
        await session.put_blob("index.json.blob", raw.encode(codec))
        await session.finish()


async def archive(session: BackupSession, name: str, data: bytes, codec: ChunkCodec) -> ManifestFile:
    """An index with one chunk."""
    fixed, digest = name.endswith(".fidx"), codec.digest(data)
    if fixed:
        writer = await session.open_index(name, size=len(data), chunk_size=CHUNK)
    else:
        writer = await session.open_index(name)
    if not session.knows(digest):
        await session.put_chunk(writer, digest, len(data), codec.encode(data))
    await session.append(writer, [(0, digest)])
    csum = hashlib.sha256(digest if fixed else len(data).to_bytes(8, "little") + digest).digest()
    await session.close_index(writer, 1, len(data), csum)
    return ManifestFile(name, codec.mode, len(data), csum)


@pytest.fixture
async def source(pair: Pair) -> LocalRepository:
    """What was pushed first: two snapshots of a machine, the first with notes and a log."""
    repo = pair.source
    await snapshot(repo, "vm/100", FIRST, DISKS, unprotected={**VERIFIED, "notes": "line one"})
    await snapshot(repo, "vm/100", SECOND, DISKS, unprotected=VERIFIED)
    await repo.upload_log(Group.parse("vm/100").at(FIRST), CODEC.encode_blob(b"log"))
    return repo


async def everything(repo: LocalRepository) -> None:
    """And what was added for the next pushes."""
    key = ChunkCodec(CryptKey(bytes(range(32))), CryptMode.ENCRYPT)
    await snapshot(repo, "host/enc", FIRST, ("data.img.fidx",), codec=key, unprotected=VERIFIED)
    await snapshot(repo, "host/split", FIRST, SPLIT, unprotected=VERIFIED)
    await snapshot(repo, "host/tree", FIRST, TREE, unprotected=VERIFIED)
    for name in ("a", "a/b"):
        await repo.create_namespace(Namespace.parse(name))
    await snapshot(repo, "a/b:host/g1", FIRST, ("x.blob",))


def recorded(golden: Path, file: str, name: str) -> list[str]:
    """What was asked in a scenario, in the order in which requests began; several of a kind in a row count once."""
    (found,) = [one for one in json.loads((golden / "wire" / file).read_text()) if one["scenario"] == name]
    requests: list[dict[str, Any]] = []
    for connection in found["connections"]:
        requests += connection["http1"] + connection.get("http2", [])
    requests.sort(key=lambda request: request["order"][0])
    return once(
        call(one["method"], one["path"], one.get("query") or one.get("body", {}).get("json") or {}) for one in requests
    )


def asked(double: PbsDouble) -> list[str]:
    """The same of the double, since the last time."""
    calls = once(call(one.method, one.path, one.parameters) for one in double.asked)
    double.asked.clear()
    return [one for one in calls if one != OURS]


def once(calls: Iterable[str]) -> list[str]:
    return [call for call, _ in groupby(calls)]


def call(method: str, path: str, given: Mapping[str, Any]) -> str:
    values = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in
              sorted(given.items()) if name not in NOT_COMPARED]  # fmt: skip
    return " ".join([method, path.rpartition("/")[2], *values])


def put(double: PbsDouble, group: str, ctime: int, owner: str = SYNC, *, protected: bool = False) -> None:
    """A snapshot that others wrote."""
    kind, _, backup_id = group.partition("/")
    blob = make_blob(b"1")
    manifest = Manifest.new(Group.parse(group).at(ctime))
    manifest.add(ManifestFile("x.blob", CryptMode.NONE, len(blob), hashlib.sha256(blob).digest()))
    files = {"x.blob": blob, "index.json.blob": bytes(manifest.encode(CODEC))}
    double.folders["", kind, backup_id, ctime] = Folder(files, protected=protected)
    double.owners.setdefault(("", kind, backup_id), owner)


async def pushed(source: LocalRepository, double: PbsDouble, **options: Any) -> list[str]:
    """What a push asks, which succeeds."""
    async with remote(double) as target:
        assert (await push(source, target, **options)).failed == {}
    return asked(double)


async def test_pushes_ask_what_the_real_ones_asked(source: LocalRepository, golden: Path) -> None:
    double = PbsDouble()

    def theirs(name: str) -> list[str]:
        return recorded(golden, "push.json", name)

    for name in ("push1", "push2"):
        assert await pushed(source, double, max_depth=0) == theirs(name)
    await everything(source)
    assert await pushed(source, double) == theirs("push3")
    a, xy = Namespace.parse("a"), Namespace.parse("x/y")
    assert await pushed(source, double, source_ns=a, target_ns=xy, max_depth=1) == theirs("push4")

    await snapshot(source, "host/foreign", FIRST, ("x.blob",))
    put(double, "host/foreign", FIRST, "t@pbs!tok")
    put(double, "host/vanished", FIRST)
    put(double, "host/vanprot", FIRST, protected=True)
    put(double, "host/tree", SECOND)
    double.namespaces.add("extra")
    ours = await pushed(source, double, remove_vanished=True)
    assert without_looks(ours, "vanished", "vanprot", "x/y/b", "x/y", "x", "extra") == groups_late(theirs("push5"))
    ours = await pushed(source, double, remove_vanished=True, encrypted_only=True, max_depth=0)
    # What does not pass a flag has not vanished (spec 12.5).
    wanted = [one for one in theirs("push6") if not one.startswith("DELETE snapshots")]
    assert without_looks(ours, "vanprot") == wanted
    for key in [key for key in double.folders if key[2] in ("split", "tree", "100")]:
        del double.folders[key]
        double.owners.pop(key[:3], None)
    assert await pushed(source, double, verified_only=True, transfer_last=1, max_depth=0) == theirs("push7")
    ours = await pushed(source, double, remove_vanished=True, max_depth=0)
    assert without_looks(ours, "vanprot") == theirs("pushjob")


def without_looks(calls: Sequence[str], *vanished: str) -> list[str]:
    """Without what only ours asks before and after removals: it spares what others own, and names what is protected."""
    groups = {f"GET snapshots backup-id={name} backup-type=host" for name in vanished}
    namespaces = {f"GET {what}={name}" for what in ("namespace parent", "groups ns") for name in vanished}
    g1 = "GET snapshots backup-id=g1 backup-type=host ns="
    looks = groups | namespaces | {f"{g1}{name}" for name in vanished}
    return [one for one in calls if one not in looks]


def groups_late(calls: Sequence[str]) -> list[str]:
    """Groups are removed when everything was listed without a fault (spec 12.3), not namespace by namespace."""
    late = ("DELETE groups", "DELETE namespace")
    return sorted(calls, key=lambda one: next((n for n, text in enumerate(late, 1) if one.startswith(text)), 0))


async def test_pulls_ask_what_the_real_ones_asked(pair: Pair, source: LocalRepository, golden: Path) -> None:
    double, target = PbsDouble(), pair.target
    await everything(source)
    await pushed(source, double, transfer_last=1)
    put(double, "host/foreign", FIRST, "t@pbs!tok")
    put(double, "host/vanprot", FIRST, protected=True)
    for name in ("pulled", "pulled/old"):
        await target.create_namespace(Namespace.parse(name))
    await snapshot(target, "pulled:host/enc", FIRST, ("x.blob",))
    await target.set_owner(Group.parse("host/enc", Namespace.parse("pulled")), "t@pbs!tok")

    async def check(name: str, failed: Sequence[str], ns: str = "pulled", **options: Any) -> None:
        async with remote(double) as far:
            report = await pull(far, target, target_ns=Namespace.parse(ns), **options)
        assert (name, asked(double), list(report.failed)) == (name, recorded(golden, "pull.json", name), list(failed))

    enc = ["pulled: host/enc"]
    await check("pull1", enc)
    await check("pull2", enc)
    await snapshot(target, "pulled:host/van", FIRST, ("x.blob",))
    await snapshot(target, "pulled:host/vp", FIRST, ("x.blob",))
    await target.set_protected(Group.parse("host/vp", Namespace.parse("pulled")).at(FIRST), protected=True)
    await check("pull3", enc, remove_vanished=True)
    assert Namespace.parse("pulled/old") not in await target.namespaces()
    await check("pull4", enc, encrypted_only=True, transfer_last=1, max_depth=0)
    async with remote(double) as far:
        with pytest.raises(SnapshotNotFoundError, match="nope"):
            await pull(far, target, target_ns=Namespace.parse("pulled"), source_ns=Namespace.parse("nope"))
    assert asked(double) == recorded(golden, "pull.json", "pull5")
    await check("pull6", [], "nope2", max_depth=0)
    await check("pull7", enc, resync_corrupt=True, verified_only=True, max_depth=0)
    filters = tuple(map(GroupFilter.parse, ("type:host", "exclude:group:host/tree")))
    await check("pull8", enc, filters=filters, max_depth=0)
