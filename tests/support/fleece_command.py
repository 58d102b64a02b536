"""The real command in a process of its own: run to its end, or started to be stopped and killed in mid-work.

It is the `fleece` of the environment that the tests run in, with its own state, run-time files and configuration below
`home`, so that it can work beside a real one. A process is ended with its block, by its process id.

`start(..., stop_at=POINT)` runs `tests.support.stopping_fleece` instead, the same command that halts at one exact point
of its work. Then the test has all the time in the world to do something, and to go on with it or kill it.
"""

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL
from typing import Any, Final

import trio

from tests.support.cache import ROOT
from tests.support.warm_command import WarmCommand

#: Seconds for one command, or for a started one to get where it is to stop, on a busy machine.
PATIENCE_S: Final = 60.0
_PROGRAM: Final = Path(sys.executable).with_name("fleece")


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document that it must be."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, str]:
        """The error on standard error, the last line there, as `--output json` prints it."""
        found: dict[str, dict[str, str]] = json.loads(self.err.splitlines()[-1])
        assert set(found) == {"error"}, self.err
        assert set(found["error"]) == {"what", "where", "why", "hint"}, self.err
        return found["error"]

    @property
    def archives(self) -> dict[str, Any]:
        """The archives of the report of a backup, by name."""
        return {archive["name"]: archive for archive in self.document["archives"]}


@dataclass
class RunningFleece:
    """A command that runs, or has been stopped at its point."""

    process: trio.Process
    folder: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    async def stopped(self) -> None:
        """Wait until it has stopped at its point.

        Raises:
            AssertionError: it ended before.
        """
        with trio.fail_after(PATIENCE_S):
            while _state(self.pid) != "T":
                assert self.process.poll() is None, f"it ended without coming to its point: {self._outcome()}"
                await trio.sleep(0.01)

    def go_on(self) -> None:
        """Let a stopped one go on."""
        os.kill(self.pid, signal.SIGCONT)

    async def kill(self) -> None:
        """End it as a power cut does, and wait until it is gone."""
        self.process.kill()
        await self.ended()

    async def ended(self, timeout_s: float = PATIENCE_S) -> Outcome:
        """Wait until it has ended.

        Raises:
            AssertionError: not within `timeout_s`; the text says where in the program it hangs.
        """
        with trio.move_on_after(timeout_s) as scope:
            await self.process.wait()
        if scope.cancelled_caught:
            self.process.send_signal(signal.SIGABRT)  # PYTHONFAULTHANDLER makes it tell
            with trio.move_on_after(5):
                await self.process.wait()
            raise AssertionError(f"it has not ended after {timeout_s:g} s: {self._outcome()}")
        outcome = self._outcome()
        assert "Traceback" not in outcome.err, outcome.err
        return outcome

    def _outcome(self) -> Outcome:
        code = self.process.poll()
        return Outcome(
            -1 if code is None else code, (self.folder / "out").read_text(), (self.folder / "err").read_text()
        )


@dataclass
class FleeceCommand:
    """Runs `fleece` with `repo` as its repository."""

    home: Path  #: folder of state, run-time files and configuration; a short path, since sockets lie in it
    repo: Path
    environment: Mapping[str, str] = field(default_factory=dict)  #: more variables
    warm: WarmCommand | None = None  #: quicker, for what runs to its end
    _number: int = 0

    @property
    def run_dir(self) -> Path:
        """Where sockets, locks and the state of runs lie."""
        return self.home / "run"

    @property
    def config(self) -> Path:
        """The configuration; empty unless a test writes one."""
        return self.home / "fleece.toml"

    async def run(self, *arguments: str | Path, timeout_s: float = PATIENCE_S) -> Outcome:
        """Run it to its end, with `--output json`.

        Raises:
            subprocess.TimeoutExpired: not within `timeout_s`; its text has standard error, which says where it hangs.
        """
        if self.warm is None:
            async with self.start(*arguments) as running:
                return await running.ended(timeout_s)
        self.home.mkdir(parents=True, exist_ok=True)
        self.config.touch()
        line = [*map(str, arguments), "--output", "json"]
        started = self.warm.start(line, self._environment())
        try:
            done = await trio.to_thread.run_sync(started.wait, timeout_s, abandon_on_cancel=True)
        finally:
            started.end()
        outcome = Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in outcome.err, outcome.err
        return outcome

    async def json(self, *arguments: str | Path, code: int = 0) -> Any:
        """The document it prints; the exit code must be `code`."""
        outcome = await self.run(*arguments)
        assert outcome.code == code, outcome
        return outcome.document

    @asynccontextmanager
    async def start(
        self, *arguments: str | Path, stop_at: str | None = None, output: bool = True
    ) -> AsyncIterator[RunningFleece]:
        """It runs while the block does, or to its end; it halts at the point `stop_at` (see `stopping_fleece`).

        `output`: it has the option `--output`.
        """
        self._number += 1
        folder = self.home / f"command-{self._number}"
        folder.mkdir(parents=True)
        self.config.touch()
        line = [str(_PROGRAM)] if stop_at is None else [sys.executable, "-m", "tests.support.stopping_fleece", stop_at]
        line += [*map(str, arguments), *(["--output", "json"] if output else [])]
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = await trio.lowlevel.open_process(
                line, env=self._environment(), stdin=DEVNULL, stdout=out, stderr=err, cwd=str(ROOT)
            )
        try:
            yield RunningFleece(process, folder)
        finally:
            with trio.CancelScope(shield=True):
                if process.poll() is None:
                    process.kill()
                await process.wait()

    def _environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("FLEECE", "PBS"))}
        kept = {name: os.environ[name] for name in ("FLEECE_SHA256", "FLEECE_THREADS") if name in os.environ}
        return {
            **clean,
            **kept,
            "PYTHONFAULTHANDLER": "1",
            "FLEECE_STATE_DIR": str(self.home / "state"),
            "FLEECE_RUN_DIR": str(self.run_dir),
            "FLEECE_CONFIG": str(self.config),
            "FLEECE_REPOSITORY": str(self.repo),
            **self.environment,
        }

    def processes(self) -> list[str]:
        """The command lines of all processes that this command has started, itself and their children's included."""
        mark = b"FLEECE_RUN_DIR=" + os.fsencode(self.run_dir)
        return list(_command_lines_with(mark))


def _command_lines_with(variable: bytes) -> Iterable[str]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            if variable in (folder / "environ").read_bytes().split(b"\0"):
                yield (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended meanwhile, or is not ours


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
