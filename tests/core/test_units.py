import pytest

from core.errors import UsageError
from core.units import GIB, MIB, TIB, format_duration, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096b", 4096),
        ("4M", 4 * MIB),
        ("4MiB", 4 * MIB),
        ("4mb", 4_000_000),
        ("1.5G", 3 * GIB // 2),
        (" 10 GB ", 10_000_000_000),
        ("2t", 2 * TIB),
    ],
)
def test_sizes_are_read_with_binary_and_decimal_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "4X", "4MM", "1e3", "4,5G", "٤M", "4 M i B"])
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="write 64M, 4GiB or 10MB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (10 * 1024 - 1, "10239 B"),
        (10 * 1024, "10.0 KiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (150 * MIB, "150 MiB"),
        (1000 * MIB, "0.98 GiB"),
        (5000 * TIB, "5000 TiB"),
    ],
)
def test_sizes_are_written_with_few_digits(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.417, "0.42 s"),
        (12.4, "12 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
        (273600, "3 d 04 h"),
    ],
)
def test_durations_are_written_in_the_two_units_that_matter(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
