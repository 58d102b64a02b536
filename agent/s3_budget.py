"""`--s3-budget`: what a job may cost before it warns, or before verify and prefetch stop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from core.errors import UsageError
from core.units import format_size, parse_size

_COUNTS: Final = ("get", "put", "post", "head", "delete")
_SIZES: Final = ("upload", "download")
_HARD: Final = "hard-limit"
_EXAMPLE: Final = "write get=10000,put=5000,download=50GiB, and with ,hard-limit verify stops there"


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one job."""

    thresholds: Mapping[str, int] = field(default_factory=dict)  #: PBS's names (`s3-get`, `s3-download`) -> value
    limit_requests: int | None = None  #: verify and prefetch stop there
    limit_downloaded: int | None = None  #: bytes, likewise

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `NAME=VALUE,...`: requests by PBS's methods, bytes as sizes; `hard-limit` makes limits of some.

        `requests` is the sum of all methods; it is a limit only, `hard-limit` has to stand beside it.

        Raises:
            UsageError: another form.
        """
        parts = [part.strip() for part in text.split(",")]
        values: dict[str, int] = {}
        for part in parts:
            name, equals, value = (one.strip() for one in part.partition("="))
            if part == _HARD:
                continue
            if not equals or name not in (*_COUNTS, *_SIZES, "requests"):
                known = ", ".join((*_COUNTS, *_SIZES, "requests", _HARD))
                raise _wrong(text, f"{part!r} is none of {known}")
            if name in values:
                raise _wrong(text, f"{name} is given twice")
            if name in _SIZES:
                values[name] = parse_size(value)
            elif value.isascii() and value.isdecimal() and len(value) < 16:
                values[name] = int(value)
            else:
                raise _wrong(text, f"{value!r} is no number of requests")
        hard = _HARD in parts
        requests = values.pop("requests", None)
        if requests is not None and not hard:
            raise _wrong(text, "requests is a limit only, so hard-limit belongs to it")
        if hard and requests is None and "download" not in values:
            raise _wrong(text, "hard-limit needs requests or download")
        return cls(
            {f"s3-{name}": value for name, value in values.items()},
            requests,
            values.get("download") if hard else None,
        )


def _wrong(text: str, why: str) -> UsageError:
    return UsageError("use the S3 budget", repr(text), why, _EXAMPLE)


def crossing(name: str, value: int, threshold: int) -> str:
    """The warning for a threshold of a command or job that was passed; `name` is PBS's."""
    return f"S3 budget: {_more(name, value, threshold)}"


def passed(store: str, name: str, value: int, threshold: int) -> str:
    """The warning for a threshold of the counters of the datastore `store`."""
    return f"S3 counters of {store}: {_more(name, value, threshold)} since they were set back"


def _more(name: str, value: int, threshold: int) -> str:
    method = name.removeprefix("s3-")
    if method in _SIZES:
        verb = "sent" if method == "upload" else "received"
        return f"{format_size(value)} {verb}, more than {format_size(threshold)}"
    return f"more than {threshold} {method.upper()} requests"


def parse_thresholds(text: str) -> dict[str, int]:
    """Read `get=10000,download=50GiB` or `none`: thresholds by PBS's names.

    Raises:
        UsageError: another form, or a limit.
    """
    if text.strip() == "none":
        return {}
    budget = Budget.parse(text)
    if budget.limit_requests is not None or budget.limit_downloaded is not None:
        raise _wrong(text, "counters have no limits, only thresholds")
    return dict(budget.thresholds)
