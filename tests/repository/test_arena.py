"""The memory of streams."""

import random
import threading
from collections import deque

import pytest

from repository.arena import Arena, Region


def test_chunks_keep_their_bytes_however_they_are_given_back() -> None:
    choose = random.Random(3)
    arena = Arena(1 << 14)
    held: deque[tuple[Region, bytes]] = deque()
    opened = b""
    for number in range(20_000):
        size = choose.randrange(1, 200)
        while len(held) > 8:
            # Out of order, but the oldest soon: one thread alone cannot wait.
            index = choose.randrange(2)
            region, data = held[index]
            assert region.data == data
            region.free()
            del held[index]
        piece = bytes([number % 251]) * size
        arena.room(size)[:] = piece
        arena.grow(size)
        opened += piece
        assert arena.memory[arena.start : arena.head] == opened
        if len(opened) > choose.randrange(600):
            size = choose.randrange(1, len(opened) + 1)
            region = arena.cut(size)
            held.append((region, opened[:size]))
            opened = opened[size:]


def test_writer_waits_until_memory_is_given_back() -> None:
    arena = Arena(1000)
    for _ in range(2):
        arena.room(400)[:] = b"a" * 400
        arena.grow(400)
    first = arena.cut(400)
    second = arena.cut(400)
    looked = threading.Event()
    arena._check = looked.set
    done = threading.Event()

    def write() -> None:
        arena.room(300)[:] = b"b" * 300
        arena.grow(300)
        done.set()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    assert looked.wait(30)
    assert arena.starving
    assert not done.is_set()
    first.free()
    assert done.wait(30)
    assert not arena.starving
    assert second.data == b"a" * 400
    assert arena.memory[arena.start : arena.head] == b"b" * 300


def test_waiting_in_vain_ends_with_what_the_check_raises() -> None:
    arena = Arena(1000)
    arena.room(900)
    arena.grow(900)
    arena.cut(900)

    def give_up() -> None:
        raise InterruptedError

    arena._check = give_up
    with pytest.raises(InterruptedError):
        arena.room(200)
    assert not arena.starving


def test_more_than_the_arena_holds_is_refused() -> None:
    arena = Arena(1000)
    arena.room(900)
    arena.grow(900)
    with pytest.raises(ValueError, match="in an arena of 1000"):
        arena.room(200)
