import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.buffers import Buffer
from core.errors import UsageError
from datastore import sha256

NAMES = [candidate.name for candidate in sha256.available()]


def reference(chunks: Sequence[Buffer], suffix: bytes = b"") -> list[bytes]:
    return [hashlib.sha256(bytes(chunk) + suffix).digest() for chunk in chunks]


@pytest.mark.parametrize("name", NAMES)
def test_every_length_up_to_300_has_hashlibs_digest(name: str) -> None:
    data = random.Random(1).randbytes(300)
    chunks = [data[:length] for length in range(301)]
    assert sha256.digest_many_with(name, chunks) == reference(chunks)
    for length in range(0, 301, 7):  # alone, so that nothing refills the lane
        assert sha256.digest_many_with(name, [data[:length]]) == reference([data[:length]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [0, 1, 31, 32, 55, 56, 63, 64])
def test_a_suffix_counts_as_the_end_of_each_chunk(name: str, length: int) -> None:
    rng = random.Random(length)
    suffix = rng.randbytes(length)
    chunks = [rng.randbytes(size) for size in range(150)]
    assert sha256.digest_many_with(name, chunks, suffix=suffix) == reference(chunks, suffix)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 5000), max_size=40), suffix=st.binary(max_size=64), seed=st.integers(0, 99))
def test_unequal_lengths_in_any_number_keep_their_order(
    name: str, lengths: list[int], suffix: bytes, seed: int
) -> None:
    rng = random.Random(seed)
    chunks = [rng.randbytes(length) for length in lengths]
    assert sha256.digest_many_with(name, chunks, suffix=suffix) == reference(chunks, suffix)


@pytest.mark.parametrize("name", NAMES)
def test_long_and_short_chunks_together_refill_the_lanes(name: str) -> None:
    rng = random.Random(3)
    chunks = [rng.randbytes(size) for size in [1 << 20, 5, 0, 700_001, 64, *([100_000] * 30), 3 << 19, 1]]
    assert sha256.digest_many_with(name, chunks) == reference(chunks)


@pytest.mark.parametrize("name", NAMES)
def test_views_bytearrays_and_unaligned_buffers_are_taken(name: str) -> None:
    block = memoryview(bytearray(os.urandom(1 << 16)))
    chunks: list[Buffer] = [block[start : start + 1000 + start] for start in range(37)]
    chunks += [bytearray(b"fleece"), b"fleece", memoryview(b"fleece").toreadonly()]
    assert sha256.digest_many_with(name, chunks) == reference(chunks)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_contiguous_buffer_is_refused(name: str) -> None:
    with pytest.raises(TypeError):
        sha256.digest_many_with(name, [b"good", "text"])  # type: ignore[list-item]
    with pytest.raises((BufferError, ValueError)):
        sha256.digest_many_with(name, [memoryview(b"every second byte")[::2]])


def test_nothing_has_no_digests() -> None:
    assert sha256.digest_many([]) == []


def test_a_suffix_too_long_for_the_lanes_is_hashed_all_the_same() -> None:
    chunks, suffix = [b"a" * 1000] * 20, b"s" * 65
    assert sha256.digest_many(chunks, suffix=suffix) == reference(chunks, suffix)


def test_buffers_are_released_after_hashing() -> None:
    data = bytearray(1000)
    sha256.digest_many([data] * 16)
    data.extend(b"a resize fails while a buffer is exported")


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_forces_an_implementation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEECE_SHA256", name)
    assert sha256.implementation() == sha256.implementation(1) == name
    chunks = [b"forced", b""] * 10
    assert sha256.digest_many(chunks, suffix=b"s") == reference(chunks, b"s")


def test_an_unknown_implementation_is_a_usage_error_that_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEECE_SHA256", "lanes64")
    with pytest.raises(UsageError, match=r"FLEECE_SHA256=lanes64: this machine has hashlib"):
        sha256.digest_many([b"x"])


def test_one_chunk_is_hashlibs_and_batches_go_to_the_quickest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEECE_SHA256", raising=False)
    monkeypatch.setattr(sha256, "_sha256", object())
    measured = [
        sha256.Implementation("hashlib", 1, 250e6),
        sha256.Implementation("lanes16", 16, 2450e6),
        sha256.Implementation("lanes8", 8, 900e6),
    ]
    monkeypatch.setattr(sha256, "_measured", measured)
    assert [sha256.implementation(count) for count in (1, 2, 16, 40)] == ["hashlib", "lanes16", "lanes16", "lanes16"]
    measured[0] = sha256.Implementation("hashlib", 1, 1700e6)
    assert [sha256.implementation(count) for count in (2, 8, 16)] == ["hashlib", "hashlib", "lanes16"]


def test_without_the_c_part_hashlib_serves() -> None:
    code = (
        "import sys; sys.modules['datastore._sha256'] = None\n"
        "from datastore import sha256\n"
        "assert [item.name for item in sha256.available()] == ['hashlib']\n"
        "print(sha256.implementation(), *(digest.hex() for digest in sha256.digest_many([b'fleece'] * 16)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "FLEECE_SHA256"}
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    expected = "c4df5370c58673dd0b4e5c79039e998bbf9d5ec6e4597b6bac45843941e0e3e8"
    assert output.stdout.split() == ["hashlib", *([expected] * 16)]


def test_measuring_covers_all_that_is_available() -> None:
    measured = sha256.measure(size=4096, runs=1)
    assert [item.name for item in measured] == NAMES
    assert all(item.rate > 0 for item in measured)


@pytest.mark.skipif(len(NAMES) == 1, reason="the C part is not built, or this CPU has no vector unit for it")
def test_the_gil_is_released_while_lanes_hash() -> None:
    """Another thread gets to run Python while one call hashes for tens of milliseconds."""
    chunks = [bytes(8 << 20)] * 16
    started, ticks, done = threading.Event(), 0, threading.Event()

    def work() -> None:
        started.set()
        sha256.digest_many_with(NAMES[1], chunks)
        done.set()

    thread = threading.Thread(target=work)
    switch = sys.getswitchinterval()
    thread.start()
    started.wait(10)
    try:
        sys.setswitchinterval(10)  # the other thread does not give the GIL back because of its age
        while not done.is_set():
            ticks += 1
            done.wait(0.001)
    finally:
        sys.setswitchinterval(switch)
        thread.join()
    assert ticks > 5
