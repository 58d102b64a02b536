"""`--bwlimit`: a bucket of bytes that fills at a fixed rate, shared by all disks of a command."""

from typing import Final

import trio

from core.errors import UsageError

#: Seconds of the rate that may be spent at once after a pause.
BURST_S: Final = 0.25


class Throttle:
    """Lets bytes pass at `rate` per second on average.

    A caller takes more than there is by going into debt, and the next ones wait until it is paid, in the order in
    which they came. So a chunk larger than the bucket passes, and one stalled disk does not hold up another.
    """

    def __init__(self, rate: int) -> None:
        if rate < 1:
            raise UsageError("limit the rate to", f"{rate} bytes a second", "it must be at least 1")
        self.rate = rate
        #: When everything taken so far is paid, on trio's clock.
        self._paid_at = float("-inf")

    async def take(self, amount: int) -> None:
        """Wait until `amount` bytes may pass. Cancelled, they count as taken."""
        now = trio.current_time()
        start = max(self._paid_at, now - BURST_S)
        self._paid_at = start + amount / self.rate
        await trio.sleep_until(start)
