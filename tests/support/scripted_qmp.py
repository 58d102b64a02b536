"""Doubles of QEMU's control socket and of the guest agent, which say whatever a test wants, nonsense included.

`ScriptedQmp` serves answers by command name; `ScriptedAgent` plays a guest that can be frozen. Both listen on a real
unix socket while their `serving` block runs and keep what they were told.
"""

import json
import shutil
import socket
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

GREETING: Final = {
    "QMP": {"version": {"qemu": {"major": 8, "minor": 2, "micro": 2}, "package": ""}, "capabilities": []}
}

#: Commands of a stock QEMU that Fleece looks for.
STOCK_COMMANDS: Final = (
    "block-dirty-bitmap-add",
    "block-export-add",
    "block-export-del",
    "blockdev-add",
    "blockdev-del",
    "blockdev-reopen",
    "nbd-server-start",
    "nbd-server-stop",
    "qom-set",
    "query-block-exports",
    "query-iothreads",
    "query-named-block-nodes",
    "transaction",
    "x-debug-query-block-graph",
)


@dataclass(frozen=True)
class Refusal:
    """QEMU's error as an answer."""

    desc: str
    error_class: str = "GenericError"


@dataclass(frozen=True)
class Raw:
    """Bytes sent as they are; with `close` the connection ends after them."""

    data: bytes
    close: bool = False


SILENCE: Final = Raw(b"")  #: no answer at all
HANG_UP: Final = Raw(b"", close=True)

Answer = Any  #: a JSON value, `Refusal`, `Raw`, or a function from the arguments to one of them


@asynccontextmanager
async def _listening(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fleece-", dir="/tmp"))
    failure = None
    try:
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            await listener.bind(str(folder / "socket"))
            listener.listen(1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, handler, [trio.SocketListener(listener)])
                try:
                    yield folder / "socket"
                except Exception as error:
                    failure = error  # not in the group that a nursery makes
                nursery.cancel_scope.cancel()
    finally:
        shutil.rmtree(folder)
    if failure is not None:
        raise failure


async def _requests(stream: trio.SocketStream) -> AsyncGenerator[dict[str, Any], None]:
    """JSON objects one after the other, with or without line ends between them; what lies between them is skipped."""
    received = ""
    while True:
        try:
            data = await stream.receive_some(65536)
        except trio.BrokenResourceError:
            return
        if not data:
            return
        received += data.decode("latin-1")
        while (start := received.find("{")) >= 0:
            try:
                request, end = json.JSONDecoder().raw_decode(received, start)
            except ValueError:
                break  # not all of it has come
            received = received[end:]
            yield request


@dataclass
class ScriptedQmp:
    """A QEMU that answers from a table; unknown commands are refused as QEMU refuses them."""

    answers: dict[str, Answer] = field(default_factory=dict)
    greeting: Answer = field(default_factory=lambda: GREETING)
    hang_ups: list[str] = field(default_factory=list)  #: where the first connections end: "connect" or a command
    version: tuple[int, int, int] = (8, 2, 2)
    commands: list[str] = field(default_factory=lambda: list(STOCK_COMMANDS))
    seen: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)  #: commands after the negotiation

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Path]:
        """Listen while the block runs; gives the socket's path."""
        async with _listening(self._serve) as path:
            yield path

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            end_at = self.hang_ups.pop(0) if self.hang_ups else None
            if end_at != "connect" and await self._send(stream, self.greeting, {}):
                async with aclosing(_requests(stream)) as requests:
                    async for request in requests:
                        if request["execute"] == end_at or not await self._obey(stream, request):
                            return

    async def _obey(self, stream: trio.SocketStream, request: dict[str, Any]) -> bool:
        command, arguments = request["execute"], request.get("arguments", {})
        answer: Answer
        if command in self.answers:
            answer = self.answers[command]
        elif command == "qmp_capabilities":
            answer = {}
        elif command == "query-version":
            answer = {"qemu": dict(zip(("major", "minor", "micro"), self.version, strict=True)), "package": ""}
        elif command == "query-commands":
            answer = [{"name": name} for name in self.commands]
        else:
            answer = Refusal(f"The command {command} has not been found", "CommandNotFound")
        if command != "qmp_capabilities":
            self.seen.append((command, arguments))
        if callable(answer):
            answer = answer(arguments)
        if isinstance(answer, Refusal):
            answer = Raw(
                json.dumps(
                    {"error": {"class": answer.error_class, "desc": answer.desc}, "id": request.get("id")}
                ).encode()
                + b"\n"
            )
        elif not isinstance(answer, Raw):
            answer = {"return": answer, "id": request.get("id")}
        return await self._send(stream, answer, request)

    async def _send(self, stream: trio.SocketStream, answer: Answer, request: Mapping[str, Any]) -> bool:
        raw = answer if isinstance(answer, Raw) else Raw(json.dumps(answer).encode() + b"\n")
        try:
            await stream.send_all(raw.data.replace(b"@ID@", json.dumps(request.get("id")).encode()))
        except trio.BrokenResourceError:
            return False
        return not raw.close


