"""What the real programs said to a real server in connections of their own and beside them, said to ours."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio
from hyperframe.frame import Frame, SettingsFrame, WindowUpdateFrame

from datastore.blob import Blob
from datastore.manifest import Manifest, ManifestFile
from datastore.names import Group, Namespace
from repository.local import LocalRepository
from tests.support.direct_server import Direct, query_of
from tests.support.golden_sessions import Sessions, sealed, transcript
from tests.support.snapshots import CODEC
from tests.support.wire_server import wire_server

CLIENT, SYNC = "t@pbs!tok", "sync@pbs!tok"
FIRST, SECOND = 1_767_225_600, 1_767_312_000
#: What transcripts show of a tree that is backed up in none of them.
NOT_THERE = "mount-meta"
STRANGER = "tree-big"


async def zeros(repo: LocalRepository) -> None:
    """The chunk that PBS makes with every datastore."""
    digest = CODEC.zero_digest()
    await repo.store.chunks.insert(digest, Blob.parse(sealed(digest.hex()), where="zeros"))


def user(direct: Direct, auth_id: str) -> dict[str, str]:
    """A token that may do everything with the datastore."""
    headers = direct.token(auth_id)
    for who in (auth_id, auth_id.partition("!")[0]):
        direct.right("/datastore/main", who, "DatastoreAdmin")
    return headers


@pytest.mark.timeout(600)
async def test_backups_and_then_restores(golden: Path, direct: Direct, local: LocalRepository, no_delays: None) -> None:
    await zeros(local)
    sessions = Sessions(direct, user(direct, CLIENT), local.store.base)
    faults: list[str] = []
    for name in ("backup", "reader"):
        for scenario in transcript(golden, name):
            if scenario["scenario"] != NOT_THERE:
                faults += await sessions.scenario(scenario)
    assert sessions.compared > 120
    assert not faults, "\n".join(faults)
    assert len(await local.snapshots()) == 9


@pytest.mark.timeout(600)
async def test_what_the_client_asks_over_rest(
    golden: Path, direct: Direct, local: LocalRepository, no_delays: None
) -> None:
    await zeros(local)
    sessions = Sessions(direct, user(direct, CLIENT), local.store.base)
    for scenario in transcript(golden, "backup"):
        if not scenario["scenario"].startswith("few"):
            assert await sessions.scenario(scenario) == []
    sessions.compared = 0
    faults: list[str] = []
    for scenario in transcript(golden, "client-rest"):
        for request in scenario["requests"]:
            data = request["response"].get("json", {}).get("data")
            if isinstance(data, list):
                data[:] = [one for one in data if one.get("backup-id") != STRANGER]
        faults += await sessions.scenario(scenario)
    assert sessions.compared == 20
    assert not faults, "\n".join(faults)
    owners = {str(info.group): info.owner for info in await local.groups(Namespace())}
    assert owners == {"vm/100": CLIENT, "host/tree-legacy": CLIENT, "host/tree-metadata": CLIENT, "host/enc": "t@pbs"}


async def others(repo: LocalRepository, direct: Direct, sync: Mapping[str, str]) -> None:
    """What other programs left in the target before the push that removes what vanished."""
    client = user(direct, CLIENT)
    await write(direct, sync, "host/vanished", FIRST)
    await write(direct, sync, "host/vanprot", FIRST)
    await write(direct, sync, "host/tree", SECOND)
    await write(direct, client, "host/foreign", FIRST)
    await repo.set_protected(Group.parse("host/vanprot").at(FIRST), protected=True)
    await repo.create_namespace(Namespace.parse("extra"))


async def write(direct: Direct, who: Mapping[str, str], group: str, ctime: int) -> None:
    """A small snapshot."""
    kind, _, backup_id = group.partition("/")
    query = {"store": "main", "backup-type": kind, "backup-id": backup_id, "backup-time": ctime}
    async with direct.session("backup", who, query) as session:
        blob = bytes(CODEC.encode_blob(b"1"))
        manifest = Manifest.new(Group.parse(group).at(ctime))
        manifest.add(ManifestFile("x.blob", CODEC.mode, len(blob), hashlib.sha256(blob).digest()))
        for name, body in (("x.blob", blob), ("index.json.blob", bytes(manifest.encode(CODEC)))):
            got = await session.call("POST", "/blob", {"file-name": name, "encoded-size": len(body)}, body=body)
            assert got.status == 200
        assert (await session.call("POST", "/finish")).status == 200


@pytest.mark.timeout(600)
async def test_pushes_and_then_pulls(golden: Path, direct: Direct, local: LocalRepository, no_delays: None) -> None:
    await zeros(local)
    sync = user(direct, SYNC)
    sessions = Sessions(direct, sync, local.store.base)
    faults: list[str] = []
    for scenario in transcript(golden, "push") + transcript(golden, "pull"):
        if scenario["scenario"] == "push5":
            await others(local, direct, sync)
        faults += await sessions.scenario(scenario)
    assert sessions.compared > 290
    assert not faults, "\n".join(faults)


async def test_settings_of_the_connection(golden: Path, local: LocalRepository, tmp_path: Path) -> None:
    connection = transcript(golden, "backup")[0]["connections"][0]
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
