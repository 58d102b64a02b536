"""`fleece` as it is, but that it halts itself (SIGSTOP) at one point: python -m tests.support.stopping_fleece POINT ...

A point is one of

    qmp:N              before the N-th QMP command is sent, counted over all connections and without the negotiation
    command:NAME:N     before the N-th QMP command called NAME
    phase:WORDS        when the step WORDS has been written down, before anything of it is done
    read:N             before the N-th read of a disk
    finish             all is read, the manifest is not written

and with `:after` at its end, after that has been done (for a command, when QEMU has answered). The process sees its
real peers, so that killed there it is killed as it would be in life.
"""

import functools
import os
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar

from agent.main import main
from hypervisor.fleecing import Fleecing
from hypervisor.live_source import LiveSource
from hypervisor.qmp import Qmp
from repository.backup import SnapshotWriter

P = ParamSpec("P")
T = TypeVar("T")


class Stopper:
    """Counts what happens and halts at the point."""

    def __init__(self, point: str) -> None:
        self._point = point.removesuffix(":after")
        self._after = point.endswith(":after")
        self._seen: Counter[str] = Counter()

    def wrap(self, method: Callable[P, Awaitable[T]], names: Callable[..., list[str]]) -> Callable[P, Awaitable[T]]:
        """`method` that halts when one of the names its arguments give is the point."""

        @functools.wraps(method)
        async def watched(*args: P.args, **kwargs: P.kwargs) -> T:
            here = False
            for name in names(*args, **kwargs):
                self._seen[name] += 1
                here |= self._point in (name, f"{name}:{self._seen[name]}")
            if here and not self._after:
                os.kill(os.getpid(), signal.SIGSTOP)
            result = await method(*args, **kwargs)
            if here and self._after:
                os.kill(os.getpid(), signal.SIGSTOP)
            return result

        return watched


def install(point: str) -> None:
    """Watch everything that a point can name."""
    stopper = Stopper(point)

    def of_command(_self: Qmp, command: str, *_args: Any, **_more: Any) -> list[str]:
        return [] if command in ("query-version", "query-commands") else ["qmp", f"command:{command}"]

    setattr(Qmp, "execute", stopper.wrap(Qmp.execute, of_command))  # noqa: B010 - mypy forbids the assignment
    setattr(  # noqa: B010
        Fleecing, "_step", stopper.wrap(Fleecing._step, lambda _self, phase, **_more: [f"phase:{phase}"])
    )
    setattr(LiveSource, "read_into", stopper.wrap(LiveSource.read_into, lambda *_args: ["read"]))  # noqa: B010
    setattr(SnapshotWriter, "finish", stopper.wrap(SnapshotWriter.finish, lambda *_args, **_more: ["finish"]))  # noqa: B010


if __name__ == "__main__":
    install(sys.argv.pop(1))
    main()
