import contextlib
import os
import resource
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from hypervisor import freeze_child, guest_agent
from hypervisor.guest_agent import Freeze, frozen, thaw_leftover
from tests.support.cache import ROOT
from tests.support.scripted_qmp import HANG_UP, SILENCE, Raw, Refusal, ScriptedAgent

THAW = "guest-fsfreeze-thaw"
FREEZE = "guest-fsfreeze-freeze"

#: A time to stay frozen that is soon over, yet long enough for an answer on a busy machine.
SHORT_S = 1.5


def child_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str, instead: str) -> None:
    """Let the child have another constant: as a process of its own it knows nothing of a patch."""
    script = Path(freeze_child.__file__).read_text()
    assert script.count(f"\n{constant}\n") == 1
    changed = tmp_path / "child.py"
    changed.write_text(script.replace(constant, instead))
    monkeypatch.setattr(freeze_child, "__file__", str(changed))


async def test_the_guest_is_frozen_inside_the_block_and_only_there() -> None:
    agent = ScriptedAgent(file_systems=3)
    async with agent.serving() as path:
        began = trio.current_time()
        async with frozen(path) as freeze:
            assert agent.frozen
            assert freeze.file_systems == 3
            await trio.sleep(0.2)
        assert not agent.frozen
        assert freeze.done
        assert 0.2 <= freeze.frozen_s <= trio.current_time() - began
        assert freeze.warnings == []
        await agent.until("closed")


async def test_only_chosen_mount_points_are_frozen_and_missing_ones_are_told() -> None:
    agent = ScriptedAgent(file_systems=2)
    async with agent.serving() as path:
        async with frozen(path, mount_points=["/srv", "/var/lib/a b"]) as freeze:
            assert agent.frozen
            assert freeze.holding
        assert agent.chosen == ["/srv", "/var/lib/a b"]
        assert "guest-fsfreeze-freeze" not in agent.seen
        assert (freeze.file_systems, freeze.warnings) == (2, [])
        async with frozen(path, mount_points=["/", "/srv", "/gone"]) as freeze:
            pass
        assert not agent.frozen
        assert freeze.warnings == ["the guest agent has frozen 2 of the 3 mount points that are chosen"]


async def test_an_agent_that_cannot_choose_mount_points_is_a_warning() -> None:
    agent = ScriptedAgent(answers={"guest-fsfreeze-freeze-list": Refusal("no such command", "CommandNotFound")})
    async with agent.serving() as path, frozen(path, mount_points=["/srv"]) as freeze:
        assert not freeze.holding
    assert not freeze.done
    assert "no such command" in freeze.warnings[0]


async def test_without_a_socket_nothing_happens() -> None:
    async with frozen(None) as freeze:
        pass
    assert freeze == Freeze()
    assert not freeze.done


async def test_an_error_in_the_block_thaws_and_comes_out() -> None:
    agent = ScriptedAgent()
    async with agent.serving() as path:
        with pytest.raises(KeyError, match="mine"):
            async with frozen(path):
                raise KeyError("mine")
        assert not agent.frozen


async def test_cancellation_of_the_block_thaws_before_it_goes_on() -> None:
    agent = ScriptedAgent()
    async with agent.serving() as path:
        with trio.CancelScope() as scope:
            async with frozen(path):
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert agent.seen.count(THAW) == 1
        assert not agent.frozen


async def test_cancellation_while_the_agent_is_freezing_thaws_too() -> None:
    agent = ScriptedAgent(freeze_s=0.6)
    async with agent.serving() as path:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await agent.until(FREEZE)
                scope.cancel()

            nursery.start_soon(cancel)
            with trio.CancelScope() as scope:
                async with frozen(path):
                    pytest.fail("the block must not run")
        assert scope.cancelled_caught
        assert agent.seen.count(FREEZE) == 1
        assert not agent.frozen


