"""Rates and the gate, by a clock that jumps."""

import pytest
import trio
from trio.testing import MockClock

from datastore.s3.pacing import SUCCESSES_PER_STEP, Gate, TokenBucket


async def test_first_put_waits_for_its_token(autojump_clock: MockClock) -> None:
    bucket = TokenBucket(10)
    start = trio.current_time()
    await bucket.take()
    assert trio.current_time() - start == pytest.approx(0.1)
    await bucket.take()
    assert trio.current_time() - start == pytest.approx(0.2)


async def test_one_second_of_tokens_is_saved(autojump_clock: MockClock) -> None:
    bucket = TokenBucket(10)
    await trio.sleep(60)
    start = trio.current_time()
    for _ in range(10):
        await bucket.take()
    assert trio.current_time() == start
    await bucket.take()
    assert trio.current_time() - start == pytest.approx(0.1)


async def test_a_rate_below_one_a_second_still_saves_one(autojump_clock: MockClock) -> None:
    bucket = TokenBucket(0.1)
    await trio.sleep(60)
    start = trio.current_time()
    await bucket.take()
    assert trio.current_time() == start
    await bucket.take()
    assert trio.current_time() - start == pytest.approx(10)


async def test_tokens_go_to_who_came_first(autojump_clock: MockClock) -> None:
    bucket = TokenBucket(10)
    order: list[int] = []

    async def taker(number: int) -> None:
        await trio.sleep(number * 0.001)
        await bucket.take()
        order.append(number)

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(taker, number)
    assert order == list(range(20))
    assert trio.current_time() - start == pytest.approx(2.0)


async def test_a_cancelled_taker_gives_its_token_back(autojump_clock: MockClock) -> None:
    bucket = TokenBucket(1)
    with trio.move_on_after(0.5):
        await bucket.take(100)
    start = trio.current_time()
    await bucket.take()
    assert trio.current_time() - start == pytest.approx(0.5)


async def test_bandwidth_is_a_debt_that_is_waited_off(autojump_clock: MockClock) -> None:
    bucket = TokenBucket(1000, 2000)
    await bucket.take(5000)
    assert trio.current_time() == pytest.approx(5.0)


async def test_gate_halves_and_grows(autojump_clock: MockClock) -> None:
    gate = Gate(8)
    for expected in (4, 2, 1, 1):
        gate.throttled()
        assert gate.limit == expected
    for _ in range(SUCCESSES_PER_STEP - 1):
        gate.succeeded()
    assert gate.limit == 1
    gate.succeeded()
    assert gate.limit == 2
    for _ in range(SUCCESSES_PER_STEP * 20):
        gate.succeeded()
    assert gate.limit == 8


async def test_a_throttle_answer_begins_the_count_again(autojump_clock: MockClock) -> None:
    gate = Gate(8)
    gate.throttled()
    for _ in range(SUCCESSES_PER_STEP - 1):
        gate.succeeded()
    gate.throttled()
    gate.succeeded()
    assert gate.limit == 2


async def test_no_more_than_the_limit_run_at_once(autojump_clock: MockClock) -> None:
    gate = Gate(4)
    running, most = 0, []

    async def work(number: int) -> None:
        nonlocal running
        async with gate.slot():
            running += 1
            most.append(running)
            # The sixth to come, whichever that is: tasks run in any order.
            if len(most) == 6:
                gate.throttled()
            await trio.sleep(1)
            running -= 1

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(work, number)
    assert len(most) == 20
    assert max(most) == 4
    assert max(most[-8:]) == 2


async def test_a_cancelled_request_frees_its_place(autojump_clock: MockClock) -> None:
    gate = Gate(1)
    with trio.move_on_after(1):
        async with gate.slot():
            await trio.sleep_forever()
    with trio.fail_after(1):
        async with gate.slot():
            pass


async def test_a_cancelled_waiter_wakes_the_next_one(autojump_clock: MockClock) -> None:
    gate = Gate(1)
    through: list[int] = []

    async def wait(number: int, patience: float) -> None:
        with trio.move_on_after(patience):
            async with gate.slot():
                through.append(number)

    async with trio.open_nursery() as nursery, gate.slot():
        nursery.start_soon(wait, 1, 1.0)
        nursery.start_soon(wait, 2, 10.0)
        await trio.sleep(2)
    assert through == [2]
