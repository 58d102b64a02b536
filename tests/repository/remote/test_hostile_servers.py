"""Servers that lie: a clear error, bounded memory, and nothing believed that was not checked."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from core.errors import FleeceError, FormatError
from datastore.errors import CorruptChunkError
from datastore.names import Group
from repository.interface import Reader
from repository.remote import rest as rest_module
from repository.remote.errors import RemoteAnswerError, RemoteError
from repository.remote.http2 import Http2Client, _Exchange
from repository.remote.listing import parse_groups, parse_namespaces, parse_snapshots
from repository.remote.rest import MAX_ANSWER, MAX_VALUES, unwrap
from tests.support.pbs_double import PbsDouble
from tests.support.pbs_store import CHUNK
from tests.support.remote import remote
from tests.support.snapshots import put_all, read_image, write_snapshot

GROUP = Group.parse("vm/100")
NAME = "disk.img.fidx"
IMAGE = os.urandom(CHUNK + 100)


def lies(endpoint: str, change: Callable[[bytes], bytes], **only: Any) -> Callable[[str, dict[str, Any], bytes], bytes]:
    def lie(name: str, parameters: dict[str, Any], body: bytes) -> bytes:
        wanted = {key.replace("_", "-"): value for key, value in only.items()}
        return change(body) if name == endpoint and wanted.items() <= parameters.items() else body

    return lie


@pytest.mark.parametrize(
    ("endpoint", "change", "why"),
    [
        ("download", lambda body: b"", "0 bytes, a header has|unknown magic|bytes"),
        ("download", lambda body: body + b"x" * 64, "bytes, header and 2 digests need"),
        ("download", lambda body: body[:64] + (1 << 62).to_bytes(8, "little") + body[72:], "digests need"),
        ("download", lambda body: b"\0" * (8 << 20), "more than .* bytes"),
        ("chunk", lambda body: body[:-1], "CRC|checksum|digest"),
        ("chunk", lambda body: body + bytes(CHUNK // 64 + 4096), f"more than {CHUNK + CHUNK // 64 + 4096} bytes"),
        ("chunk", lambda body: b"nonsense" * 10, "unknown magic"),
        ("chunk", lambda body: b"short", "a header has 12"),
    ],
)
async def test_a_reader_checks_what_a_server_sends(endpoint: str, change: Any, why: str) -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        snapshot = await write_snapshot(repo, GROUP, 1000, {NAME: IMAGE}, chunk_size=CHUNK)
        only = {"file_name": NAME} if endpoint == "download" else {}
        double.lie = lies(endpoint, change, **only)
        with pytest.raises((FormatError, CorruptChunkError), match=why):
            await read_image(repo, snapshot, NAME)


async def test_the_chunk_of_another_digest_is_refused() -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        snapshot = await write_snapshot(repo, GROUP, 1000, {NAME: b"a" * CHUNK + b"b" * CHUNK}, chunk_size=CHUNK)
        one, other = double.chunks
        double.chunks[one] = double.chunks[other]
        with pytest.raises(FleeceError, match="digest"):
            await read_image(repo, snapshot, NAME)


@pytest.mark.parametrize("change", [lambda body: body[:-1] + b"\0", lambda body: b"x" * (9 << 20), lambda body: b""])
async def test_a_previous_index_that_is_wrong_gives_no_known_chunks(change: Callable[[bytes], bytes]) -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        await write_snapshot(repo, GROUP, 1000, {NAME: IMAGE}, chunk_size=CHUNK)
        double.lie = lies("previous", change, archive_name=NAME)
        async with repo.backup(GROUP.at(2000)) as session:
            assert session.base == GROUP.at(1000)
            assert await session.previous_index(NAME) is None
            await put_all(session, {NAME: IMAGE}, chunk_size=CHUNK)
            await session.finish()
        double.lie = None
        assert await read_image(repo, GROUP.at(2000), NAME) == IMAGE


@pytest.mark.parametrize(
    ("endpoint", "answer"),
    [
        ("previous_backup_time", b'{"data": "soon"}'),
        ("previous_backup_time", b'{"data": -1}'),
        ("previous_backup_time", b'{"data": 99999999999999}'),
        ("previous_backup_time", b"[" * 100_000),
        ("previous_backup_time", b'{"data": 1' + b" " * (2 << 20) + b"}"),
        ("fixed_index", b'{"data": true}'),
        ("fixed_index", b"{}"),
        ("fixed_close", b"\xff"),
    ],
)
async def test_answers_that_make_no_sense_end_the_backup(endpoint: str, answer: bytes) -> None:
    double = PbsDouble()
    double.lie = lies(endpoint, lambda body: answer)
    async with remote(double) as repo:
        with pytest.raises((RemoteAnswerError, RemoteError)):
            await write_snapshot(repo, GROUP, 1000, {NAME: IMAGE}, chunk_size=CHUNK)
        assert await repo.snapshots(unfinished=True) == []


@pytest.mark.parametrize(
    "entry",
    [
        5,
        {"backup-type": "vm"},
        {"backup-type": "vm", "backup-id": "../../etc", "backup-time": 5},
        {"backup-type": "vm", "backup-id": "a/b", "backup-time": 5},
        {"backup-type": "xx", "backup-id": "a", "backup-time": 5},
        {"backup-type": "vm", "backup-id": "a", "backup-time": 1 << 70},
        {"backup-type": "vm", "backup-id": "a", "backup-time": True},
        {"backup-type": "vm", "backup-id": "a", "backup-time": 5, "size": "big"},
        {"backup-type": "vm", "backup-id": "a", "backup-time": 5, "files": [5]},
    ],
)
def test_lists_with_impossible_entries_are_refused(entry: Any) -> None:
    with pytest.raises(RemoteAnswerError):
        parse_snapshots([entry], GROUP.ns, "x")


def test_what_only_people_see_is_left_out_when_it_makes_no_sense() -> None:
    entry = {
        "backup-type": "vm", "backup-id": "a", "backup-time": 5, "size": 3, "owner": "a\nb", "comment": 5,
        "verification": {"state": "perhaps"}, "fingerprint": "x",
        "files": [{"filename": "../x"}, {"filename": "a.blob", "size": 3, "crypt-mode": "rot13"}],
    }  # fmt: skip
    (info,) = parse_snapshots([entry], GROUP.ns, "x")
    assert (info.owner, info.comment, info.verification, info.fingerprint) == (None, "", None, None)
    assert [(file.filename, file.crypt_mode) for file in info.files] == [("a.blob", None)]
    for parse in (lambda data: parse_namespaces(data, "x"), lambda data: parse_groups(data, GROUP.ns, "x")):
        wrong: list[Any] = [None, {}, [{"ns": "a//b"}], [{"ns": "../a"}], [{"backup-type": "vm", "backup-id": "/"}]]
        for data in wrong:
            with pytest.raises(RemoteAnswerError):
                parse(data)


async def test_memory_of_answers_that_never_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is given up as soon as it is longer than asked for, whatever the server goes on to send."""
    held: list[int] = []
    take = Http2Client._take_body

    def watched(self: Http2Client, number: int, exchange: Any, data: Any) -> None:
        take(self, number, exchange, data)
        held.append(sum(map(len, exchange.body)))

    monkeypatch.setattr(Http2Client, "_take_body", watched)
    double = PbsDouble()
    async with remote(double) as repo:
        snapshot = await write_snapshot(repo, GROUP, 1000, {NAME: IMAGE}, chunk_size=CHUNK)
        double.lie = lies("chunk", lambda body: body + bytes(20 << 20))
        with pytest.raises(FleeceError, match="more than"):
            await read_image(repo, snapshot, NAME)
    assert max(held) <= (16 << 20) + 44