_PARENT = """
import sys, trio
from hypervisor.guest_agent import frozen

async def main():
    async with frozen(sys.argv[1], hold_s=60):
        print("frozen", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_killed_between_freeze_and_thaw_the_child_thaws(number: signal.Signals) -> None:
    agent = ScriptedAgent()
    async with agent.serving() as path:
        command = [sys.executable, "-c", _PARENT, str(path)]
        parent = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, cwd=ROOT)
        assert parent.stdout is not None
        async with parent.stdout:
            with trio.fail_after(60):
                said = b""
                while not said.endswith(b"\n"):  # in pieces, where Python's output is not buffered
                    piece = await parent.stdout.receive_some()
                    assert piece
                    said += piece
                assert said == b"frozen\n"
            assert agent.frozen
            parent.send_signal(number)
            await parent.wait()
        await agent.until(THAW)  # long before the time is over that it may stay frozen
        await agent.until("closed")
        assert not agent.frozen


async def test_signals_to_the_whole_group_do_not_end_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests have children like it, at the same time.
    monkeypatch.setenv("FLEECE_TEST_MARK", mark := secrets.token_hex(16))
    agent = ScriptedAgent()
    async with agent.serving() as path, frozen(path) as freeze:
        (pid,) = [pid for pid in _processes() if f"FLEECE_TEST_MARK={mark}".encode() in _environment(pid)]
        assert os.getsid(pid) != os.getsid(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        await trio.sleep(0.1)
        assert agent.frozen
    assert freeze.done
    assert not agent.frozen


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


async def test_a_block_that_takes_too_long_is_thawed_under_it() -> None:
    agent = ScriptedAgent()
    async with agent.serving() as path:
        began = trio.current_time()
        async with frozen(path, hold_s=SHORT_S) as freeze:
            await agent.until(THAW)
            await agent.until("closed")
            assert not agent.frozen
        assert freeze.done
        assert SHORT_S <= freeze.frozen_s <= trio.current_time() - began
        assert len(freeze.warnings) == 1
        assert f"thawed after {SHORT_S} s, before all disks were switched" in freeze.warnings[0]


async def test_a_thaw_after_the_instant_is_no_loss_although_the_block_goes_on() -> None:
    agent = ScriptedAgent()
    async with agent.serving() as path:
        async with frozen(path, hold_s=SHORT_S) as freeze:
            freeze.serve()
            await agent.until("closed")  # copies of other things take longer than the guest may wait
        assert freeze.done
        assert freeze.warnings == []


async def test_an_instant_after_the_thaw_is_told() -> None:
    agent = ScriptedAgent()
    async with agent.serving() as path:
        async with frozen(path, hold_s=SHORT_S) as freeze:
            await agent.until("closed")
            freeze.serve()
        assert [warning for warning in freeze.warnings if "before all disks were switched" in warning]


async def test_a_child_that_does_not_start_is_ended_and_the_guest_not_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "child.py"
    script.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(freeze_child, "__file__", str(script))
    monkeypatch.setattr(guest_agent, "_START_TIMEOUT_S", 0.2)
    agent = ScriptedAgent()
    async with agent.serving() as path:
        async with frozen(path) as freeze:
            assert not agent.frozen
        assert freeze.warnings == [
            "the process that freezes the guest does not start: backed up without freezing the guest's file systems"
        ]
        assert agent.seen.count(FREEZE) == 0
    assert not any(str(script).encode() in _cmdline(pid) for pid in _processes())


async def test_a_freeze_that_takes_too_long_is_given_up_and_thawed() -> None:
    agent = ScriptedAgent(freeze_s=1.0)
    async with agent.serving() as path:
        async with frozen(path, hold_s=0.3) as freeze:
            assert "no answer from the agent in time" in freeze.warnings[0]
            assert not agent.frozen
        assert not freeze.done
        assert (freeze.file_systems, freeze.frozen_s, len(freeze.warnings)) == (0, 0.0, 1)


async def test_a_freeze_left_by_an_earlier_run_is_ended_first() -> None:
    agent = ScriptedAgent(frozen=True)
    async with agent.serving() as path:
        async with frozen(path) as freeze:
            assert agent.frozen
        assert agent.seen.index(THAW) < agent.seen.index(FREEZE)
        assert freeze.done
        assert freeze.warnings == ["the guest was still frozen by an earlier run; it has been thawed"]
        await agent.until("closed")

        agent.frozen = True
        assert await thaw_leftover(path) == ["the guest was still frozen by an earlier run; it has been thawed"]
        assert not agent.frozen
        await agent.until("closed", times=2)
        assert await thaw_leftover(path) == []
        assert agent.seen.count(FREEZE) == 1


async def test_noise_of_an_earlier_client_is_skipped() -> None:
    agent = ScriptedAgent(noise=b'{"return": "half an ans\xff{"return": 17}\n{"return": 12\xff\n\xff\xff[]\n' * 50)
    async with agent.serving() as path:
        async with frozen(path) as freeze:
            assert agent.frozen
        assert freeze.done
        assert not agent.frozen


async def test_no_listener_is_a_warning(tmp_path: Path) -> None:
    async with frozen(tmp_path / "none") as freeze:
        pass
    assert freeze.warnings == [
        f"no connection to the guest agent at {tmp_path / 'none'}: No such file or directory: "
        "backed up without freezing the guest's file systems"
    ]
    assert await thaw_leftover(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("answers", "warning"),
    [
        ({FREEZE: Refusal("The command guest-fsfreeze-freeze has been disabled")}, "has been disabled"),
        ({FREEZE: Refusal("no"), THAW: Refusal("nor this")}, "the agent says 'no'"),
        ({FREEZE: "two"}, "no number of file systems"),
        ({FREEZE: True}, "no number of file systems"),
        ({FREEZE: -1}, "no number of file systems"),
        ({FREEZE: 10**30}, "no number of file systems"),
        ({FREEZE: Raw(b"[]\n")}, "no JSON object"),
        ({FREEZE: Raw(b"\x00\x01\n")}, "is no JSON"),
        ({FREEZE: Raw(b"[" * 50_000 + b"\n")}, "is no JSON"),
        ({FREEZE: Raw(b'{"error": {"desc": 5}}\n')}, "has no result"),
        ({FREEZE: Raw(b"x" * 1_000_000)}, "is longer than 65536 bytes"),
        ({FREEZE: HANG_UP}, "the agent's socket is"),
        ({"guest-sync-delimited": HANG_UP}, "the agent's socket is"),
        ({"guest-fsfreeze-status": Raw(b"?\n")}, "is no JSON"),
    ],
)
async def test_an_agent_that_does_not_do_as_told_is_a_warning(answers: dict[str, Any], warning: str) -> None:
    agent = ScriptedAgent(answers)
    async with agent.serving() as path:
        async with frozen(path) as freeze:
            assert not agent.frozen
        assert not freeze.done
        assert freeze.file_systems == 0
        assert len(freeze.warnings) == 1
        assert warning in freeze.warnings[0]
        assert freeze.warnings[0].endswith("backed up without freezing the guest's file systems")
        await agent.until("closed")


async def test_an_agent_without_status_command_still_freezes() -> None:
    agent = ScriptedAgent({"guest-fsfreeze-status": Refusal("not found", "CommandNotFound")})
    async with agent.serving() as path:
        async with frozen(path) as freeze:
            assert agent.frozen
        assert freeze.done
        assert freeze.warnings == []


async def test_a_guest_without_agent_costs_no_more_than_its_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_with(tmp_path, monkeypatch, "SYNC_TIMEOUT_S: Final = 5.0", "SYNC_TIMEOUT_S: Final = 0.5")
    agent = ScriptedAgent({"guest-sync-delimited": SILENCE})
    async with agent.serving() as path:
        async with frozen(path) as freeze:
            pass
        assert "no answer from the agent in time" in freeze.warnings[0]
        assert agent.seen[0] == "guest-sync-delimited"
        assert FREEZE not in agent.seen


async def test_a_vm_that_ends_while_frozen_is_a_warning() -> None:
    agent = ScriptedAgent({THAW: HANG_UP})
    async with agent.serving() as path:
        async with frozen(path) as freeze:
            assert agent.frozen
        assert len(freeze.warnings) == 1
        assert "lost while the guest was frozen" in freeze.warnings[0]


async def test_a_first_thaw_that_is_not_answered_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child_with(tmp_path, monkeypatch, "THAW_TIMEOUT_S: Final = 5.0", "THAW_TIMEOUT_S: Final = 1.0")
    agent = ScriptedAgent()
    tries = iter([SILENCE])

    def thaw(_: object) -> object:
        silent = next(tries, None)
        if silent is None:
            agent.frozen = False
        return silent if silent is not None else 2

    agent.answers[THAW] = thaw
    async with agent.serving() as path:
        async with frozen(path) as freeze:
            pass
        assert not agent.frozen
        assert freeze.done
        assert freeze.frozen_s > 1.0
        assert agent.seen.count(THAW) == 2


async def test_the_child_starts_quickly_and_ends_by_itself() -> None:
    agent = ScriptedAgent()
    async with agent.serving() as path:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        async with frozen(path):
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            # Time on the processor, whatever else the machine is doing: 0.03 s up to its detachment.
            assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
        await agent.until("closed")


class Chatterbox:
    """A socket on which there is always something to read, and never what was asked for."""

    def __init__(self) -> None:
        self._zeros = os.open("/dev/zero", os.O_RDWR)
        self._ends = time.monotonic() + 20

    def fileno(self) -> int:
        return self._zeros

    def send(self, data: bytes) -> int:
        return len(data)

    def recv(self, size: int) -> bytes:
        assert time.monotonic() < self._ends, "nobody looks at the clock"
        return bytes(size)

    def close(self) -> None:
        os.close(self._zeros)


def test_an_agent_that_never_stops_talking_costs_no_more_than_a_silent_one() -> None:
    with contextlib.closing(Chatterbox()) as agent, pytest.raises(freeze_child.AgentError, match="in time"):
        freeze_child.Agent(agent).sync(0.2)  # type: ignore[arg-type]  # all that it uses
