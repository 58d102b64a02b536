import gc
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from hypervisor.errors import QmpAnswerError, QmpCommandError, QmpConnectError, QmpLostError, QmpTimeoutError
from hypervisor.qmp import connect
from hypervisor.unix_socket import Peer, process_start_time
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu
from tests.support.scripted_qmp import HANG_UP, SILENCE, Raw, Refusal, ScriptedQmp
from tests.support.waiting import until


@pytest.fixture
async def vm(qemu: QemuBinary) -> AsyncIterator[RunningQemu]:
    async with RunningQemu.start(qemu, []) as vm:
        yield vm


async def test_a_session_knows_version_commands_and_process(vm: RunningQemu) -> None:
    async with connect(vm.qmp) as qmp:
        assert qmp.version == vm.binary.version
        assert {"blockdev-reopen", "transaction"} <= qmp.commands
        assert qmp.peer == Peer(vm.pid, os.getuid(), os.getgid(), process_start_time(vm.pid))
        assert qmp.peer.alive()
        assert (await qmp.execute("query-status"))["status"] == "prelaunch"
    await vm.kill()
    assert not qmp.peer.alive()


async def test_a_refusal_carries_command_class_and_words(vm: RunningQemu) -> None:
    async with connect(vm.qmp) as qmp:
        with pytest.raises(QmpCommandError, match=r"cannot run blockdev-del in .*: .*nowhere") as caught:
            await qmp.execute("blockdev-del", {"node-name": "nowhere"})
        assert (caught.value.command, caught.value.error_class) == ("blockdev-del", "GenericError")
        with pytest.raises(QmpCommandError) as caught:
            await qmp.execute("no-such-command")
        assert caught.value.error_class == "CommandNotFound"


async def test_a_transaction_is_all_or_none_and_an_empty_one_is_nothing(vm: RunningQemu) -> None:
    async with connect(vm.qmp) as qmp:
        await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "n0", "size": 1 << 20})
        add = {"type": "block-dirty-bitmap-add", "data": {"node": "n0", "name": "one"}}
        with pytest.raises(QmpCommandError):
            await qmp.transaction([add, {"type": "block-dirty-bitmap-add", "data": {"node": "n9", "name": "one"}}])
        await qmp.transaction([])
        assert await vm.bitmaps("n0") == []
        await qmp.transaction([add])
        assert [bitmap["name"] for bitmap in await vm.bitmaps("n0")] == ["one"]


async def test_cancelled_commands_leave_the_session_usable(vm: RunningQemu) -> None:
    async with connect(vm.qmp) as qmp:
        cancelled = 0
        for round_ in range(20):
            with trio.move_on_after(0.0005 * round_) as scope:
                await qmp.execute("query-qmp-schema")
            cancelled += scope.cancelled_caught
            assert (await qmp.execute("query-status"))["running"] is False
        assert cancelled


async def test_many_commands_at_once_get_their_own_answers(vm: RunningQemu) -> None:
    async with connect(vm.qmp) as qmp:
        for number in range(10):
            await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": f"n{number}", "size": 512 << number})

        async def look(number: int) -> None:
            nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
            sizes = {node["node-name"]: node["image"]["virtual-size"] for node in nodes}
            assert sizes[f"n{number}"] == 512 << number

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(look, number)


async def test_qemu_killed_under_a_command_is_a_lost_session_and_leaves_nothing(vm: RunningQemu) -> None:
    tasks = trio.lowlevel.current_statistics().tasks_living
    with pytest.raises(QmpLostError, match="the connection is lost"):
        async with connect(vm.qmp) as qmp:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vm.kill)
                with pytest.raises(QmpLostError):
                    while True:
                        await qmp.execute("query-qmp-schema")
            await qmp.execute("query-status")
    gc.collect()  # a forgotten task or socket would warn, and a warning fails
    assert trio.lowlevel.current_statistics().tasks_living == tasks


async def test_errors_of_the_block_come_out_as_they_are(vm: RunningQemu) -> None:
    for error in (KeyError("mine"), ExceptionGroup("many", [ValueError("one")])):
        with pytest.raises(type(error)) as caught:
            async with connect(vm.qmp):
                raise error
        assert caught.value is error


