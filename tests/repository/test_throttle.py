"""The bucket behind `--bwlimit`, on a simulated clock."""

import pytest
import trio
from trio.testing import MockClock

from core.errors import UsageError
from repository.throttle import BURST_S, Throttle


async def test_rate_is_kept_by_all_takers_together(autojump_clock: MockClock) -> None:
    throttle = Throttle(1000)
    start = trio.current_time()

    async def take() -> None:
        for _ in range(10):
            await throttle.take(500)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(take)
    # The last piece is let through when those before it are paid.
    assert trio.current_time() - start == pytest.approx((15_000 - 500) / 1000 - BURST_S)


async def test_first_bytes_pass_at_once(autojump_clock: MockClock) -> None:
    start = trio.current_time()
    await Throttle(1).take(4 << 20)
    assert trio.current_time() == start


async def test_pause_is_not_saved_up(autojump_clock: MockClock) -> None:
    throttle = Throttle(1000)
    await throttle.take(1000)
    await trio.sleep(3600)
    start = trio.current_time()
    for _ in range(5):
        await throttle.take(1000)
    assert trio.current_time() - start == pytest.approx(4 - BURST_S)


@pytest.mark.parametrize("rate", [0, -1])
def test_rate_of_nothing_is_refused(rate: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        Throttle(rate)
