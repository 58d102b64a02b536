"""Scripts of users that jobs call, with the phases, arguments and variables of vzdump's hook scripts.

A script gets `PHASE`, and where the phase is about one guest also `MODE` and `ID`. Its environment is what
docs/hooks.md lists and nothing else. A phase that fails, fails what it belongs to; of the phases that tell of a
failure, and of `log-end`, a failure is only logged. A script that takes too long is ended with all it started.
"""

import os
import signal
import stat
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import Final

import trio

from agent.errors import HookError
from core.errors import os_reason
from core.nursery import open_nursery
from core.units import format_duration

#: Seconds for a script when nobody sets them.
DEFAULT_TIMEOUT_S: Final = 600.0
#: Seconds for each script that is called while everything ends.
_ENDING_S: Final = 30.0
#: Seconds between SIGTERM and SIGKILL.
_GRACE_S: Final = 5.0
#: Seconds in which the output of a script that has ended must come; a process that it left behind may keep it open.
_DRAIN_S: Final = 2.0
#: Bytes of output that are logged, of one call.
_MAX_OUTPUT: Final = 256 << 10
#: Characters of a line.
_MAX_LINE: Final = 2000
#: vzdump gives its scripts none; without one a shell has its own idea of it.
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def check_script(path: Path) -> None:
    """Refuse what must not be run with this process's rights.

    Raises:
        HookError: no executable file, or one that others can change.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise HookError("run the hook", str(path), os_reason(error)) from error
    if not stat.S_ISREG(found.st_mode) or not os.access(path, os.X_OK):
        raise HookError("run the hook", str(path), "it is no executable file", f"chmod +x {path}")
    others = found.st_mode & 0o002 or (found.st_mode & 0o020 and found.st_gid not in (0, os.getegid()))
    if others or found.st_uid not in (0, os.geteuid()):
        why = "others than root and this user could change it"
        raise HookError("run the hook", str(path), why, f"chown root: {path}; chmod 755 {path}")


@dataclass(frozen=True, slots=True)
class Hook:
    """A script and the time it has."""

    path: Path
    timeout_s: float = DEFAULT_TIMEOUT_S
    option: str = "hook-timeout"  #: of the configuration, which sets that time

    async def call(
        self, arguments: tuple[str, ...], variables: Mapping[str, str], log: Callable[[str], None], stdin: bytes = b""
    ) -> None:
        """Run the script to its end; its output goes to `log`, line by line; it may read `stdin`, or not.

        Cancelled, the script and all of its process group is ended.

        Raises:
            HookError: it cannot be run, takes too long, or ends with something else than 0.
        """
        where = f"{self.path} {' '.join(arguments)}"
        check_script(self.path)
        try:
            process = await trio.lowlevel.open_process(
                [str(self.path), *arguments],
                env={"PATH": _PATH, **variables}, stdin=PIPE if stdin else DEVNULL, stdout=PIPE, stderr=STDOUT,
                cwd="/", start_new_session=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            why = os_reason(error) if isinstance(error, OSError) else str(error)
            raise HookError("run the hook", where, why) from error
        assert process.stdout is not None
        async with process.stdout, open_nursery() as nursery:
            nursery.start_soon(_copy, process.stdout, log)
            if process.stdin is not None:
                nursery.start_soon(_feed, process.stdin, stdin)
            try:
                with trio.move_on_after(self.timeout_s) as scope:
                    await process.wait()
                late = scope.cancelled_caught
            finally:
                if process.poll() is None:
                    await _end(process)
            nursery.cancel_scope.deadline = trio.current_time() + _DRAIN_S
        if late:
            # Another user's script may be out of our rights, and one that waits for a dead disk ends for nobody.
            end = "was killed" if process.poll() is not None else "cannot be killed: it still runs"
            why = f"it did not end in {format_duration(self.timeout_s)} and {end}"
            raise HookError("run the hook", where, why, f"{self.option} gives it more time")
        if process.returncode:
            how = f"exit code {process.returncode}" if process.returncode > 0 else f"signal {-process.returncode}"
            raise HookError("run the hook", where, f"it ended with {how}")


async def _feed(stream: trio.abc.SendStream, data: bytes) -> None:
    """Write what a script may read; one that does not, or that ends, is not waited for."""
    async with stream:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.send_all(data)


async def _copy(output: trio.abc.ReceiveStream, log: Callable[[str], None]) -> None:
    """Log what comes; too much is read and dropped, so that the script never waits."""
    left, line = _MAX_OUTPUT, b""
    try:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in output:
                taken = data[: max(left, 0)]
                if left > 0 >= left - len(data):
                    taken += b"\n(the script says more than is logged)\n"
                left -= len(data)
                *lines, line = (line + taken).split(b"\n")
                for one in lines:
                    _log_line(one, log)
                line = line[: 4 * _MAX_LINE]
    finally:
        # Also if somebody keeps the output open: the last line need not end.
        if line:
            _log_line(line, log)


def _log_line(line: bytes, log: Callable[[str], None]) -> None:
    text = line.decode(errors="backslashreplace").rstrip()[:_MAX_LINE]
    log("".join(char if char.isprintable() or char == "\t" else "?" for char in text))


async def _end(process: trio.Process) -> None:
    """End the script and what it started, as far as that is possible."""
    with trio.CancelScope(shield=True):
        _signal(process.pid, signal.SIGTERM)
        with trio.move_on_after(_GRACE_S):
            await process.wait()
        # Also if the script itself has ended: what it started may not have.
        _signal(process.pid, signal.SIGKILL)
        with trio.move_on_after(_GRACE_S):
            await process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


@dataclass(frozen=True, slots=True)
class Hooks:
    """The hook of one run of a job; without a script every call does nothing."""

    hook: Hook | None
    log: Callable[[str], None]
    variables: Mapping[str, str] = field(default_factory=dict)

    def of(self, log: Callable[[str], None], **variables: str) -> "Hooks":
        """The same with more variables, for one guest."""
        return Hooks(self.hook, log, {**self.variables, **variables})

    async def call(self, phase: str, *guest: str, **variables: str) -> None:
        """Call the script, if there is one.

        Args:
            phase: of docs/hooks.md.
            guest: mode and id, for phases of one guest.
            variables: more of them, of this call.

        Raises:
            HookError: as `Hook.call`.
        """
        if self.hook is not None:
            self.log(f"hook: {' '.join((phase, *guest))}")
            await self.hook.call((phase, *guest), {**self.variables, **variables}, lambda line: self.log(f"  {line}"))

    async def finish(self, phase: str, *guest: str, **variables: str) -> None:
        """As `call`; if everything is being cancelled already, the script still gets a short time.

        Raises:
            HookError: as `Hook.call`.
        """
        if trio.current_effective_deadline() > trio.current_time():
            await self.call(phase, *guest, **variables)
            return
        hooks = Hooks(self._hurried(), self.log, self.variables)
        with trio.CancelScope(shield=True):
            await hooks.call(phase, *guest, **variables)

    async def tell(self, phase: str, *guest: str, **variables: str) -> None:
        """As `finish`; a failure is logged only."""
        try:
            await self.finish(phase, *guest, **variables)
        except HookError as error:
            self.log(f"not heeded: {error}")

    def _hurried(self) -> Hook | None:
        return Hook(self.hook.path, min(self.hook.timeout_s, _ENDING_S)) if self.hook is not None else None


@asynccontextmanager
async def job_phases(hooks: Hooks) -> AsyncIterator[None]:
    """`job-init` before the block and `job-end` after it, `job-abort` if something fails; `job-start` is the block's.

    Raises:
        HookError: `job-init` or `job-end` failed.
    """
    try:
        await hooks.call("job-init")
        yield
        await hooks.finish("job-end")
    except BaseException:
        await hooks.tell("job-abort")
        raise
