import pytest

from core.progress import Progress, Task


class Recorder(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int, int | None, str]] = []

    def started(self, task: Task) -> None:
        self.events.append(("started", task.done, task.total, task.note))

    def changed(self, task: Task) -> None:
        self.events.append(("changed", task.done, task.total, task.note))

    def ended(self, task: Task, *, ok: bool) -> None:
        self.events.append(("ok" if ok else "failed", task.done, task.total, task.note))


def test_a_task_is_started_changed_and_ended() -> None:
    progress = Recorder()
    with progress.task("disk", 10) as task:
        task.advance(4)
        task.update(total=12, note="slow")
    assert progress.events == [
        ("started", 0, 10, ""),
        ("changed", 4, 10, ""),
        ("changed", 4, 12, "slow"),
        ("ok", 4, 12, "slow"),
    ]


def test_a_task_that_raises_counts_as_failed_and_the_error_goes_on() -> None:
    progress = Recorder()
    with pytest.raises(KeyError), progress.task("disk", None):
        raise KeyError("x")
    assert progress.events[-1][0] == "failed"


def test_figures_that_come_after_the_end_are_not_shown() -> None:
    progress = Recorder()
    with pytest.raises(KeyError), progress.task("disk", None) as task:
        raise KeyError("x")
    task.advance(1)
    task.update(note="late")
    assert [event[0] for event in progress.events] == ["started", "failed"]


def test_warnings_are_kept_in_their_order() -> None:
    progress = Progress()
    progress.warn("first")
    progress.warn("second")
    progress.log("no problem")
    assert progress.warnings == ["first", "second"]
