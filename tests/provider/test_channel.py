"""The pipes of a session: what comes in is checked, one question has its turn, and nothing outlives who asks."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest
import trio
from trio.testing import MockClock, memory_stream_one_way_pair

from agent.provider import channel as module
from agent.provider.channel import ALIVE_S, Channel, ChannelProgress, open_channel
from agent.provider.messages import BackupVm, Request, Storage, Walk, decoded, parsed
from agent.provider.stream import FrameSink, packed_report, receive_archive, send_all, unpacked_report
from core.errors import FleeceError, FormatError, SourceError, UsageError
from pxar.create_report import MAX_MOUNTS, MAX_WARNINGS, CreateReport

QUESTION = {"id": "1", "call": "x", "parent": 2, "parameters": {}}


@pytest.fixture
def another() -> Iterator[int]:
    """A process that lives until the test ends."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process.pid
        process.kill()


async def answered(*lines: bytes) -> list[dict[str, object]]:
    """What a session says to `lines` and their end, if it answers each question with its call."""
    asking, incoming = memory_stream_one_way_pair()
    outgoing, hearing = memory_stream_one_way_pair()
    said = b""

    async def serve(channel: Channel) -> None:
        while True:
            request = await channel.question()
            channel.answer({"call": request.call})

    async def listen() -> None:
        nonlocal said
        async for data in hearing:
            said += data

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        async with outgoing:
            try:
                async with open_channel(incoming, outgoing) as channel:
                    nursery.start_soon(ask, asking, lines)
                    await serve(channel)
            finally:
                nursery.cancel_scope.deadline = trio.current_time() + 60
    return [json.loads(line) for line in said.splitlines()]


async def ask(asking: trio.abc.SendStream, lines: tuple[bytes, ...]) -> None:
    async with asking:
        for line in lines:
            await asking.send_all(line)
            await trio.testing.wait_all_tasks_blocked(0.01)


def line_of(**changes: object) -> bytes:
    return json.dumps({**QUESTION, **changes}).encode() + b"\n"


async def test_questions_are_answered_in_turn_until_there_are_no_more(another: int) -> None:
    first, second = line_of(parent=another), line_of(id="2", call="ü", parent=another)
    assert await answered(first[:5], first[5:] + b"", second, b'{"cut off') == [
        {"id": "1", "result": {"call": "x"}},
        {"id": "2", "result": {"call": "ü"}},
    ]


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ([b"garbage\n"], "it is no JSON"),
        ([b"\xff\n"], "it is no JSON"),
        ([b"[" * 100_000 + b"\n"], "it is no JSON"),
        ([b"[]\n"], "the whole"),
        ([line_of(id="")], "id: "),
        ([line_of(id=7)], "id: "),
        ([line_of(parent=1)], "parent: "),
        ([line_of(parent="2")], "parent: "),
        ([line_of(parameters=[])], "parameters: "),
        ([line_of(more=1)], "more: "),
        ([line_of() + line_of()], "the one before it has no answer yet"),
    ],
)
async def test_what_is_no_question_ends_the_session(another: int, lines: list[bytes], match: str) -> None:
    lines = [line.replace(b'"parent": 2', b'"parent": %d' % another) for line in lines]
    with pytest.raises(BaseExceptionGroup) as caught:
        await answered(*lines)
    assert caught.group_contains(FleeceError, match=match)


