"""Progress for people: bars at a terminal, plain lines elsewhere, with rate and time left.

Both renderers write to one stream (the command line gives standard error, so that standard output stays a document)
and measure with the same `Meter`. Neither starts a thread: a bar is drawn when its figures change.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TextIO

from core.progress import Progress, Task
from core.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

Clock = Callable[[], float]

#: Seconds over which a rate is measured: long enough to be calm, short enough to follow a slow target.
RATE_WINDOW_S: Final = 15.0
#: Seconds between two lines about one task where there is no terminal.
LINE_INTERVAL_S: Final = 10.0
#: Seconds between two drawings of the bars.
DRAW_INTERVAL_S: Final = 0.1
#: Seconds between two samples of one meter; `changed` may come thousands of times a second.
_SAMPLE_INTERVAL_S: Final = 0.25


class Meter:
    """How quickly one task gets on."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self.started = clock()
        self._samples: deque[tuple[float, int]] = deque([(self.started, 0)])

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self.started

    def sample(self, done: int) -> None:
        """Remember that `done` units are done by now."""
        now = self._clock()
        if now - self._samples[-1][0] >= _SAMPLE_INTERVAL_S:
            self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] > RATE_WINDOW_S:
            self._samples.popleft()

    def rate(self, done: int) -> float:
        """Units a second over the last `RATE_WINDOW_S` seconds; 0 before anything can be said."""
        then, before = self._samples[0]
        seconds = self._clock() - then
        return (done - before) / seconds if seconds > 0 else 0.0

    def left(self, done: int, total: int | None) -> float | None:
        """Seconds to the end at the present rate, None if nobody can know."""
        rate = self.rate(done)
        return None if total is None or rate <= 0 else max(0, total - done) / rate


def amount(count: float, unit: str) -> str:
    """`count` of `unit` for people: `1.50 GiB`, `17 chunks`."""
    return format_size(count) if unit == "bytes" else f"{count:.0f} {unit}"


def describe(task: Task, meter: Meter) -> str:
    """Where `task` stands: `37 % (1.20 GiB of 3.24 GiB), 210 MiB/s, 9 s left`."""
    parts = [amount(task.done, task.unit)]
    if task.total:
        percent = min(100, 100 * task.done // task.total)
        parts = [f"{percent} % ({amount(task.done, task.unit)} of {amount(task.total, task.unit)})"]
    parts.append(f"{amount(meter.rate(task.done), task.unit)}/s")
    if (left := meter.left(task.done, task.total)) is not None:
        parts.append(f"{format_duration(left)} left")
    if task.note:
        parts.append(task.note)
    return ", ".join(parts)


def summary(task: Task, meter: Meter, *, ok: bool) -> str:
    """How `task` ended: `done, 3.24 GiB in 15 s, 221 MiB/s`."""
    elapsed = meter.elapsed
    if not ok:
        return f"stopped after {amount(task.done, task.unit)} in {format_duration(elapsed)}"
    text = f"done, {amount(task.done, task.unit)} in {format_duration(elapsed)}"
    if elapsed >= 1 and task.done:
        text += f", {amount(task.done / elapsed, task.unit)}/s"
    return text + (f", {task.note}" if task.note else "")


class Lines(Progress):
    """Plain lines, at most one per task every `LINE_INTERVAL_S` seconds, and one at its end.

    Args:
        stream: where the lines go; a stream that is gone or full ends the output, never the work.
        verbose: also show `log` lines and warnings at once.
        clock: for tests.
    """

    def __init__(self, stream: TextIO, *, verbose: bool = False, clock: Clock = time.monotonic) -> None:
        super().__init__()
        self._stream, self._verbose, self._clock = stream, verbose, clock
        self._meters: dict[Task, Meter] = {}
        self._last_line: dict[Task, float] = {}

    def _say(self, text: str) -> None:
        try:
            print(text, file=self._stream, flush=True)
        except (OSError, ValueError):
            return

    def log(self, text: str) -> None:
        """Show `text` if verbose."""
        if self._verbose:
            self._say(text)

    def warn(self, text: str) -> None:
        """Keep `text`, and show it at once if verbose."""
        super().warn(text)
        self.log(f"warning: {text}")

    def started(self, task: Task) -> None:
        """Begin to measure."""
        self._meters[task] = Meter(self._clock)
        self._last_line[task] = self._clock()

    def changed(self, task: Task) -> None:
        """Measure, and say something if it is time."""
        meter = self._meters[task]
        meter.sample(task.done)
        if self._clock() - self._last_line[task] >= LINE_INTERVAL_S:
            self._last_line[task] = self._clock()
            self._say(f"{task.name}: {describe(task, meter)}")

    def ended(self, task: Task, *, ok: bool) -> None:
        """Say how it ended."""
        meter = self._meters.pop(task)
        del self._last_line[task]
        self._say(f"{task.name}: {summary(task, meter, ok=ok)}")


class TerminalBars(Progress):
    """One bar per running task at the foot of a terminal; what is finished scrolls away above it as a line."""

    def __init__(self, bars: "Bars", *, verbose: bool = False, clock: Clock = time.monotonic) -> None:
        super().__init__()
        self._bars, self._verbose, self._clock = bars, verbose, clock
        self._shown: dict[Task, tuple[TaskID, Meter]] = {}
        self._drawn = clock()

    def log(self, text: str) -> None:
        """Show `text` above the bars if verbose."""
        if self._verbose:
            self._bars.console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        """Keep `text`, and show it at once if verbose."""
        super().warn(text)
        self.log(f"warning: {text}")

    def started(self, task: Task) -> None:
        """Add a bar."""
        bar = self._bars.add_task(task.name, total=task.total, figures="")
        self._shown[task] = bar, Meter(self._clock)
        self._bars.refresh()

    def changed(self, task: Task) -> None:
        """Draw the bar again if it is time."""
        bar, meter = self._shown[task]
        meter.sample(task.done)
        if self._clock() - self._drawn >= DRAW_INTERVAL_S:
            self._drawn = self._clock()
            self._bars.update(bar, completed=task.done, total=task.total, figures=describe(task, meter))
            self._bars.refresh()

    def ended(self, task: Task, *, ok: bool) -> None:
        """Turn the bar into a line."""
        bar, meter = self._shown.pop(task)
        self._bars.remove_task(bar)
        self._bars.console.print(f"{task.name}: {summary(task, meter, ok=ok)}", markup=False, highlight=False)
        self._bars.refresh()


@contextmanager
def rendered(stream: TextIO, *, quiet: bool = False, verbose: bool = False) -> Iterator[Progress]:
    """A `Progress` that shows itself on `stream` while the block runs: bars if it is a terminal, else lines.

    `quiet` shows nothing (warnings are kept all the same).
    """
    if quiet:
        yield Progress()
    elif not stream.isatty():
        yield Lines(stream, verbose=verbose)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        text = TextColumn("{task.description}", markup=False)
        figures = TextColumn("{task.fields[figures]}", markup=False)
        bars = Bars(
            text, BarColumn(), figures,
            console=Console(file=stream), auto_refresh=False, redirect_stdout=False, redirect_stderr=False,
            transient=True,
        )  # fmt: skip
        with bars:
            yield TerminalBars(bars, verbose=verbose)
