"""Progress of long work as events; who shows them is another matter.

Work reports to a `Progress`. The command line passes a `core.render` renderer (bars at a terminal, lines elsewhere),
tests and libraries pass `Progress()`, which drops everything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Task:
    """One piece of work that is measured: an archive, a verification, a restore."""

    name: str  #: what it works on, for people
    total: int | None  #: units of work in all, None if not known yet
    unit: str = "bytes"  #: `bytes`, or the plural of what is counted ("chunks")
    done: int = 0
    note: str = ""  #: a few words beside the figures
    _owner: "Progress | None" = field(default=None, repr=False)

    def advance(self, amount: int) -> None:
        """`amount` more units are done."""
        self.done += amount
        if self._owner is not None:
            self._owner.changed(self)

    def update(self, *, total: int | None = None, note: str | None = None) -> None:
        """Correct the total or the note."""
        if total is not None:
            self.total = total
        if note is not None:
            self.note = note
        if self._owner is not None:
            self._owner.changed(self)


class Progress:
    """Receives events and drops them; renderers override `started`, `changed`, `ended`, `log` and `warn`."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    @contextmanager
    def task(self, name: str, total: int | None, unit: str = "bytes") -> Iterator[Task]:
        """A task that lasts as long as the block; it counts as failed if the block raises.

        Figures that come later, from a worker thread that was waited for longer than the block, are not shown.
        """
        task = Task(name, total, unit, _owner=self)
        self.started(task)
        try:
            yield task
        except BaseException:
            self._end(task, ok=False)
            raise
        self._end(task, ok=True)

    def _end(self, task: Task, *, ok: bool) -> None:
        task._owner = None
        self.ended(task, ok=ok)

    def log(self, text: str) -> None:
        """One line for people that is no problem."""

    def warn(self, text: str) -> None:
        """Something a person should know; the command ends with exit code 3. Kept in `warnings`."""
        self.warnings.append(text)

    def started(self, task: Task) -> None:
        """`task` begins."""

    def changed(self, task: Task) -> None:
        """`task` has new figures; called often, so a renderer limits its own rate."""

    def ended(self, task: Task, *, ok: bool) -> None:
        """`task` is over."""
