"""The history of a datastore's space: bounded, whole after any failure, and tolerant of what is in it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from datastore.errors import StoreError
from datastore.files import Owner
from datastore.usage_history import HISTORY_NAME, MAX_LINES, UsageSample, add_sample, read_history

DAY = 86_400
START = 20_000 * DAY


def add(base: Path, *samples: UsageSample) -> None:
    for sample in samples:
        add_sample(base, sample, Owner.of(base))


def sample(day: float, used: int = 5) -> UsageSample:
    return UsageSample(int(START + day * DAY), used, used - 1)


def test_samples_come_back_oldest_first_and_without_any_there_are_none(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    add(tmp_path, sample(0), sample(1), sample(2.5))
    assert read_history(tmp_path) == [sample(0), sample(1), sample(2.5)]
    assert (tmp_path / HISTORY_NAME).read_text().splitlines()[0] == f"{START} 5 4"
    assert (tmp_path / HISTORY_NAME).stat().st_mode & 0o777 == 0o644
    assert list((tmp_path / ".fleece/tmp").iterdir()) == []


def test_only_the_last_of_a_day_is_kept(tmp_path: Path) -> None:
    add(tmp_path, sample(0.1), sample(0.5, 6), sample(0.9, 7), sample(1.1, 8))
    assert read_history(tmp_path) == [sample(0.9, 7), sample(1.1, 8)]


def test_it_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / HISTORY_NAME
    path.parent.mkdir()
    path.write_text("".join(f"{START + day * DAY} 5 4\n" for day in range(MAX_LINES + 100)))
    add(tmp_path, sample(1000))
    found = read_history(tmp_path)
    assert (len(found), found[0], found[-1]) == (MAX_LINES, sample(101), sample(1000))


def test_samples_of_the_future_go(tmp_path: Path) -> None:
    add(tmp_path, sample(1), sample(5000), sample(2))
    assert read_history(tmp_path) == [sample(1), sample(2)]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\n\n",
        b"\0" * 4096,
        b"x y z\n",
        b"1 2\n",
        b"1 2 3 4\n",
        b"-1 2 3\n",
        b"1e3 2 3\n",
        b"9" * 5000,
        b"\xff\xfe 1 1",
    ],
)
def test_lines_that_are_none_are_passed_over_and_gone_with_the_next_sample(tmp_path: Path, damage: bytes) -> None:
    add(tmp_path, sample(1), sample(2))
    path = tmp_path / HISTORY_NAME
    path.write_bytes(damage + b"\n" + path.read_bytes() + damage)
    assert read_history(tmp_path) == [sample(1), sample(2)]
    add(tmp_path, sample(3))
    assert read_history(tmp_path) == [sample(1), sample(2), sample(3)]
    assert len(path.read_bytes().splitlines()) == 3


def too_long(path: Path) -> None:
    path.write_bytes(b"1 2 3\n" * 100_000)


def link(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes(b"1 2 3\n")
    path.symlink_to("elsewhere")


def pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [too_long, link, pipe])
def test_what_is_no_history_is_an_error_and_replaced_by_the_next_sample(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    (tmp_path / ".fleece").mkdir()
    make(tmp_path / HISTORY_NAME)
    with pytest.raises(StoreError, match="usage-history"):
        read_history(tmp_path)
    add(tmp_path, sample(3))
    assert read_history(tmp_path) == [sample(3)]
    if make is link:
        assert (tmp_path / ".fleece/elsewhere").read_bytes() == b"1 2 3\n"


def test_a_sample_that_cannot_be_written_leaves_the_history_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, sample(1))

    def full(fd: int, parts: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(StoreError, match="No space left"):
        add(tmp_path, sample(2))
    assert read_history(tmp_path) == [sample(1)]
    assert list((tmp_path / ".fleece/tmp").iterdir()) == []
