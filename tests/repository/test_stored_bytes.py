"""Stored streams as a worker thread reads them."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from core.errors import FormatError
from repository.stored_bytes import StoredBytes


async def test_a_chunk_that_cannot_be_read_is_fetched_once_however_often_it_is_asked_for() -> None:
    fetched = []

    async def chunk(number: int) -> bytes:
        fetched.append(number)
        if number == 1:
            raise FormatError("read", "chunk 1", "it is bad")
        return bytes([number]) * 10

    index = SimpleNamespace(find=lambda offset: offset // 10, span=lambda number: (10 * number, 10))
    stored = StoredBytes(cast(Any, SimpleNamespace(size=30, archive=SimpleNamespace(index=index), chunk=chunk)))

    def read() -> None:
        for offset in (5, 8, 10, 15):
            with pytest.raises(FormatError, match="it is bad"):
                stored.read(offset, 8)
        assert bytes(stored.read(2, 3)) == bytes(3)
        assert bytes(stored.read(20, 3)) == b"\2\2\2"

    await trio.to_thread.run_sync(read)
    assert fetched == [0, 1, 2]
