"""Freezing the guest's file systems around the instant of a backup, through QEMU's guest agent.

The freeze belongs to a small child process (`freeze_child.py`) that holds the agent's socket and thaws as soon as the
block is left, this process dies, or 10 s have passed. A guest without agent, or with one that does not do as it is
told, is backed up without a freeze, and the report says so. docs/hypervisor.md, "Freezing the guest".
"""

import json
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, Final

import trio

from core.errors import os_reason
from hypervisor import freeze_child
from hypervisor.domain_address import DomainAddress
from hypervisor.unix_socket import connect_unix

#: Seconds a guest may stay frozen, from the order to freeze to the order to thaw.
HOLD_S: Final = 10.0
#: Seconds to connect to the agent's socket; a full queue means that others wait there too.
_CONNECT_TIMEOUT_S: Final = 5.0
#: Seconds for the child to start and go to the background; it needs milliseconds, but its files may lie on a disk that
#: hangs.
_START_TIMEOUT_S: Final = 10.0
#: Seconds for a killed child to be gone.
_KILL_TIMEOUT_S: Final = 1.0
#: Seconds for the child to say whether the guest is frozen: sync, status, and perhaps an earlier freeze to be ended.
_FREEZE_TIMEOUT_S: Final = 60.0
#: Seconds to wait for the thaw. The child goes on trying when this process does not wait any more.
_THAW_TIMEOUT_S: Final = 15.0


@dataclass(slots=True)
class Freeze:
    """What became of a freeze; complete when the block of `frozen` has been left."""

    holding: bool = False  #: the agent has said that the file systems are frozen
    served: float | None = None  #: `time.monotonic()` when `serve` was called
    file_systems: int = 0  #: frozen ones; 0 too if nothing was frozen
    frozen_s: float = 0.0  #: seconds from freeze sent to thaw answered; 0 if nothing was frozen
    warnings: list[str] = field(default_factory=list)  #: sentences for the report

    @property
    def done(self) -> bool:
        """True if the guest was frozen (even if it has no file system to freeze)."""
        return self.frozen_s > 0

    def serve(self) -> None:
        """What the guest had to be frozen for is done: a thaw from now on, before the end of the block, is no loss."""
        self.served = time.monotonic()


@asynccontextmanager
async def frozen(
    socket_path: str | os.PathLike[str] | None, *, mount_points: Sequence[str] = (), hold_s: float = HOLD_S
) -> AsyncIterator[Freeze]:
    """The guest's file systems are frozen while the block runs, at most `hold_s` seconds; without a path nothing is.

    With `mount_points` only those that are mounted there, else all.

    Thawed when the block ends in whatever way, cancellation included, and if this process is killed. Never fails a
    backup: what goes wrong stands in `warnings`, some of it only after the block.
    """
    freeze = Freeze()
    async with AsyncExitStack() as stack:
        child = None
        if socket_path is not None:
            child = await _begin(stack, os.fspath(socket_path), hold_s, freeze, mount_points=mount_points)
        try:
            if child is not None:
                await _wait_frozen(child, freeze, len(mount_points))
            yield freeze
        finally:
            if child is not None:
                with trio.move_on_after(_THAW_TIMEOUT_S, shield=True):
                    await _thaw(child, hold_s, freeze)


async def thaw_leftover(socket_path: str | os.PathLike[str]) -> list[str]:
    """Thaw a guest that an earlier run has left frozen; returns what is to be reported, mostly nothing.

    An agent that does not answer is no reason for a report: the freeze will say it.
    """
    freeze = Freeze()
    async with AsyncExitStack() as stack:
        child = await _begin(stack, os.fspath(socket_path), 0, freeze, mode="thaw")
        if child is None:
            return []
        with trio.move_on_after(_FREEZE_TIMEOUT_S):
            event = await child.event()
            if event.get("was-frozen"):
                return ["the guest was still frozen by an earlier run; it has been thawed"]
            if event.get("event") == "stuck":
                return [f"the guest is frozen and cannot be thawed: {event.get('why')}"]
    return []


class _Child:
    """The two pipes to a running child."""

    def __init__(self, stdin: trio.abc.SendStream, stdout: trio.abc.ReceiveStream) -> None:
        self._stdin, self._stdout = stdin, stdout
        self._received = b""

    async def event(self) -> dict[str, Any]:
        """The next thing it tells; `{}` when it has ended."""
        while b"\n" not in self._received:
            data = await self._stdout.receive_some(4096)
            if not data:
                return {}
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    async def let_go(self) -> None:
        """Make it thaw."""
        await self._stdin.aclose()


