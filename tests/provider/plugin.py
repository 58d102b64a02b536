"""The plugin for Proxmox VE in a Perl of its own, called as Proxmox VE does; its base classes are stand-ins."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from tests.support.cache import ROOT
from tests.support.warm_command import WarmCommand

PERL: Final = Path(__file__).with_name("perl")
#: Seconds for an answer: something hangs.
PATIENCE_S: Final = 120.0
_RELAY: Final = Path(__file__).with_name("relay.py")
_numbers = itertools.count()
FLEECE: Final = (str(Path(sys.executable).with_name("fleece")),)


class Died(Exception):  # noqa: N818 - an answer
    """The method has died."""


@dataclass
class Plugin:
    """A worker of Proxmox VE with the plugin in it."""

    process: trio.Process
    log: list[tuple[str, str]] = field(default_factory=list)
    ends_with: int = 0  #: the exit code that is right
    _received: bytes = b""

    async def _done(self, message: Mapping[str, Any]) -> Any:
        await self.send(message)
        return await self.answer()

    async def send(self, message: Mapping[str, Any]) -> None:
        """Ask without waiting."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(json.dumps(message).encode() + b"\n")

    async def answer(self) -> Any:
        """What the method that was asked returns, in list context: nothing, one value, or a list."""
        assert self.process.stdout is not None
        with trio.fail_after(PATIENCE_S):
            while b"\n" not in self._received:
                data = await self.process.stdout.receive_some(1 << 20)
                assert data, f"the worker has ended with {await self.process.wait()}"
                self._received += data
        line, _, self._received = self._received.partition(b"\n")
        answer = json.loads(line)
        self.log += [tuple(entry) for entry in answer["log"]]
        if "died" in answer:
            raise Died(answer["died"])
        result = answer["result"]
        return None if not result else result[0] if len(result) == 1 else result

    async def __call__(self, method: str, *arguments: Any) -> Any:
        """Call a method of the provider."""
        return await self._done({"on": "provider", "call": method, "args": arguments})

    async def forked(self, root: int, method: str, *arguments: Any) -> Any:
        """Call it in a fork with a user namespace whose root is the user `root`."""
        return await self._done({"on": "provider", "call": method, "args": arguments, "forked": root})

    async def storage(self, method: str, *arguments: Any) -> Any:
        """Call a method of the storage plugin."""
        return await self._done({"on": "storage", "call": method, "args": arguments})

    def children(self) -> list[int]:
        """Processes that the worker has started and that still run."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]


@dataclass
class Worker:
    """What a worker is started with."""

    home: Path
    scfg: dict[str, Any]
    storeid: str = "fleece"
    command: Sequence[str] | None = None  #: None: `fleece` itself
    warm: WarmCommand | None = None  #: does its single calls
    limits: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    reaped: bool = False  #: the kernel itself waits for what has ended

    @property
    def fleece_environment(self) -> dict[str, str]:
        """Of `fleece`, which has state, configuration and keys of its own."""
        return {
            "FLEECE_STATE_DIR": str(self.home / "state"),
            "FLEECE_RUN_DIR": str(self.home / "run"),
            "FLEECE_CONFIG": str(self.home / "fleece.toml"),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "TMPDIR": str(self.home),
            **self.environment,
        }

    @asynccontextmanager
    async def started(self) -> AsyncIterator[Plugin]:
        """A worker while the block runs; it must leave no process behind."""
        async with trio.open_nursery() as nursery:
            command = self.command
            if command is None:
                command = await self._relayed(nursery)
            async with self._driver(command) as plugin:
                yield plugin
            nursery.cancel_scope.cancel()

    async def _relayed(self, nursery: trio.Nursery) -> Sequence[str]:
        """The command by which single calls are done by the warm one."""
        if self.warm is None:
            return FLEECE
        warm, path = self.warm, self.home / f"relay-{next(_numbers)}"

        async def serve(stream: trio.SocketStream) -> None:
            data = b"".join([part async for part in stream])
            request = json.loads(data)
            done = await trio.to_thread.run_sync(
                lambda: warm.run(
                    request["arguments"],
                    request["environment"],
                    stdin=request["stdin"].encode(),
                    timeout_s=PATIENCE_S,
                )
            )
            answer = {"stdout": done.stdout.decode(), "stderr": done.stderr.decode(), "code": done.returncode}
            await stream.send_all(json.dumps(answer).encode())

        listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await listener.bind(str(path))
        listener.listen(8)
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        return ("/usr/bin/python3", "-S", "-E", str(_RELAY), str(path), *FLEECE)

    @asynccontextmanager
    async def _driver(self, command: Sequence[str]) -> AsyncIterator[Plugin]:
        process = await trio.lowlevel.open_process(
            ["/usr/bin/perl", "-T", f"-I{ROOT / 'proxmox'}", f"-I{PERL}", str(PERL / "driver.pl")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
        plugin = Plugin(process)
        try:
            await plugin.send(
                {
                    "command": list(command),
                    "environment": self.fleece_environment,
                    "limits": self.limits,
                    "scfg": self.scfg,
                    "storeid": self.storeid,
                    "reaped": self.reaped,
                }
            )
            yield plugin
            assert process.stdin is not None
            await process.stdin.aclose()
            with trio.fail_after(PATIENCE_S):
                assert await process.wait() == plugin.ends_with
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        await stream.aclose()
