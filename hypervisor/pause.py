"""Pausing a guest for the instant of a backup, where its file systems cannot be frozen or a freeze is not enough.

`stop` and `cont` of QEMU: while the guest stands still nothing is written to any disk, the EFI variables or the TPM, so
all of them are as of one moment even where QEMU switches them one after the other. A small child process
(`resume_child.py`) lets the guest go on if this process is killed meanwhile. docs/hypervisor.md, "Pausing the guest".
"""

import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Final

import trio

from core.errors import os_reason
from hypervisor import checked, resume_child
from hypervisor.domain_address import DomainAddress
from hypervisor.errors import FleecingError, QmpError
from hypervisor.qmp import Qmp

#: Seconds for the child to start and go to the background.
_START_TIMEOUT_S: Final = 10.0
#: Seconds for QEMU to let the guest go on; after that the child does it when it can.
_CONT_TIMEOUT_S: Final = 60.0


class Pause(Enum):
    """When a guest is paused for the instant."""

    NEVER = "never"
    WITHOUT_AGENT = "without-agent"  #: if its file systems could not be frozen
    ALWAYS = "always"


@dataclass(slots=True)
class Paused:
    """What became of a pause."""

    seconds: float = 0.0  #: from the order to stop to the answer that the guest goes on; 0 if it was not paused


@asynccontextmanager
async def paused(qmp: Qmp, path: str, note: Callable[[bool], Awaitable[None]]) -> AsyncIterator[Paused]:
    """The guest stands still while the block runs; one that does not run anyway is left as it is.

    `note` is told before the guest is stopped, and when it goes on, so that a later run knows whose pause it is.

    Raises:
        FleecingError: the guest cannot be stopped safely, or does not go on; the child tries further then.
        QmpError, QmpAnswerError: as `Qmp.execute`.

    However the block ends, cancellation included, the guest goes on.
    """
    result = Paused()
    where = f"{qmp.where}, query-status"
    if not checked.field(checked.of_type(await qmp.execute("query-status"), dict, where), "running", bool, where):
        yield result
        return
    async with AsyncExitStack() as stack:
        goes_on = await _child(stack, path, qmp.peer.pid)
        await note(True)
        began = time.monotonic()
        try:
            await qmp.execute("stop")
            yield result
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CONT_TIMEOUT_S) as scope:
                try:
                    await qmp.execute("cont")
                    await goes_on.send_all(b"!")
                except (QmpError, OSError, trio.BrokenResourceError) as error:
                    raise _stands_still(path, str(error)) from error
                result.seconds = time.monotonic() - began
                await note(False)
            if scope.cancelled_caught:
                raise _stands_still(path, "QEMU does not answer")


def _stands_still(path: str, why: str) -> FleecingError:
    return FleecingError("let the guest go on of", path, why, "'cont' over QMP does it, or 'virsh resume'")


async def _child(stack: AsyncExitStack, path: str, pid: int) -> trio.abc.SendStream:
    """Start the child; it acts when the stream that is returned ends without a byte.

    Raises:
        FleecingError: it does not start.
    """
    if DomainAddress.parse(path) is not None:
        command = [sys.executable, "-I", "-m", "hypervisor.resume_domain", path]
    else:
        here = str(Path.cwd() / path)  # not resolved: a socket's path must be short
        command = [sys.executable, "-I", "-S", str(Path(resume_child.__file__)), here, str(pid)]
    with trio.move_on_after(_START_TIMEOUT_S, shield=True):
        try:
            process = await trio.lowlevel.open_process(
                command, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True, cwd="/"
            )
        except OSError as error:
            raise FleecingError("pause the guest of", path, os_reason(error)) from error
        assert process.stdin is not None
        await stack.enter_async_context(process.stdin)
        if await process.wait() == 0:
            return process.stdin
    raise FleecingError("pause the guest of", path, "the process that would let it go on does not start")
