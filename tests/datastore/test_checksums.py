"""CRC-32, and the state in which it leaves the thread."""

import os
import zlib
from collections.abc import Callable

import pytest
from isal import isal_zlib

from datastore import sha256
from datastore.checksums import crc32

_sha256 = pytest.importorskip("datastore._sha256", reason="no C compiler where this was installed")
DATA = os.urandom(100_000)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 255, 256, 4096, 100_000])
def test_the_checksum_is_that_of_zlib(size: int) -> None:
    assert crc32(DATA[:size]) == crc32(memoryview(DATA)[:size]) == zlib.crc32(DATA[:size])


def hashing(count: int) -> Callable[[], object]:
    return lambda: sha256.digest_many([DATA] * count)


@pytest.mark.parametrize(
    "work", [lambda: crc32(DATA), hashing(1), hashing(2), hashing(5), hashing(16)], ids=["crc", "1", "2", "5", "16"]
)
def test_no_vector_registers_are_left_in_use_that_would_slow_hashing_down(work: Callable[[], object]) -> None:
    """What the CPU itself says of its registers, so this holds however busy it is."""
    _sha256.clear_registers()
    if _sha256.registers_in_use() is not False:
        # No other witness: without AVX nothing is left behind, and a rate says nothing on a busy machine.
        pytest.skip("this CPU does not tell, or its system never clears them")
    isal_zlib.crc32(DATA)  # leaves them in use where it has code for such a CPU
    work()
    assert _sha256.registers_in_use() is False
