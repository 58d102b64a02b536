"""Cuts by content: the vectors of the format, the forms of the hash against each other, injections."""

import hashlib
import random
import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import FleeceError, UsageError
from datastore import buzhash
from datastore.buzhash import TABLE, WINDOW, Finder, finder, window_hash
from datastore.chunker import ARCHIVE_AVERAGE, CATALOG_AVERAGE, Chunker, Cutter

KIB = 1 << 10
FORMS = buzhash.available()
#: The first MiB of 32-bit counters.
COUNTERS = struct.pack("<262144I", *range(262144))


def random_numbers() -> bytes:
    """2 MiB of the linear congruential generator that the format's vectors use."""
    value, out = 1, bytearray()
    for _ in range(2 << 20):
        value = (1664525 * value + 1013904223) & 0xFFFFFFFF
        out.append(value >> 24)
    return bytes(out)


@pytest.fixture(scope="module")
def generated() -> bytes:
    data = random_numbers()
    assert hashlib.sha256(data).hexdigest() == "0d0ee9444825592ad6327443d8db7927bcb4206f62a3676044caea14fa296a9f"
    return data


def pieces(data: bytes, sizes: int | Sequence[int]) -> Iterator[bytes]:
    """`data` in pieces of `sizes`, which repeat."""
    position, number = 0, 0
    rising = [sizes] if isinstance(sizes, int) else sizes
    while position < len(data):
        yield data[position : position + rising[number % len(rising)]]
        position += rising[number % len(rising)]
        number += 1


def cuts(data: bytes, average: int, *, blocks: int | Sequence[int] = 1 << 30, find: Finder | None = None) -> list[int]:
    """Where `Chunker` cuts `data`, the end included if something is left."""
    chunker = Chunker(average, find=find)
    found, done = [], 0
    for block in pieces(data, blocks):
        start = 0
        while start < len(block):
            cut = chunker.scan(memoryview(block)[start:])
            if not cut:
                break
            start += cut
            found.append(done + start)
        done += len(block)
    return found if found and found[-1] == done else [*found, done]


def cuts_as_described(data: bytes, average: int) -> list[int]:
    """The state machine of the format, word for word."""
    mask, minimum, maximum = 2 * average - 1, average // 4, average * 4
    found = []
    value, fill, length, window = 0, 0, 0, bytearray(WINDOW)
    for position, byte in enumerate(data, 1):
        turned = (value << 1 | value >> 31) & 0xFFFFFFFF
        if fill < WINDOW:
            window[fill] = byte
            fill += 1
            length += 1
            value = turned ^ TABLE[byte]
            continue
        index = length % WINDOW
        value = turned ^ TABLE[window[index]] ^ TABLE[byte]
        window[index] = byte
        length += 1
        if length >= maximum or (length >= minimum and (value & mask) >= mask - 2):
            found.append(position)
            value = fill = length = 0
    return found if found and found[-1] == len(data) else [*found, len(data)]


class Stream:
    """A stream behind a `Cutter`: the chunks it was cut into, and where injections went."""

    def __init__(self, average: int, find: Finder | None = None) -> None:
        self.cutter = Cutter(average, find=find)
        self.chunks: list[int] = []
        self.injected_after: list[int] = []  #: number of chunks before each injection
        self._open = 0

    def feed(self, block: bytes) -> None:
        rest = len(block)
        for event in self.cutter.feed(block):
            rest -= event
            self._event(event)
        assert rest >= 0
        self._open += rest
        assert self.cutter.open_length == self._open

    def finish(self) -> list[int]:
        for event in self.cutter.finish():
            assert event == 0
            self._event(event)
        if self._open:
            self.chunks.append(self._open)
        return self.chunks

    def _event(self, event: int) -> None:
        if self._open + event:
            self.chunks.append(self._open + event)
        if not event:
            self.injected_after.append(len(self.chunks))
        self._open = 0


def test_table_has_the_formats_checksum_and_its_values_cancel_out() -> None:
    packed = struct.pack("<256I", *TABLE)
    assert hashlib.sha256(packed).hexdigest() == "5b52080d38287da9d2e278466e3e0db7ec98e5e8b226f50612a56fa012b1f660"
    total = 0
    for value in TABLE:
        total ^= value
    assert total == 0


def test_the_c_part_has_the_same_table() -> None:
    native = pytest.importorskip("datastore._buzhash")
    assert native.table() == struct.pack("<256I", *TABLE)