async def test_a_question_without_end_is_not_kept(another: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DOCUMENT", 1000)
    with pytest.raises(BaseExceptionGroup) as caught:
        await answered(b"x" * 1001)
    assert caught.group_contains(FormatError, match="more than 1000 bytes")


async def test_the_end_of_who_asks_ends_the_session(another: int) -> None:
    _, incoming = memory_stream_one_way_pair()
    outgoing, _ = memory_stream_one_way_pair()
    asking, incoming = memory_stream_one_way_pair()
    with trio.fail_after(60):
        async with open_channel(incoming, outgoing) as channel:
            await asking.send_all(line_of(parent=another))
            await channel.question()
            os.kill(another, signal.SIGKILL)
            await trio.sleep_forever()
        # One that has ended already, too.
        asking, incoming = memory_stream_one_way_pair()
        async with open_channel(incoming, outgoing) as channel:
            await asking.send_all(line_of(parent=(1 << 22) + 1))
            await trio.sleep_forever()


async def test_signs_of_life_come_while_there_is_a_question_and_only_then(autojump_clock: MockClock) -> None:
    asking, incoming = memory_stream_one_way_pair()
    outgoing, hearing = memory_stream_one_way_pair()
    async with open_channel(incoming, outgoing) as channel:
        await trio.sleep(3.5 * ALIVE_S)
        channel.log("info", "before")
        await asking.send_all(line_of(parent=os.getpid()))
        await channel.question()
        progress = ChannelProgress(channel)
        with progress.task("disk", 1000) as task:
            for _ in range(30):
                await trio.sleep(1)
                task.advance(10)
        channel.answer({})
        await trio.sleep(5 * ALIVE_S)
    await outgoing.aclose()
    said = [json.loads(line) async for data in hearing for line in data.splitlines()]
    assert said[0] == {"log": {"level": "info", "message": "before"}}
    assert said.count({"alive": True}) in (5, 6)
    notes = [one["log"]["message"] for one in said if "log" in one][1:]
    assert notes == ["disk: 100 B of 1000 B (10 %)", "disk: 200 B of 1000 B (20 %)", "disk: 300 B of 1000 B (30 %)"]
    assert said[-1] == {"id": "1", "result": {}}


@pytest.mark.parametrize(
    ("model", "document", "match"),
    [
        (Storage, {"id": "a b", "repository": "x"}, "id: "),
        (Storage, {"id": "ab", "repository": ""}, "repository: "),
        (Storage, {"id": "ab", "repository": "x", "ns": "../x"}, "ns: "),
        (Walk, {"directory": "/x", "sources": [], "exclude": []}, "directory: it is no base64"),
        (Walk, {"directory": "L3g=", "sources": ["ä"], "exclude": []}, "sources.0: it is no base64"),
        (BackupVm, {"guest-config": "", "volumes": {}}, "volumes: "),
        (BackupVm, {"guest-config": "", "volumes": {"../x": {"size": 1, "bitmap-mode": "none"}}}, "volumes.../x"),
        (Request, 7, "the whole"),
    ],
)
def test_documents_are_checked(model: type, document: object, match: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(model, document, "a test")
    assert match in caught.value.why


def test_what_is_no_json() -> None:
    with pytest.raises(FormatError, match="it is no JSON"):
        decoded(b"{", "a test")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "ends early"),
        (b"A\x05\x00\x00\x00abc", "ends early"),
        (b"A\xff\xff\xff\xff", "makes no sense"),
        (b"Z\x00\x00\x00\x00", "makes no sense"),
        (b"A\x00\x00\x00\x00", "makes no sense"),
        (b"E\x02\x00\x00\x00[]", "other keys"),
        (b"E\x01\x00\x00\x00{", "no JSON"),
    ],
)
async def test_a_stream_that_makes_no_sense(data: bytes, match: str) -> None:

    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    taken: list[bytes] = []

    def work() -> None:
        sinks = {b"A": lambda pieces: taken.extend(bytes(piece) for piece in pieces)}
        unpacked_report(receive_archive(reading, sinks), CreateReport())

    try:
        with pytest.raises((FormatError, SourceError), match=match):
            await trio.to_thread.run_sync(work)
    finally:
        os.close(reading)


def test_a_report_has_no_more_texts_than_the_walk_keeps() -> None:
    for name, most in (("warnings", MAX_WARNINGS), ("skipped_mounts", MAX_MOUNTS)):
        document = json.loads(packed_report(CreateReport()))
        unpacked_report(json.dumps({**document, name: ["x"] * most}).encode(), CreateReport())
        with pytest.raises(FormatError, match="a list of texts"):
            unpacked_report(json.dumps({**document, name: ["x"] * (most + 1)}).encode(), CreateReport())


async def test_a_stream_that_stands_still_is_given_up_and_one_that_is_cancelled_ends() -> None:

    reading, writing = os.pipe()
    try:
        with pytest.raises(SourceError, match="the walk hangs"):
            await trio.to_thread.run_sync(lambda: receive_archive(reading, {}, stalled_s=0.0))
        with trio.move_on_after(0.01) as scope:
            await trio.to_thread.run_sync(lambda: receive_archive(reading, {}))
        assert scope.cancelled_caught
    finally:
        os.close(reading)
        os.close(writing)


async def test_frames_and_the_report_come_as_they_were_sent() -> None:

    ours, theirs = socket.socketpair()
    report = CreateReport(files=3, size=7, read=7, warnings=["one\x1b[2J"], skipped_mounts=[b"mnt/\xff"])
    data = os.urandom(9 << 20)

    def send() -> None:

        sink = FrameSink(theirs.fileno(), b"A")
        sink.write(data[:3])
        sink.reserve(1 << 20)[:5] = data[3:8]
        sink.commit(5)
        sink.write(data[8:])
        assert sink.position == len(data)
        sink.flush()
        document = packed_report(report)
        send_all(theirs.fileno(), memoryview(b"E" + len(document).to_bytes(4, "little") + document))

    taken = bytearray()
    found = CreateReport()

    def receive() -> None:
        def sink(pieces: Iterator[memoryview]) -> None:
            for piece in pieces:
                taken.extend(piece)

        unpacked_report(receive_archive(ours.fileno(), {b"A": sink}), found)

    with ours, theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, send)
            await trio.to_thread.run_sync(receive)
    assert taken == data
    assert (found.files, found.size, found.warnings) == (3, 7, ["one?[2J"])
    assert found.skipped_mounts == [b"mnt/?"]
