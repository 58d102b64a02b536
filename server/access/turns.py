"""Turns at costly checks of secrets: one core for all of them, and one check at a time for each address.

A flood of wrong passwords would otherwise take the cores from the backups, and its queue the turn from everybody else.
"""

from collections.abc import Callable

import trio


class Turns:
    """Runs checks in a thread, one at a time; who has many waiting delays others by one of them."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[trio.Lock, list[object]]] = {}
        self._thread = trio.CapacityLimiter(1)

    async def run(self, peer: str, check: Callable[[], bool]) -> bool:
        """What `check` returns, when it is its turn."""
        lock, waiting = self._locks.setdefault(peer, (trio.Lock(), []))
        waiting.append(None)
        try:
            async with lock:
                return await trio.to_thread.run_sync(check, limiter=self._thread)
        finally:
            waiting.pop()
            if not waiting:
                self._locks.pop(peer, None)