def test_hash_of_a_window() -> None:
    assert window_hash(bytes(64)) == 0
    assert window_hash(bytes(range(64))) == 0xDC8B317B
    assert window_hash(bytes(range(65))) == 0x4D0CE068


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("average", "expected"),
    [(64 * KIB, [143377, 405521, 667665, 929809, 1048576]), (128 * KIB, [524288, 1048576])],
)
def test_counters_are_cut_as_the_format_says(form: str, average: int, expected: list[int]) -> None:
    assert cuts(COUNTERS, average, find=finder(form)) == expected


@pytest.mark.parametrize("form", FORMS)
def test_random_numbers_are_cut_as_the_format_says(form: str, generated: bytes) -> None:
    expected = [221442, 324467, 409725, 480986, 648111, 801103, 1202747, 1437587, 1851606, 2073681, 2097152]
    assert cuts(generated, 256 * KIB, find=finder(form)) == expected
    expected = [221442, 366548, 801103, 1881734, 2073681, 2097152]
    assert cuts(generated, 512 * KIB, find=finder(form)) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("byte", [0, 1, 0xFF])
def test_one_byte_over_and_over_is_cut_at_the_maximum(form: str, byte: int) -> None:
    data = bytes([byte]) * (1 << 20)
    assert cuts(data, 64 * KIB, find=finder(form)) == [262144, 524288, 786432, 1048576]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    length=st.integers(1, 60_000),
    average=st.sampled_from([1024, 2048, 4096]),
    blocks=st.lists(st.integers(1, 9000), min_size=1, max_size=6),
)
def test_every_form_cuts_like_the_state_machine_however_the_input_is_split(
    form: str, seed: int, length: int, average: int, blocks: list[int]
) -> None:
    # Seven different bytes: with few values there are far more repeated windows, and runs up to the maximum.
    rng = random.Random(seed)
    data = rng.randbytes(length) if seed % 2 else bytes(rng.choices(b"fleece!", k=length))
    expected = cuts_as_described(data, average)
    assert cuts(data, average, find=finder(form)) == expected
    assert cuts(data, average, blocks=blocks, find=finder(form)) == expected


@pytest.mark.parametrize("form", [form for form in FORMS if form != "python"])
def test_single_bytes_make_the_same_cuts_as_one_block(form: str) -> None:
    data = random.Random(4).randbytes(20_000)
    assert cuts(data, 1024, blocks=1, find=finder(form)) == cuts_as_described(data, 1024)


