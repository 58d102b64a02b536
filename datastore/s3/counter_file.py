"""Requests and bytes of a store since its counters were last set back, in a file of 4096 bytes as PBS 4.2 keeps it.

PBS maps such a file into the memory of all its processes. Slots of 32 bytes hold one number each, so that no two
numbers share a cache line there. Here several processes add what they have counted under a lock of the file.

Beside it lies, as JSON, since when is counted, and when the counters are to be set back. Nobody has to run at that
time: whoever adds to them later sets them back first.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from struct import Struct
from typing import Final, Self

from core.errors import FormatError
from datastore.files import FILE_MODE, Owner, make_folders, read_file, replace_file, store_errors

#: Relative to the cache folder.
COUNTERS_NAME: Final = ".fleece/s3-counters"
PERIOD_NAME: Final = ".fleece/s3-counters.json"
SIZE: Final = 4096
#: The first bytes of SHA-256 of `Proxmox shared request counters v1.0`.
MAGIC: Final = bytes.fromhex("e06e58fc1a4db405")
#: The order of the numbers, under the names of PBS's thresholds.
NAMES: Final = ("s3-get", "s3-delete", "s3-put", "s3-head", "s3-post", "s3-upload", "s3-download")
_SLOT: Final = Struct("<Q24x")
_MAGIC_SLOT: Final = Struct("8s24x")
_WRAP: Final = 1 << 64
_MAX_PERIOD_SIZE: Final = 4096
#: Unix seconds of the first time after a moment at which a schedule is due; None if there is none.
NextTime = Callable[[str, float], int | None]


@dataclass(frozen=True, slots=True)
class CounterValues:
    """What the file says, by the names of `NAMES`."""

    counts: Mapping[str, int]
    thresholds: Mapping[str, int]  #: 0: none

    @classmethod
    def empty(cls) -> Self:
        """Nothing counted, no thresholds."""
        return cls(dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0))

    @classmethod
    def parse(cls, data: bytes, *, where: str) -> Self:
        """Read the content of a file.

        Raises:
            FormatError: another length or magic.
        """
        if len(data) != SIZE:
            raise FormatError("read the counters", where, f"{len(data)} bytes, not {SIZE}")
        magic = _MAGIC_SLOT.unpack_from(data)[0]
        if magic != MAGIC:
            raise FormatError("read the counters", where, f"it begins with {magic.hex()}, not {MAGIC.hex()}")
        values = [_SLOT.unpack_from(data, _SLOT.size * (1 + number))[0] for number in range(2 * len(NAMES))]
        return cls(dict(zip(NAMES, values, strict=False)), dict(zip(NAMES, values[len(NAMES) :], strict=True)))

    def pack(self) -> bytes:
        """The `SIZE` bytes that `parse` reads back."""
        numbers = [*(self.counts[name] for name in NAMES), *(self.thresholds[name] for name in NAMES)]
        slots = [_MAGIC_SLOT.pack(MAGIC), *(_SLOT.pack(number % _WRAP) for number in numbers)]
        return b"".join(slots).ljust(SIZE, b"\0")

    def plus(self, counts: Mapping[str, int]) -> Self:
        """The same with `counts` added."""
        return type(self)({name: self.counts[name] + counts.get(name, 0) for name in NAMES}, self.thresholds)

    def set_back(self) -> Self:
        """The same with nothing counted."""
        return type(self)(dict.fromkeys(NAMES, 0), self.thresholds)


@dataclass(frozen=True, slots=True)
class CountingPeriod:
    """Since when is counted, and how long; times are Unix seconds."""

    since: int | None = None  #: None: unknown
    schedule: str | None = None  #: when the counters are set back; None: never
    until: int | None = None  #: when that is next; None: never, or it has not been reckoned yet

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read the content of a file; nothing is known from one that makes no sense."""
        try:
            found = json.loads(data)
            since, schedule, until = (found.get(name) for name in ("since", "schedule", "until"))
        except (ValueError, AttributeError, RecursionError):
            return cls()
        if not all(one is None or (type(one) is int and 0 <= one < 1 << 48) for one in (since, until)):
            return cls()
        return cls(since, schedule, until) if schedule is None or isinstance(schedule, str) else cls()

    def pack(self) -> bytes:
        """What `parse` reads back."""
        return json.dumps({"since": self.since, "schedule": self.schedule, "until": self.until}).encode()