@dataclass
class ScriptedAgent:
    """A guest agent whose guest can be frozen; `answers` overrides what it says to a command."""

    answers: dict[str, Answer] = field(default_factory=dict)
    file_systems: int = 2
    frozen: bool = False
    freeze_s: float = 0.0  #: seconds that freezing takes; nothing else is heard meanwhile
    noise: bytes = b""  #: sent before the answer to each sync, as left by an earlier client
    chosen: list[str] = field(default_factory=list)  #: mount points that were to be frozen, if not all
    seen: list[str] = field(default_factory=list)  #: commands, and `closed` for the end of each connection

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Path]:
        """Listen while the block runs; gives the socket's path."""
        async with _listening(self._serve) as path:
            yield path

    async def until(self, event: str, *, times: int = 1, timeout_s: float = 30) -> None:
        """Wait until `event` stands in `seen` that often."""
        with trio.fail_after(timeout_s):
            while self.seen.count(event) < times:  # noqa: ASYNC110 - the list is a test's to change as well
                await trio.sleep(0.01)

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream, aclosing(_requests(stream)) as requests:
            async for request in requests:
                command = request["execute"]
                self.seen.append(command)
                answer = await self._answer(command, request)
                if isinstance(answer, Raw):
                    data = answer.data
                elif isinstance(answer, Refusal):
                    data = json.dumps({"error": {"class": answer.error_class, "desc": answer.desc}}).encode() + b"\n"
                else:
                    data = json.dumps({"return": answer}).encode() + b"\n"
                    if command == "guest-sync-delimited":
                        data = self.noise + b"\xff" + data
                try:
                    await stream.send_all(data)
                except trio.BrokenResourceError:
                    break
                if isinstance(answer, Raw) and answer.close:
                    break
        self.seen.append("closed")

    async def _answer(self, command: str, request: Mapping[str, Any]) -> Answer:
        if command in self.answers:
            answer = self.answers[command]
            return answer(request.get("arguments", {})) if callable(answer) else answer
        match command:
            case "guest-sync-delimited":
                return request["arguments"]["id"]
            case "guest-fsfreeze-status":
                return "frozen" if self.frozen else "thawed"
            case "guest-fsfreeze-freeze":
                self.frozen = True
                await trio.sleep(self.freeze_s)
                return self.file_systems
            case "guest-fsfreeze-freeze-list":
                self.frozen = True
                self.chosen = request["arguments"]["mountpoints"]
                return min(self.file_systems, len(self.chosen))
            case "guest-fsfreeze-thaw":
                count, self.frozen = self.file_systems if self.frozen else 0, False
                return count
        return Refusal(f"The command {command} has not been found", "CommandNotFound")