async def _begin(
    stack: AsyncExitStack,
    path: str,
    hold_s: float,
    freeze: Freeze,
    *,
    mode: str = "freeze",
    mount_points: Sequence[str] = (),
) -> _Child | None:
    if DomainAddress.parse(path) is not None:
        # libvirt's bindings are no part of the standard library, but nothing of the environment is needed either.
        arguments = ["-I", "-m", "hypervisor.freeze_domain", mode, path, str(hold_s), *mount_points]
        return await _start(stack, arguments, (), freeze)
    try:
        with trio.fail_after(_CONNECT_TIMEOUT_S):
            sock = await connect_unix(path)
    except OSError as error:
        freeze.warnings.append(_without(f"no connection to the guest agent at {path}: {os_reason(error)}"))
        return None
    except trio.TooSlowError:
        freeze.warnings.append(_without(f"the guest agent's socket {path} is in use"))
        return None
    with sock:
        # -I -S: nothing of the environment and no site-packages, for a start within 20 ms.
        arguments = ["-I", "-S", str(Path(freeze_child.__file__)), mode, str(sock.fileno()), str(hold_s)]
        arguments += mount_points
        return await _start(stack, arguments, [sock.fileno()], freeze)


async def _start(
    stack: AsyncExitStack, arguments: Sequence[str], descriptors: Sequence[int], freeze: Freeze
) -> _Child | None:
    # Half a child would be nobody's.
    with trio.move_on_after(_START_TIMEOUT_S, shield=True) as starting:
        process = await trio.lowlevel.open_process(
            [sys.executable, *arguments],
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,  # whoever reads ours must not have to wait for the child's end
            pass_fds=descriptors,
            start_new_session=True,
            cwd="/",
        )
        assert process.stdin is not None
        assert process.stdout is not None
        child = _Child(process.stdin, process.stdout)
        await stack.enter_async_context(process.stdout)
        await stack.enter_async_context(process.stdin)
        await process.wait()  # it has gone on in the background by itself
    if starting.cancelled_caught:
        process.kill()
        with trio.move_on_after(_KILL_TIMEOUT_S, shield=True):
            await process.wait()
        freeze.warnings.append(_without("the process that freezes the guest does not start"))
        return None
    return child


async def _wait_frozen(child: _Child, freeze: Freeze, chosen: int) -> None:
    with trio.move_on_after(_FREEZE_TIMEOUT_S):
        event = await child.event()
        if event.get("was-frozen"):
            freeze.warnings.append("the guest was still frozen by an earlier run; it has been thawed")
        match event.get("event"):
            case "frozen":
                freeze.file_systems = event["file-systems"]
                freeze.holding = True
                if freeze.file_systems < chosen:
                    freeze.warnings.append(
                        f"the guest agent has frozen {freeze.file_systems} of the {chosen} mount points that are chosen"
                    )
                return
            case "stuck":
                freeze.warnings.append(_stuck(event))
            case "failed":
                freeze.warnings.append(_without(event["why"]))
            case _:
                freeze.warnings.append(_without("the process that freezes the guest has ended"))
        return
    freeze.warnings.append(_without("the guest agent is too slow"))


async def _thaw(child: _Child, hold_s: float, freeze: Freeze) -> None:
    await child.let_go()
    while event := await child.event():
        match event.get("event"):
            case "thawed":
                freeze.frozen_s = event["frozen-s"]
                if event["early"] and not (freeze.served is not None and freeze.served <= event["at"]):
                    freeze.warnings.append(
                        f"the guest was thawed after {hold_s:g} s, before all disks were switched: "
                        "its file systems are only as consistent as after a power cut"
                    )
                return
            case "frozen":  # the block never ran: cancelled while the agent was freezing
                freeze.file_systems = event["file-systems"]
            case "failed":
                freeze.warnings.append(f"the guest agent was lost while the guest was frozen: {event['why']}")
            case "stuck":
                freeze.warnings.append(_stuck(event))
                return


def _without(why: str) -> str:
    return f"{why}: backed up without freezing the guest's file systems"


def _stuck(event: dict[str, Any]) -> str:
    return f"the guest may still be frozen, thawing goes on in the background: {event.get('why')}"