@pytest.mark.parametrize("form", FORMS)
def test_first_hit_counts_wherever_in_a_large_block_it_lies(form: str) -> None:
    """A hit planted at every kind of place: beside and inside the places that are gone through side by side."""
    rng = random.Random(9)
    find, reference = finder(form), finder("numpy")
    hits = {bits: planted(bits) for bits in (23, 30)}
    for number in range(40 if form != "python" else 4):
        size = rng.choice([300, 5000, 70_000, 300_000] if form != "python" else [300, 5000])
        data = bytearray(rng.randbytes(size))
        bits = rng.choice([23, 30])
        for _ in range(number % 4):
            place = rng.randrange(size - WINDOW)
            data[place : place + WINDOW] = hits[bits]
        history = rng.randbytes(WINDOW)
        first = rng.randint(1, size // 2)
        last = rng.randint(first, size)
        expected = reference(data, history, first, last, bits)
        assert find(data, history, first, last, bits) == expected
        if expected:
            assert find(data, history, expected, last, bits) == expected
            assert find(data, history, first, expected - 1, bits) == 0


def planted(bits: int) -> bytes:
    """64 bytes whose hash is a hit in `bits` bits, found by Gaussian elimination over the bits of the last bytes."""
    # Swapping byte values of two positions changes the hash by a known amount; 40 such changes span all 32 bits.
    rng = random.Random(bits)
    while True:
        window = bytearray(rng.randbytes(WINDOW))
        want = window_hash(window) ^ ((1 << bits) - 1)
        basis: dict[int, tuple[int, int]] = {}  # highest bit -> change of the hash, positions that make it
        others = bytearray(rng.randbytes(WINDOW))
        for place in range(WINDOW):
            changed = bytearray(window)
            changed[place] = others[place]
            change, places = window_hash(changed) ^ window_hash(window), 1 << place
            while change and change.bit_length() in basis:
                held, held_places = basis[change.bit_length()]
                change, places = change ^ held, places ^ held_places
            if change:
                basis[change.bit_length()] = change, places
        chosen = 0
        while want and want.bit_length() in basis:
            held, held_places = basis[want.bit_length()]
            want, chosen = want ^ held, chosen ^ held_places
        if not want:
            for place in range(WINDOW):
                if chosen >> place & 1:
                    window[place] = others[place]
            assert window_hash(window) == (1 << bits) - 1
            return bytes(window)


@pytest.mark.parametrize("form", [form for form in FORMS if form in {"plain", "avx512"}])
def test_the_c_part_refuses_positions_outside_the_data(form: str) -> None:
    find = finder(form)
    data, history = bytes(1000), bytes(64)
    for first, last, known in [(0, 10, 64), (1, 1001, 64), (1, 10, 62), (-5, 10, 64), (63, 70, 0)]:
        with pytest.raises(ValueError, match="positions outside the data"):
            find(data, history[:known], first, last, 20)
    for bits in (0, 1, 33):
        with pytest.raises(ValueError, match="positions outside the data"):
            find(data, history, 1, 1000, bits)
    assert find(data, b"", 64, 1000, 20) == 0
    assert find(data, history, 11, 10, 20) == 0


def test_limits_follow_from_the_average() -> None:
    chunker = Chunker()
    assert (chunker.average, chunker.minimum, chunker.maximum) == (4 << 20, 1 << 20, 16 << 20)
    assert (ARCHIVE_AVERAGE, CATALOG_AVERAGE) == (4 << 20, 512 << 10)


@pytest.mark.parametrize("average", [0, -4096, 512, 3 << 20, 8 << 20])
def test_an_average_that_makes_no_sense_is_refused(average: int) -> None:
    with pytest.raises(ValueError, match="the average is a power of two"):
        Chunker(average)


def test_the_environment_forces_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    for form in FORMS:
        monkeypatch.setenv("FLEECE_BUZHASH", form)
        assert cuts(COUNTERS[:200_000], 64 * KIB) == [143377, 200_000]
    monkeypatch.setenv("FLEECE_BUZHASH", "abacus")
    with pytest.raises(UsageError, match=r"FLEECE_BUZHASH=abacus: this machine has .*python"):
        Chunker()


def test_without_the_c_part_numpy_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEECE_BUZHASH", raising=False)
    monkeypatch.setattr(buzhash, "_buzhash", None)
    assert buzhash.available() == ["numpy", "python"]
    assert cuts(COUNTERS[:200_000], 64 * KIB) == [143377, 200_000]


SUGGESTIONS = (16, 10000, 100000, 120000, 300000, 700000)


def test_suggestions_in_one_block_win_over_cuts_by_content() -> None:
    stream = Stream(64 * KIB)
    for offset in SUGGESTIONS:
        stream.cutter.suggest(offset)
    stream.feed(COUNTERS)
    assert stream.finish() == [100000, 20000, 180000, 105521, 262144, 32335, 229809, 118767]


@pytest.mark.parametrize("block", [4 * KIB, 256 * KIB])
def test_a_suggestion_beyond_the_block_loses_to_a_cut_by_content(block: int) -> None:
    stream = Stream(64 * KIB)
    for offset in SUGGESTIONS:
        stream.cutter.suggest(offset)
    for piece in pieces(COUNTERS, block):
        stream.feed(piece)
    sizes = stream.finish()
    assert sizes[:5] == [100000, 20000, 23377, 156623, 105521]
    assert sum(sizes) == len(COUNTERS)


def test_a_suggestion_told_too_late_is_lost() -> None:
    late, plain = Stream(64 * KIB), Stream(64 * KIB)
    for stream in (late, plain):
        stream.feed(COUNTERS[:50_000])
    late.cutter.suggest(40_000)
    late.cutter.suggest(50_000)  # where the next block begins: upstream cannot cut there any more
    for stream in (late, plain):
        stream.feed(COUNTERS[50_000:])
    assert late.finish() == plain.finish()


def test_a_suggestion_beyond_the_maximum_waits_for_the_next_chunk() -> None:
    stream = Stream(64 * KIB)
    stream.cutter.suggest(300_000)
    stream.feed(bytes(400_000))
    assert stream.finish() == [262_144, 37_856, 100_000]


@pytest.mark.parametrize("block", [1 << 20, 256 * KIB, 32 * KIB, 4 * KIB, 1000])
def test_injections_and_suggestions_together(block: int) -> None:
    stream = Stream(64 * KIB)
    stream.cutter.suggest(32768)
    stream.cutter.suggest(65536)
    for boundary, size in [(32768, 1024), (131072, 2048), (657408, 512), (658432, 0)]:
        stream.cutter.inject(boundary, size)
    for piece in pieces(COUNTERS, block):
        stream.feed(piece)
    assert stream.cutter.position == len(COUNTERS) + 3584
    assert stream.finish() == [32768, 31744, 65536, 262144, 262144, 512, 262144, 131584]
    assert stream.injected_after == [1, 3, 5, 6]


@pytest.mark.parametrize("split", [1, 99_999, 100_000, 100_001, 150_000])
def test_an_injection_ends_the_chunk_wherever_blocks_end(split: int) -> None:
    stream = Stream(64 * KIB)
    stream.feed(COUNTERS[:split])
    if split <= 100_000:
        stream.cutter.inject(100_000, 5_000_000)
    else:
        with pytest.raises(FleeceError, match=f"the stream is at {split} already"):
            stream.cutter.inject(100_000, 5_000_000)
        return
    stream.cutter.inject(5_100_000, 7)  # the next group of the same list
    stream.feed(COUNTERS[split:110_000])
    assert stream.cutter.position == 5_110_007
    assert stream.finish() == [100_000, 10_000]
    assert stream.injected_after == [1, 1]


def test_an_unchanged_tree_makes_a_marker_injections_and_a_marker() -> None:
    stream = Stream(4 << 20)
    stream.cutter.inject(16, 1000)
    stream.cutter.inject(1016, 1000)
    stream.feed(bytes(32))
    assert stream.finish() == [16, 16]
    assert stream.injected_after == [1, 1]


def test_a_cut_and_an_injection_at_one_place_make_no_empty_chunk() -> None:
    stream = Stream(64 * KIB)
    stream.cutter.inject(143377, 50)
    stream.feed(COUNTERS[:143377])
    stream.feed(COUNTERS[143377:150_000])
    assert stream.finish() == [143377, 6623]
    assert stream.injected_after == [1]


def test_injections_at_the_end_come_out_of_finish() -> None:
    stream = Stream(64 * KIB)
    stream.feed(b"fleece")
    stream.cutter.inject(6, 10)
    stream.cutter.inject(16, 10)
    assert stream.finish() == [6]
    assert stream.injected_after == [1, 1]
    assert stream.cutter.position == 26


def test_injections_before_everything_find_no_open_chunk() -> None:
    stream = Stream(64 * KIB)
    stream.cutter.inject(0, 10)
    stream.feed(b"fleece")
    assert stream.finish() == [6]
    assert stream.injected_after == [0]


def test_an_injection_behind_the_end_is_an_error() -> None:
    cutter = Cutter(64 * KIB)
    cutter.inject(7, 10)
    assert cutter.feed(b"fleece") == []
    with pytest.raises(FleeceError, match="cannot inject chunks at 7: the stream ends at 6"):
        cutter.finish()


def test_an_injection_inside_an_earlier_one_is_an_error() -> None:
    cutter = Cutter(64 * KIB)
    cutter.inject(100, 10)
    for boundary, size in [(109, 1), (200, -1)]:
        with pytest.raises(FleeceError, match="the stream is at 110 already"):
            cutter.inject(boundary, size)


def test_hash_starts_afresh_behind_an_injection() -> None:
    rng = random.Random(2)
    before, after = rng.randbytes(500_000), rng.randbytes(500_000)
    stream = Stream(64 * KIB)
    stream.cutter.inject(len(before), 12345)
    stream.feed(before + after)
    first = cuts(before, 64 * KIB)
    second = cuts(after, 64 * KIB)
    sizes = [end - start for ends in (first, second) for start, end in zip([0, *ends], ends, strict=False)]
    assert stream.finish() == sizes


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    blocks=st.lists(st.integers(1, 20_000), min_size=1, max_size=5),
    places=st.lists(st.tuples(st.integers(0, 8000), st.integers(0, 5000)), max_size=12),
    suggestions=st.lists(st.integers(0, 70_000), max_size=20),
)
def test_whatever_is_asked_every_byte_and_injection_comes_out_once_in_its_place(
    seed: int, blocks: list[int], places: list[tuple[int, int]], suggestions: list[int]
) -> None:
    data = random.Random(seed).randbytes(100_000)
    stream = Stream(1024)
    for offset in sorted(suggestions):
        stream.cutter.suggest(offset)
    raw, injected, boundaries = 0, 0, []
    for gap, size in places:
        raw += gap
        boundaries.append(raw)
        stream.cutter.inject(raw + injected, size)
        injected += size
    for piece in pieces(data, blocks):
        stream.feed(piece)
    sizes = stream.finish()
    assert sum(sizes) == len(data)
    assert all(0 < size <= 4096 for size in sizes)
    assert [sum(sizes[:count]) for count in stream.injected_after] == boundaries