async def test_shielded_clean_up_can_use_the_session_of_a_cancelled_block(vm: RunningQemu) -> None:
    answered = False
    with trio.CancelScope() as scope:
        async with connect(vm.qmp) as qmp:
            scope.cancel()
            try:
                await trio.sleep_forever()
            finally:
                with trio.fail_after(60, shield=True):
                    await qmp.execute("query-status")
                    answered = True
    assert answered
    assert scope.cancelled_caught


async def test_a_second_client_is_told_who_holds_the_socket(vm: RunningQemu) -> None:
    async with connect(vm.qmp):
        with pytest.raises(QmpConnectError, match=r"no greeting within 0\.2 s: another client holds the socket"):
            async with connect(vm.qmp, timeout_s=0.2):
                pass
    async with connect(vm.qmp) as qmp:
        await qmp.execute("query-status")


async def test_a_qemu_that_is_stopped_is_told_from_one_that_another_client_holds(vm: RunningQemu) -> None:
    os.kill(vm.pid, signal.SIGSTOP)
    try:
        await until(Peer(vm.pid, 0, 0, None).stopped)
        with pytest.raises(QmpConnectError, match=rf"its process {vm.pid} is stopped; kill -CONT"):
            async with connect(vm.qmp, timeout_s=0.2):
                pass
    finally:
        os.kill(vm.pid, signal.SIGCONT)
    async with connect(vm.qmp) as qmp:
        await qmp.execute("query-status")


async def test_who_greets_and_then_says_nothing_is_told() -> None:
    async with ScriptedQmp({"qmp_capabilities": SILENCE}).serving() as path:
        with pytest.raises(QmpConnectError, match=r"it greets, and does not answer within 0\.3 s"):
            async with connect(path, timeout_s=0.3):
                pass


async def test_sessions_nest_and_end_in_any_order(qemu: QemuBinary) -> None:
    async with RunningQemu.start(qemu, []) as one, RunningQemu.start(qemu, []) as two:
        ended = trio.Event()

        async def first() -> None:
            async with connect(one.qmp) as qmp:
                await ended.wait()
                await qmp.execute("query-status")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            async with connect(two.qmp) as qmp:
                await qmp.execute("query-status")
            ended.set()


async def test_files_are_passed_to_qemu_as_descriptors(vm: RunningQemu, tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(1 << 20))
    async with connect(vm.qmp) as qmp:
        with image.open("r+b") as file:
            name = await qmp.add_fd(file.fileno())
        await qmp.execute("blockdev-add", {"driver": "file", "node-name": "f0", "filename": name})
        await qmp.remove_fd_set(name)
        assert "f0" in await vm.nodes()
        await qmp.execute("blockdev-del", {"node-name": "f0"})
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "nbd"))
            listener.listen()
            await qmp.get_fd(listener.fileno(), "server")
        await qmp.execute("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "server"}}})
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(tmp_path / "nbd"))
            assert client.recv(8) == b"NBDMAGIC"


async def test_polling_ends_with_the_wanted_answer_or_in_time(vm: RunningQemu) -> None:
    async with connect(vm.qmp) as qmp:
        looks = iter([False, False, True])
        answer = await qmp.poll("query-status", lambda _: next(looks), timeout_s=5, interval_s=0.01)
        assert list(looks) == []
        assert answer["status"] == "prelaunch"
        with pytest.raises(QmpTimeoutError, match=r"not done within 0\.1 s"):
            await qmp.poll("query-status", lambda status: status["running"], timeout_s=0.1)


@pytest.mark.parametrize("name", ["none.sock", "long" * 40])
async def test_a_missing_socket_is_named_whatever_its_length(tmp_path: Path, name: str) -> None:
    with pytest.raises(QmpConnectError, match=f"{name}: No such file or directory; is the VM running"):
        async with connect(tmp_path / name):
            pass


async def test_a_path_too_long_for_a_socket_address_still_connects(vm: RunningQemu, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    (folder / "qmp").symlink_to(vm.qmp)
    async with connect(folder / "qmp") as qmp:
        await qmp.execute("query-status")


async def test_a_socket_without_listener_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "dead"))
    with pytest.raises(QmpConnectError, match="Connection refused"):
        async with connect(tmp_path / "dead"):
            pass


async def test_a_full_queue_of_clients_is_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "busy")
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as stack:
        listener.bind(path)
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            try:
                client.connect(path)
            except BlockingIOError:
                break
        else:
            pytest.fail("the queue never filled")
        with pytest.raises(QmpConnectError, match="another client holds the socket"):
            async with connect(path, timeout_s=0.2):
                pass


