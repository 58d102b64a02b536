import io

import pytest

from core.progress import Progress
from core.render import LINE_INTERVAL_S, RATE_WINDOW_S, Lines, Meter, TerminalBars, rendered
from core.units import MIB


class Clock:
    """Time that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class GonePipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_rate_is_that_of_the_last_seconds_not_of_the_whole_run(clock: Clock) -> None:
    meter = Meter(clock)
    done = 0
    for _ in range(100):  # 100 s at 10 a second
        clock.now += 1
        done += 10
        meter.sample(done)
    for _ in range(int(RATE_WINDOW_S) + 2):  # then 100 a second
        clock.now += 1
        done += 100
        meter.sample(done)
    assert meter.rate(done) == pytest.approx(100)
    assert meter.left(done, done + 500) == pytest.approx(5)


def test_nobody_knows_the_end_without_a_total_or_a_rate(clock: Clock) -> None:
    meter = Meter(clock)
    assert meter.left(0, 100) is None
    clock.now += 1
    assert meter.left(10, None) is None


def test_lines_say_percent_amounts_rate_and_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    lines = Lines(stream, clock=clock)
    with lines.task("drive-scsi0.img", 400 * MIB) as task:
        clock.now += LINE_INTERVAL_S
        task.advance(100 * MIB)
    first, last = stream.getvalue().splitlines()
    assert first == "drive-scsi0.img: 25 % (100 MiB of 400 MiB), 10.0 MiB/s, 30 s left"
    assert last == "drive-scsi0.img: done, 100 MiB in 10 s, 10.0 MiB/s"


def test_lines_are_limited_in_rate(clock: Clock) -> None:
    stream = io.StringIO()
    lines = Lines(stream, clock=clock)
    with lines.task("disk", 100_000, "chunks") as task:
        for _ in range(6000):  # a minute
            clock.now += 0.01
            task.advance(1)
    assert 6 <= len(stream.getvalue().splitlines()) <= 7


def test_a_task_that_failed_says_how_far_it_came(clock: Clock) -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Lines(stream, clock=clock).task("disk", 10, "chunks") as task:
        task.advance(3)
        clock.now += 2
        raise RuntimeError
    assert stream.getvalue() == "disk: stopped after 3 chunks in 2.00 s\n"


def test_log_lines_are_for_the_verbose_and_warnings_are_kept_anyway() -> None:
    quiet, verbose = io.StringIO(), io.StringIO()
    for stream, wants in ((quiet, False), (verbose, True)):
        lines = Lines(stream, verbose=wants)
        lines.log("freezing")
        lines.warn("no agent")
        assert lines.warnings == ["no agent"]
    assert quiet.getvalue() == ""
    assert verbose.getvalue() == "freezing\nwarning: no agent\n"


def test_a_stream_that_is_gone_does_not_end_the_work() -> None:
    with Lines(GonePipe()).task("disk", 10) as task:
        task.advance(10)
    assert task.done == 10


def test_bars_serve_a_terminal_and_leave_one_line_per_finished_task() -> None:
    stream = Terminal()
    with rendered(stream) as progress:
        assert isinstance(progress, TerminalBars)
        with progress.task("drive [scsi0].img", 8 * MIB) as task:
            task.advance(8 * MIB)
    assert "drive [scsi0].img: done, 8.00 MiB in" in stream.getvalue()


def test_lines_serve_a_pipe_and_nothing_serves_the_quiet() -> None:
    stream = io.StringIO()
    with rendered(stream) as progress:
        assert isinstance(progress, Lines)
    with rendered(stream, quiet=True) as progress:
        assert type(progress) is Progress
        with progress.task("disk", 1):
            progress.warn("kept")
    assert stream.getvalue() == ""
    assert progress.warnings == ["kept"]
