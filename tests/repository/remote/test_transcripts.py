"""What the client says, and in which order, compared with what PBS's own client said to a real server."""

import json
from pathlib import Path
from typing import Any

from datastore.names import Group
from tests.support.pbs_double import PbsDouble
from tests.support.pbs_store import CHUNK, Asked
from tests.support.remote import remote
from tests.support.snapshots import put_all, read_image, write_snapshot

GROUP = Group.parse("vm/100")
NAME = "drive-scsi0.img.fidx"
FILES = {NAME: b"a" * CHUNK + b"b" * CHUNK + b"tail", "qemu-server.conf.blob": b"name: x\n"}
CHANGED = {**FILES, NAME: b"a" * CHUNK + b"c" * CHUNK + b"tail"}


def shapes(golden: Path, name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Endpoint -> names of parameters with their JSON types (text in a query), and content type."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for scenario in json.loads((golden / "wire" / f"{name}.json").read_text()):
        for connection in scenario["connections"]:
            for request in connection.get("http2", []):
                given = request.get("query") or request.get("body", {}).get("json") or {}
                typed = {key: type(value) for key, value in given.items()}
                entry = found.setdefault((request["method"], request["path"]), {"types": {}, "content": set()})
                entry["types"] |= typed
                entry["content"].add(request["content-type"])
    return found


def check_shape(asked: Asked, known: dict[tuple[str, str], dict[str, Any]]) -> None:
    entry = known[asked.method, asked.path]
    assert asked.content_type in entry["content"], asked
    in_query = asked.content_type != "application/json"
    for key, value in asked.parameters.items():
        expected = entry["types"][key]
        # The double has read numbers out of the query; in JSON the type is what was sent.
        assert expected is str if in_query else type(value) is expected, (asked, key)
    optional = {"reuse-csum"}
    assert set(entry["types"]) - set(asked.parameters) <= optional, asked


async def test_backups_speak_as_the_reference_client(golden: Path) -> None:
    known = shapes(golden, "backup")
    double = PbsDouble()
    async with remote(double) as repo:
        await write_snapshot(repo, GROUP, 1000, FILES, chunk_size=CHUNK)
        first = [asked for asked in double.asked if asked.protocol == "backup"]
        double.asked.clear()
        async with repo.backup(GROUP.at(2000)) as session:
            await session.previous_index(NAME)
            await put_all(session, CHANGED, chunk_size=CHUNK)
            await session.finish()
        second = [asked for asked in double.asked if asked.protocol == "backup"]
    for upgrade in (first.pop(0), second.pop(0)):
        scenario = json.loads((golden / "wire/backup.json").read_text())[0]["connections"][0]["http1"][0]
        assert set(upgrade.parameters) == set(scenario["query"])
        assert {upgrade.parameters[name] for name in ("debug", "benchmark")} <= {"true", "false"}
    for asked in first + second:
        check_shape(asked, known)
    chunks = ["/fixed_chunk"] * 3
    order = ["/fixed_index", *chunks, "/fixed_index", "/fixed_close", "/blob", "/blob", "/finish"]
    assert [asked.path for asked in first] == ["/previous_backup_time", *order]
    # Known chunks are appended without being sent; the manifest is the last blob.
    order = ["/fixed_index", "/fixed_chunk", "/fixed_index", "/fixed_close", "/blob", "/blob", "/finish"]
    assert [asked.path for asked in second] == ["/previous_backup_time", "/previous", "/previous", *order]
    assert [asked.parameters for asked in second[1:3]] == [{"archive-name": "index.json.blob"}, {"archive-name": NAME}]
    assert [asked.parameters["file-name"] for asked in second if asked.path == "/blob"][-1] == "index.json.blob"
    put = next(asked for asked in second if asked.method == "PUT")
    assert put.parameters["offset-list"] == [0, CHUNK, 2 * CHUNK]


async def test_readers_speak_as_the_reference_client(golden: Path) -> None:
    known = shapes(golden, "reader")
    double = PbsDouble()
    async with remote(double) as repo:
        snapshot = await write_snapshot(repo, GROUP, 1000, FILES, chunk_size=CHUNK)
        double.asked.clear()
        async with repo.reader(snapshot) as reader:
            await reader.manifest()
        await read_image(repo, snapshot, NAME)
    asked = [one for one in double.asked if one.protocol == "reader" and one.status != 101]
    for one in asked:
        check_shape(one, known)
    # The manifest bounds the index, the index comes before its chunks.
    assert [one.path for one in asked[:3]] == ["/download", "/download", "/download"]
    assert [one.path for one in asked[3:]] == ["/chunk"] * 3


async def test_windows_are_as_large_as_those_of_the_reference_client(golden: Path) -> None:
    theirs = json.loads((golden / "wire/backup.json").read_text())[0]["connections"][0]["http2-settings"]["client"]
    double = PbsDouble()
    async with remote(double) as repo:
        await write_snapshot(repo, GROUP, 1000, {"vm.conf.blob": b"x"})
    assert double.client_settings[4] == theirs["initial-window-size"] == (1 << 31) - 2
    assert double.client_settings[5] == 1 << 20  # frames; larger ones would keep a slow line for too long
    assert double.client_settings[2] == 0  # no push


async def test_entries_go_in_batches_and_a_reused_index_counts_what_was_rewritten() -> None:
    double = PbsDouble()
    count = 1300
    async with remote(double) as repo, repo.backup(GROUP.at(1000)) as session:
        from tests.support.snapshots import CODEC

        zeros = bytes(CHUNK)
        digest = CODEC.digest(zeros)
        writer = await session.open_index("big.img.fidx", size=count * CHUNK)
        await session.put_chunk(writer, digest, CHUNK, CODEC.encode(zeros))
        for number in range(count):
            await session.append(writer, [(number * CHUNK, digest)])
        import hashlib

        await session.close_index(writer, count, count * CHUNK, hashlib.sha256(digest * count).digest())
        puts = [len(one.parameters["offset-list"]) for one in double.asked if one.method == "PUT"]
        assert puts == [512, 512, 276]