@pytest.mark.parametrize(
    ("greeting", "message"),
    [
        (HANG_UP, "closed the connection without a greeting"),
        (Raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "does not speak QMP"),
        (Raw(b'{"QMP": 1}\n'), "does not speak QMP"),
        (Raw(b"[" * 100_000 + b"\n"), "does not speak QMP"),
        (Raw(b'{"QMP": {"version": {}, "capabilities": []}}\n', close=True), "closed the connection|Broken pipe|reset"),
        (SILENCE, "no greeting within 0.3 s"),
    ],
    ids=["hangs-up", "other-protocol", "wrong-type", "deep", "closes-later", "silent"],
)
async def test_what_is_no_greeting_is_told(greeting: Raw, message: str) -> None:
    async with ScriptedQmp(greeting=greeting).serving() as path:
        with pytest.raises(QmpConnectError, match=message):
            async with connect(path, timeout_s=0.3):
                pass


@pytest.mark.parametrize("hang_ups", [["connect"], ["qmp_capabilities", "connect"], ["query-version"]])
async def test_a_connection_that_ends_before_it_was_used_is_made_again(hang_ups: list[str]) -> None:
    # Seen with QEMU 10.0: once in a thousand times it closed the connection that followed a former one at once.
    async with ScriptedQmp(hang_ups=hang_ups).serving() as path, connect(path) as qmp:
        assert qmp.version == (8, 2, 2)
        assert not hang_ups


async def test_a_connection_that_is_lost_in_use_is_not_made_again() -> None:
    qemu = ScriptedQmp({"query-block": HANG_UP})
    async with qemu.serving() as path:
        with pytest.raises(QmpLostError):
            async with connect(path) as qmp:
                await qmp.execute("query-block")
    assert [command for command, _ in qemu.seen].count("query-block") == 1


async def test_an_endless_answer_ends_the_session_not_the_memory() -> None:
    endless = Raw(b'{"return": "' + b"x" * (40 << 20))
    async with ScriptedQmp({"query-block": endless}).serving() as path, connect(path) as qmp:
        with pytest.raises(QmpLostError):
            await qmp.execute("query-block")


@pytest.mark.parametrize(
    "answer",
    [
        b"no json\n",
        b"[1, 2]\n",
        b'{"id": @ID@}\n',
        b'{"id": @ID@, "error": "oh"}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
    ],
    ids=["text", "list", "no-result", "odd-error", "no-utf8", "deep"],
)
async def test_nonsense_for_an_answer_is_an_error(answer: bytes) -> None:
    async with ScriptedQmp({"query-block": Raw(answer)}).serving() as path, connect(path) as qmp:
        with pytest.raises((QmpAnswerError, QmpLostError)):
            await qmp.execute("query-block")


async def test_floods_of_events_and_answers_nobody_waits_for_are_dropped() -> None:
    noise = b'{"event": "RESUME", "timestamp": {"seconds": 0, "microseconds": 0}}\n{"return": 1, "id": "stranger"}\n'
    double = ScriptedQmp({"query-block": Raw(noise * 1000 + b'{"return": [], "id": @ID@}\n')})
    async with double.serving() as path, connect(path) as qmp:
        assert await qmp.execute("query-block") == []


async def test_a_command_without_answer_times_out_and_the_session_goes_on() -> None:
    double = ScriptedQmp({"query-block": SILENCE, "query-status": {"status": "running"}})
    async with double.serving() as path, connect(path) as qmp:
        with pytest.raises(QmpTimeoutError, match=r"cannot run query-block in .*: no answer within 0\.1 s"):
            await qmp.execute("query-block", timeout_s=0.1)
        assert await qmp.execute("query-status") == {"status": "running"}


@pytest.mark.parametrize(
    "version",
    [[], {}, {"qemu": {"major": "8", "minor": 0, "micro": 0}}, {"qemu": {"major": True, "minor": 0, "micro": 0}}],
)
async def test_a_version_of_another_form_is_an_error(version: object) -> None:
    async with ScriptedQmp({"query-version": version}).serving() as path:
        with pytest.raises(QmpAnswerError, match="query-version"):
            async with connect(path):
                pass


async def test_a_refused_introduction_is_an_error_of_its_own() -> None:
    async with ScriptedQmp({"query-commands": Refusal("not here")}).serving() as path:
        with pytest.raises(QmpCommandError, match="not here"):
            async with connect(path):
                pass
