"""The two pipes between a plugin of Proxmox VE and its session: one JSON document a line, in turn.

The session is a child of the worker that runs the job, and must not outlive it: it ends when its input is closed, which
also is how it is told to, and when that worker is gone, whatever other processes still hold the other end. While it
works on a question it says every few seconds that it is alive, so that one that hangs can be told from one that works.
"""

import json
import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from agent.provider.messages import MAX_DOCUMENT, Request, decoded, parsed
from core.errors import FleeceError, FormatError, UsageError
from core.nursery import open_nursery
from core.progress import Progress, Task
from core.units import format_size

#: Seconds between two signs of life.
ALIVE_S: Final = 5.0
#: Seconds between two lines about the progress of a disk.
_PROGRESS_S: Final = 10.0
#: Seconds for the last words when everything ends.
_LAST_WORDS_S: Final = 5.0
#: Lines that wait to be written; more are dropped, unless they are answers.
_MAX_WAITING: Final = 10_000


class Channel:
    """Questions in, answers out; made by `open_channel`."""

    def __init__(self, incoming: trio.abc.ReceiveStream, outgoing: trio.abc.SendStream) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._lines: deque[bytes] = deque()
        self._wake = trio.Event()
        self._questions, self._asked = trio.open_memory_channel[Request](1)
        self._stopped = False
        self._open: str | None = None  #: id of the question that has no answer yet
        self.parent: int | None = None  #: process whose end ends the session
        self.nursery: trio.Nursery | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a question without an answer."""
        return self._open is not None

    async def question(self) -> Request:
        """The next question. There is always one: when none comes any more everything is cancelled."""
        return await self._asked.receive()

    def answer(self, result: dict[str, Any]) -> None:
        """Answer the question that is open."""
        self._say({"id": self._open, "result": result}, always=True)
        self._open = None

    def refuse(self, error: FleeceError) -> None:
        """Say why the question that is open has no answer."""
        fields = {"what": error.what, "where": error.where, "why": error.why, "hint": error.hint}
        self._say({"id": self._open, "error": fields}, always=True)
        self._open = None

    def log(self, level: str, message: str) -> None:
        """One line for the job's log; `level` is `info`, `warn` or `err`."""
        self._say({"log": {"level": level, "message": message}})

    def _say(self, document: dict[str, Any], *, always: bool = False) -> None:
        if always or len(self._lines) < _MAX_WAITING:
            self._lines.append(json.dumps(document).encode() + b"\n")
            self._wake.set()

    async def read(self, over: trio.CancelScope) -> None:
        """Take questions, one at a time, until there are no more; then cancel `over`.

        Raises:
            FormatError, UsageError: what came is no question, or not in turn.
        """
        received = bytearray()
        watched = False
        while data := await self._incoming.receive_some(1 << 20):
            received += data
            while (end := received.find(b"\n", max(0, len(received) - len(data)))) >= 0:
                line = bytes(received[:end])
                del received[: end + 1]
                data = received
                request = parsed(Request, decoded(line, "a question"), "a question")
                if self._open is not None:
                    raise UsageError("understand", "a question", "the one before it has no answer yet")
                if not watched and self.nursery is not None:
                    watched, self.parent = True, request.parent
                    self.nursery.start_soon(_watch, request.parent, over)
                self._open = request.id
                self._questions.send_nowait(request)
            if len(received) > MAX_DOCUMENT:
                raise FormatError("understand", "a question", f"it has more than {MAX_DOCUMENT} bytes")
        over.cancel()

    async def write(self) -> None:
        """Write what is said until `stop`, and what is left then."""
        while self._lines or not self._stopped:
            self._wake = trio.Event()
            while self._lines:
                try:
                    await self._outgoing.send_all(self._lines.popleft())
                except trio.BrokenResourceError:
                    self._lines.clear()  # nobody listens; the other end of the input tells as well
            if not self._stopped:
                await self._wake.wait()

    def stop(self) -> None:
        """Nothing more will be said."""
        self._stopped = True
        self._wake.set()

    async def live(self) -> None:
        """Say now and then that a question is being worked on."""
        while True:
            await trio.sleep(ALIVE_S)
            if self._open is not None:
                self._say({"alive": True})


async def _watch(process: int, over: trio.CancelScope) -> None:
    """Cancel `over` when `process` has ended."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        over.cancel()
        return
    except OSError as error:
        raise FleeceError("watch the process", str(process), error.strerror or str(error)) from error
    try:
        await trio.lowlevel.wait_readable(descriptor)
        over.cancel()
    finally:
        os.close(descriptor)


def take_standard_streams() -> tuple[int, int]:
    """Descriptors of standard input and output for nobody else; what is printed goes to standard error from now on."""
    incoming, outgoing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return incoming, outgoing


@asynccontextmanager
async def open_channel(incoming: trio.abc.ReceiveStream, outgoing: trio.abc.SendStream) -> AsyncIterator[Channel]:
    """A channel while the block runs. The end of the input, or of who asks, cancels the block, and is no failure.

    Raises:
        FormatError, UsageError: what came is no question, or not in turn.
    """
    channel = Channel(incoming, outgoing)
    async with open_nursery() as writing:
        writing.start_soon(channel.write)
        async with open_nursery() as nursery:
            channel.nursery = nursery
            nursery.start_soon(channel.read, nursery.cancel_scope)
            nursery.start_soon(channel.live)
            try:
                yield channel
            finally:
                channel.stop()
                writing.cancel_scope.deadline = trio.current_time() + _LAST_WORDS_S
            nursery.cancel_scope.cancel()


class ChannelProgress(Progress):
    """Writes what is done into the job's log."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel
        self._next: dict[int, float] = {}

    def log(self, text: str) -> None:
        """See `Progress.log`."""
        self._channel.log("info", text)

    def warn(self, text: str) -> None:
        """See `Progress.warn`."""
        if text not in self.warnings:
            self._channel.log("warn", text)
            super().warn(text)

    def started(self, task: Task) -> None:
        """See `Progress.started`."""
        self._next[id(task)] = trio.current_time() + _PROGRESS_S

    def changed(self, task: Task) -> None:
        """See `Progress.changed`."""
        if (now := trio.current_time()) >= self._next.get(id(task), now + 1):
            self._next[id(task)] = now + _PROGRESS_S
            self._channel.log("info", f"{task.name}: {_figures(task)}")

    def ended(self, task: Task, *, ok: bool) -> None:
        """See `Progress.ended`."""
        self._next.pop(id(task), None)


def _figures(task: Task) -> str:
    if task.unit != "bytes":
        return f"{task.done} {task.unit}"
    done = format_size(task.done)
    if not task.total:
        return f"{done}{f', {task.note}' if task.note else ''}"
    return f"{done} of {format_size(task.total)} ({100 * task.done // task.total} %)"
