"""How fast an endpoint is talked to: token buckets, and a gate that adapts to throttling (R13, R26)."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

#: Parallel requests of one endpoint unless configured otherwise.
DEFAULT_PARALLEL: Final = 8
#: Successes after which one more request may run beside the others.
SUCCESSES_PER_STEP: Final = 50


class TokenBucket:
    """Hands out tokens at a steady rate; starts empty, saves up to `burst` of them, first come first served.

    With `burst` of one second's worth these are the semantics of PBS's `put-rate-limit`.
    """

    def __init__(self, rate: float, burst: float | None = None) -> None:
        self._rate = rate
        self._burst = max(rate if burst is None else burst, 1.0)
        self._tokens = 0.0
        self._filled_at = trio.current_time()

    async def take(self, count: float = 1.0) -> None:
        """Wait until `count` tokens are there and take them; more than `burst` at once are a debt that is waited off.

        Cancelled, the tokens are given back.
        """
        now = trio.current_time()
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate) - count
        self._filled_at = now
        if self._tokens >= 0:
            return
        try:
            await trio.sleep(-self._tokens / self._rate)
        except trio.Cancelled:
            self._tokens += count
            raise


class Gate:
    """At most so many requests at once; halved by each throttle answer, one more after every 50 successes."""

    def __init__(self, limit: int = DEFAULT_PARALLEL) -> None:
        self._highest = limit
        self._limit = limit
        self._running = 0
        self._successes = 0
        self._waiting = trio.lowlevel.ParkingLot()

    @property
    def limit(self) -> int:
        """How many may run now."""
        return self._limit

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Be one of them while the block runs."""
        while self._running >= self._limit:
            await self._waiting.park()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._wake()

    def succeeded(self) -> None:
        """Count a request that was answered well."""
        self._successes += 1
        if self._successes >= SUCCESSES_PER_STEP:
            self._successes = 0
            self._limit = min(self._highest, self._limit + 1)
            self._wake()

    def throttled(self) -> None:
        """Note an answer that asks for fewer requests."""
        self._successes = 0
        self._limit = max(1, math.floor(self._limit / 2))

    def _wake(self) -> None:
        free = self._limit - self._running
        if free > 0:
            self._waiting.unpark(count=free)