@pytest.mark.parametrize("piece", [b"[],", b"{},", b'"ab",', b"[[{}]],"])
def test_a_list_that_would_take_gigabytes_as_objects_is_refused(piece: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 30_000
    monkeypatch.setattr(rest_module, "MAX_VALUES", most)
    share = MAX_ANSWER * most // 4_000_000  # as long as such a list can be, in proportion
    body = b'{"data": [' + piece * (share // len(piece)) + b"1]}"
    with pytest.raises(RemoteAnswerError, match="more than 30000 values"):
        unwrap(body, "list", "here")


def test_a_list_of_a_hundred_thousand_snapshots_is_no_attack() -> None:
    entry = {
        "backup-type": "vm", "backup-id": "100", "backup-time": 1_700_000_000, "comment": "a line of notes",
        "files": [{"filename": f"drive-scsi{n}.img.fidx", "crypt-mode": "none", "size": 1 << 35} for n in range(4)],
        "owner": "backup@pbs!host", "protected": False, "size": 1 << 37,
        "verification": {"state": "ok", "upid": "UPID:pbs:00000001:00000002:00000003:00000004:verify:a:root@pam:"},
    }  # fmt: skip
    text = json.dumps(entry).encode()
    body = b'{"data": [' + b",".join([text] * 1000) + b"]}"
    values = body.count(b",") + body.count(b"{") + body.count(b"[")
    assert values * 100 < MAX_VALUES
    assert len(parse_snapshots(unwrap(body, "list", "here"), GROUP.ns, "x")) == 1000


async def test_an_answer_in_pieces_of_a_byte_takes_no_more_memory_than_its_bytes() -> None:
    ours, _ = trio.testing.memory_stream_pair()
    async with Http2Client.open(ours, b"", where="here") as client:
        exchange = _Exchange("ask", lambda status: 1 << 20, deque(), 0, True)
        exchange.status = 200
        for _ in range(100):
            for piece in (b"x" * 5000, *[b"y"] * 100):
                client._take_body(1, exchange, piece)
        assert len(exchange.body) == 200
        assert bytearray().join(exchange.body) == (b"x" * 5000 + b"y" * 100) * 100


@pytest.mark.parametrize(
    "junk", [b"HTTP/1.1 400 what\r\n\r\n", b"\0" * 100, b"\xff" * (1 << 20)], ids=["http1", "zeros", "ones"]
)
async def test_what_is_no_http2_ends_the_connection_with_an_error(
    junk: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async with Http2Client.open(ours, b"", where="here") as client, trio.open_nursery() as nursery:
        nursery.start_soon(theirs.send_all, junk)
        with pytest.raises(RemoteError):
            await client.request("GET", "/x", what="ask", limit=lambda status: 100)
        nursery.cancel_scope.cancel()


async def test_a_server_that_falls_silent_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    ours, _ = trio.testing.memory_stream_pair()
    async with Http2Client.open(ours, b"", where="here") as client:
        start = trio.current_time()
        with pytest.raises(RemoteError, match="no sign of life"):
            await client.request("GET", "/x", what="ask", limit=lambda status: 100)
        assert trio.current_time() - start < 400


async def test_a_chunk_that_no_opened_index_names_is_not_asked_for() -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        snapshot = await write_snapshot(repo, GROUP, 1000, {NAME: IMAGE}, chunk_size=CHUNK)
        async with repo.reader(snapshot) as opened:
            reader: Reader = opened
            with pytest.raises(FleeceError, match="no index that was opened names it"):
                await reader.read_chunk(hashlib.sha256(b"other").digest())
    assert not any(asked.path == "/chunk" for asked in double.asked)