class CounterFile:
    """The file of one cache folder, and the one beside it; quick system calls.

    Args:
        base: the cache folder.
        owner: of the files.
        next_time: reckons when a schedule is due; None: who asks cannot. Then a schedule waits for somebody who can.
        now: the clock, Unix seconds.
    """

    def __init__(
        self,
        base: Path,
        owner: Owner,
        *,
        next_time: NextTime | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._base, self._owner = base, owner
        self._path, self._period_path = base / COUNTERS_NAME, base / PERIOD_NAME
        self._now = now
        self.next_time = next_time

    def period(self) -> CountingPeriod:
        """Since when is counted, and how long. One that is over has been followed by another, which begins now.

        Raises:
            StoreError: unreadable.
        """
        found = self._read_period()
        return self._following(found) if self._is_over(found) else found

    def read(self) -> CounterValues:
        """What was counted; nothing without a file, or if the counters are due to be set back.

        Raises:
            FormatError: no such file.
            StoreError: unreadable.
        """
        with store_errors("read", self._path):
            try:
                data = read_file(self._path, limit=SIZE)
            except FileNotFoundError:
                return CounterValues.empty()
        values = CounterValues.parse(data, where=str(self._path))
        return values.set_back() if self._is_over(self._read_period()) else values

    def add(self, counts: Mapping[str, int]) -> CounterValues:
        """Add what this process has counted; a damaged file begins anew.

        Returns:
            the sums.

        Raises:
            StoreError: it cannot be written.
        """
        return self._change(lambda values: values.plus(counts))

    def reset(self) -> None:
        """Begin to count anew; thresholds and schedule stay. Errors as `add`."""
        self._change(CounterValues.set_back, self._following)

    def set_schedule(self, schedule: str | None) -> None:
        """Set when the counters are set back, for the first time when it is due after now; None: never.

        Errors as `add`.
        """
        self._change(
            lambda values: values,
            lambda period: replace(period, schedule=schedule, until=self._after(schedule, self._now())),
        )

    def set_thresholds(self, thresholds: Mapping[str, int]) -> None:
        """Set the thresholds; those not named are none. Errors as `add`."""
        wanted = {name: thresholds.get(name, 0) for name in NAMES}
        self._change(lambda values: CounterValues(values.counts, wanted))

    def _read_period(self) -> CountingPeriod:
        with store_errors("read", self._period_path):
            try:
                return CountingPeriod.parse(read_file(self._period_path, limit=_MAX_PERIOD_SIZE))
            except FileNotFoundError:
                return CountingPeriod()

    def _is_over(self, period: CountingPeriod) -> bool:
        return period.until is not None and period.until <= self._now()

    def _following(self, period: CountingPeriod) -> CountingPeriod:
        """The period that begins now."""
        now = self._now()
        return CountingPeriod(int(now), period.schedule, self._after(period.schedule, now))

    def _after(self, schedule: str | None, moment: float) -> int | None:
        return None if schedule is None or self.next_time is None else self.next_time(schedule, moment)

    def _change(
        self,
        change: Callable[[CounterValues], CounterValues],
        renew: Callable[[CountingPeriod], CountingPeriod] = lambda period: period,
    ) -> CounterValues:
        with store_errors("write", self._path):
            make_folders(self._base, ".fleece", self._owner)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                data = os.pread(fd, SIZE + 1, 0)
                if not data:
                    os.fchmod(fd, FILE_MODE)
                    self._owner.own(fd)
                known = period = self._read_period()
                try:
                    before = CounterValues.parse(data, where=str(self._path))
                except FormatError:
                    before, period = CounterValues.empty(), self._following(period)
                if self._is_over(period):
                    before, period = before.set_back(), self._following(period)
                elif period.schedule is not None and period.until is None:
                    period = replace(period, until=self._after(period.schedule, self._now()))
                values = change(before)
                os.pwrite(fd, values.pack(), 0)
                os.ftruncate(fd, SIZE)
                # Last: killed in between, the counters are set back once more, and do not miss it.
                if (period := renew(period)) != known:
                    replace_file(self._period_path, [period.pack()], self._owner)
            finally:
                os.close(fd)
        return values
