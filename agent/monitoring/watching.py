"""What the agent does for monitoring while it runs: page, metrics, looks at repositories, the end of jobs."""

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from agent.monitoring.events import EventLog
from agent.monitoring.overview import agent_path, overview, version
from agent.monitoring.reporter import Monitoring
from agent.monitoring.state import write_document
from core.errors import ExitCode, FleeceError
from core.limits import in_io_thread
from core.nursery import open_nursery

if TYPE_CHECKING:
    from agent.config import Config
    from agent.monitoring.sections import StatusSection
    from agent.registry import Registry

#: Seconds between two signs that the agent lives, and between two writings of the textfile.
BEAT_S: Final = 60.0
#: Seconds after the agent's start at which repositories are looked at first: jobs that were missed come first.
_FIRST_LOOK_S: Final = 30.0
_DONE: Final = (ExitCode.DONE, ExitCode.WARNINGS)


class Refresh(Protocol):
    """See `AgentWatch`."""

    async def __call__(self, *arguments: str) -> int:
        """Run it to its end."""
        ...


@dataclass
class AgentWatch:
    """Monitoring for as long as the agent runs.

    Args:
        state_dir: of Fleece.
        registry: the datastores that commands made.
        say: told what people should know.
        refresh: runs `fleece metrics refresh` with further arguments in a process of its own, which gives back its
            memory, and returns its exit code.
    """

    state_dir: Path
    registry: "Registry"
    say: Callable[[str], None]
    refresh: "Refresh"
    now: Callable[[], float] = time.time
    _config: "Config | None" = None
    _changed: trio.Event = field(default_factory=trio.Event)
    _since: float = 0.0
    _refused: str | None = None  #: why the configuration that is there now was not taken

    def take(self, config: "Config") -> None:
        """This is the configuration from now on."""
        again = self._config is not None
        self._config, self._refused = config, None
        self._changed.set()
        if again:
            self._events().emit("agent-reload", "the agent has read its configuration again", error=None)

    def refused(self, error: FleeceError) -> None:
        """A changed configuration is not valid."""
        self._refused = str(error)
        self._events().emit("agent-reload", "the agent goes on with the old configuration", error=str(error))

    def left_out(self, name: str) -> None:
        """A job was due while it still ran."""
        self._events().emit("job-left-out", f"job {name} was due while it still ran", job=name)

    async def job_ended(self, name: str, code: int, begun: float) -> None:
        """Tell of a run that could not do so itself: it was killed, or did not even begin.

        Args:
            name: of the job.
            code: exit code, or signal below 0.
            begun: when the agent began it, Unix seconds.
        """
        if code in _DONE:
            return
        told: int = ExitCode.FAILED
        with suppress(FleeceError):
            told = await self.refresh("--job", name, "--exit-code", str(code), "--begun", str(begun))
        if told not in _DONE:
            # Another process reads the configuration anew, and that may be what is wrong: this one has the old one.
            await self._safely(self._monitoring().job_ended(name, code, begun))

    async def run(self) -> None:
        """Watch until cancelled. What fails is told, and tried again."""
        self._since = self.now()
        self._events().emit("agent-start", "the agent has begun", version=version())
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(self._beats)
                nursery.start_soon(self._looks)
                nursery.start_soon(self._page)
        finally:
            with suppress(OSError):
                agent_path(self.state_dir).unlink(missing_ok=True)
            self._events().emit("agent-stop", "the agent ends")
            with trio.CancelScope(shield=True):
                await self._safely(self._monitoring().textfile())

    def _events(self) -> EventLog:
        return EventLog(self._config.events if self._config is not None else None, self.say)

    def _monitoring(self) -> Monitoring:
        assert self._config is not None
        return Monitoring(self._config, self.registry, self.state_dir, self.say, now=self.now)

    async def _safely(self, work: Awaitable[Any]) -> None:
        try:
            await work
        except Exception as error:
            self.say(f"monitoring: {type(error).__name__}: {error}")

    async def _beats(self) -> None:
        path = agent_path(self.state_dir)
        while True:
            sign = {"since": self._since, "seen": self.now(), "pid": os.getpid(), "version": version()}
            sign["refused"] = self._refused
            await self._safely(in_io_thread(write_document, path, sign))
            await self._safely(self._monitoring().textfile())
            await trio.sleep(BEAT_S)

    async def _looks(self) -> None:
        from agent.cli_verify import parse_duration

        await trio.sleep(_FIRST_LOOK_S)
        while True:
            config = self._config
            assert config is not None
            wanted = config.metrics is not None or config.status is not None or config.notify
            interval_s = 3600.0 if config.metrics is None else parse_duration(config.metrics.survey)
            if wanted and interval_s > 0:
                code = 0
                with suppress(FleeceError):
                    code = await self.refresh()
                if code not in _DONE:
                    self.say(f"looking at the repositories has failed (exit code {code})")
            await trio.sleep(max(interval_s, BEAT_S))

    async def _page(self) -> None:
        while True:
            self._changed = trio.Event()
            section = self._config.status if self._config is not None else None
            async with open_nursery() as nursery:
                if section is not None:
                    nursery.start_soon(self._serve, section)
                await self._changed.wait()
                # Also if nothing changed here: certificate and token are read again.
                nursery.cancel_scope.cancel()

    async def _serve(self, section: "StatusSection") -> None:
        from agent.monitoring.web import RETRY_S, StatusServer

        while True:
            await self._safely(StatusServer(self._document, self.say).run(section))
            await trio.sleep(RETRY_S)

    def _document(self) -> Mapping[str, Any]:
        assert self._config is not None
        return overview(self._config, self.state_dir, self.now())
