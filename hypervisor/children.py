"""Programs that run beside this process and for it: they end when it does, however it does.

The kernel sends such a child SIGTERM when the thread that made it ends. trio starts programs in threads of its own,
which end when they have been idle for ten seconds; so these are started in trio's thread: that takes a millisecond.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from core.errors import FleeceError, SourceError, os_reason
from core.limits import in_io_thread
from core.nursery import open_nursery
from hypervisor.unix_socket import process_start_time

_LOG = logging.getLogger(__name__)

#: Seconds between SIGTERM and SIGKILL.
STOP_TIMEOUT_S: Final = 5.0
#: Seconds for a killed program to be gone; one that waits for a broken disk is not, as long as that lasts.
KILL_TIMEOUT_S: Final = 1.0
#: Bytes of what a program says that are kept: its beginning, which has the reason of a failed start.
_KEPT: Final = 4000
#: A listening socket comes as standard input and goes on as systemd would pass it (sd_listen_fds): number 3, with the
#: id of the process, which only a shell between knows beforehand.
_HAND_OVER: Final = 'exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'


class Child:
    """A program that was started by `running`."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._descriptor = os.pidfd_open(process.pid)
        self._heard = b""
        self._silent = trio.Event()
        #: Clock ticks after boot; with `pid` it names the process for ever.
        self.start_time: Final = process_start_time(process.pid)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None as long as it runs."""
        return self._process.poll()

    @property
    def heard(self) -> str:
        """What it has said first, on both streams, in one line."""
        return " ".join(self._heard.decode("utf-8", "replace").split())

    async def last_words(self) -> str:
        """What it has said first, when it has ended and its last words have come."""
        await self.wait()
        # Somebody it has started may still have the pipe.
        with trio.move_on_after(KILL_TIMEOUT_S):
            await self._silent.wait()
        return self.heard

    async def wait(self) -> int:
        """Its exit code, when it has ended."""
        while (code := self._process.poll()) is None:
            # Several tasks may wait, but of each descriptor only one.
            descriptor = os.dup(self._descriptor)
            try:
                await trio.lowlevel.wait_readable(descriptor)
            finally:
                os.close(descriptor)
        return code

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    async def stop(self, *, stop_s: float = STOP_TIMEOUT_S, kill_s: float = KILL_TIMEOUT_S) -> bool:
        """End it, kindly at first; False if it is there even so. Not to be cancelled."""
        for end, timeout_s in ((self._process.terminate, stop_s), (self._process.kill, kill_s)):
            end()
            with trio.move_on_after(timeout_s, shield=True):
                await self.wait()
                return True
        _LOG.warning("%s (process %d) was killed, but does not end", self._process.args, self.pid)
        return False

    def _hear(self, data: bytes) -> None:
        self._heard += data[: _KEPT - len(self._heard)]
        for line in data.decode("utf-8", "replace").splitlines():
            _LOG.debug("process %d: %s", self.pid, line)

    def _forget(self) -> None:
        os.close(self._descriptor)


@asynccontextmanager
async def running(
    command: Sequence[str],
    *,
    fault: type[FleeceError] = SourceError,
    stop_s: float = STOP_TIMEOUT_S,
    kill_s: float = KILL_TIMEOUT_S,
    listener: socket.socket | None = None,
    on_our_death: signal.Signals = signal.SIGTERM,
    pass_fds: Sequence[int] = (),
) -> AsyncIterator[Child]:
    """`command` runs while the block does, or until it ends by itself; messages are in English.

    In a session of its own, so that a Ctrl-C at the terminal does not end it under its users. If this process is
    killed it gets the signal `on_our_death`. `listener` is handed over the way systemd does it; the caller closes its
    own copy.
    `pass_fds` are inherited under their numbers.

    Raises:
        FleeceError: it cannot be run; the class is `fault`.
    """
    guard = await in_io_thread(shutil.which, "setpriv")  # of util-linux, which Debian always has
    line = [
        *([guard, "--pdeathsig", on_our_death.name.removeprefix("SIG"), "--"] if guard is not None else []),
        *command,
    ]
    if listener is not None:
        line = ["sh", "-c", _HAND_OVER, "sh", *line]
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        process = subprocess.Popen(  # noqa: ASYNC220 - see above
            line,
            stdin=subprocess.DEVNULL if listener is None else listener.fileno(),
            stdout=writing,
            stderr=writing,
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,
            pass_fds=pass_fds,
        )
    except OSError as error:
        os.close(reading)
        raise fault("run", command[0], os_reason(error)) from error
    finally:
        os.close(writing)
    child, said = Child(process), trio.lowlevel.FdStream(reading)
    try:
        async with open_nursery() as nursery:
            nursery.start_soon(_listen, said, child)
            try:
                yield child
            finally:
                await child.stop(stop_s=stop_s, kill_s=kill_s)
                nursery.cancel_scope.cancel()
    finally:
        said.close()
        child._forget()


async def _listen(said: trio.lowlevel.FdStream, child: Child) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        while data := await said.receive_some(65536):
            child._hear(data)
    child._silent.set()


async def end_process(descriptor: int, *, first_s: float = 0.0, stop_s: float = STOP_TIMEOUT_S) -> bool:
    """End a process that is no child of ours, by its pidfd: wait `first_s`, SIGTERM, `stop_s` later SIGKILL.

    False if it is there even so.
    """
    for number, timeout_s in ((None, first_s), (signal.SIGTERM, stop_s), (signal.SIGKILL, KILL_TIMEOUT_S)):
        if number is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
        with trio.move_on_after(timeout_s):
            await trio.lowlevel.wait_readable(descriptor)
            return True
    return False
