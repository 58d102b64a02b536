"""Calls that run in order in another thread, a bounded distance behind whoever makes them.

A restore reads in one thread and writes in another: while the kernel creates files, the next ones are looked up.
"""

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

#: Has the caller run something in another worker thread of its own, beside this one.
Beside: TypeAlias = Callable[[Callable[[], None]], None]

#: Bytes that the calls on their way may hold, and the weight of a call that holds none.
MAX_WEIGHT: Final = 32 << 20
_CALL_WEIGHT: Final = 8 << 10


class Behind:
    """A context manager: its end waits for all calls, or after an error gives up those that have not begun.

    The thread that made it is the only one that may use it.
    """

    def __init__(self, beside: Beside | None, max_weight: int = MAX_WEIGHT) -> None:
        """`beside` starts the thread that makes the calls; without, `put` makes each at once."""
        self._beside = beside
        self._max_weight = max_weight
        self._calls: deque[tuple[int, Callable[..., object], tuple[Any, ...]]] = deque()
        self._weight = 0  # of the calls that are not done
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if self._beside is not None:
            self._beside(self._run)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            with self._changed:
                if kind is not None:
                    self._calls.clear()
                self._closed = True
                self._changed.notify_all()
            if self._beside is not None:
                self._ended.wait()

    def put(self, weight: int, call: Callable[..., object], *arguments: Any) -> None:
        """Run `call(*arguments)` after all calls before it; waits while too much is on its way. `weight`: its bytes.

        Raises:
            BaseException: what an earlier call raised; no later one is run.
        """
        if self._beside is None:
            call(*arguments)
            return
        weight += _CALL_WEIGHT
        with self._changed:
            while self._weight and self._weight + weight > self._max_weight and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            self._weight += weight
            self._calls.append((weight, call, arguments))
            if len(self._calls) == 1:
                self._changed.notify_all()

    def drain(self) -> None:
        """Wait until every call has been made.

        Raises:
            BaseException: what one of them raised.
        """
        with self._changed:
            while self._weight and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error

    def _run(self) -> None:
        try:
            self._make_calls()
        finally:
            self._ended.set()

    def _make_calls(self) -> None:
        while True:
            with self._changed:
                while not self._calls and not self._closed:
                    self._changed.wait()
                if not self._calls:
                    return
                weight, call, arguments = self._calls.popleft()
            try:
                call(*arguments)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._calls.clear()
                    self._changed.notify_all()
                return
            del call, arguments  # what they hold is let go before the next wait
            with self._changed:
                self._weight -= weight
                # Whoever waits is woken when half is done, not for every call.
                if self._weight <= self._max_weight // 2:
                    self._changed.notify_all()
