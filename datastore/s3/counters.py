"""What talking to an endpoint costs: requests by kind of work and method, bytes both ways, an estimate in money (R46).

Every attempt that reached the server counts. The kind of work is a context variable: whoever runs a garbage collection
says so once, and all tasks below inherit it. So is the task of a server whose cost is to be told at its end.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from core.units import GIB
from datastore.s3.errors import S3BudgetError


class Work(Enum):
    """What requests are made for."""

    BACKUP = "backup"
    RESTORE = "restore"
    GC = "gc"
    VERIFY = "verify"
    REFRESH = "refresh"
    PREFETCH = "prefetch"
    OTHER = "other"


class Method(Enum):
    """Requests as they are billed."""

    GET = "get"
    HEAD = "head"
    LIST = "list"
    PUT = "put"
    COPY = "copy"
    POST = "post"
    DELETE = "delete"


#: How PBS counts: by HTTP method.
_PBS_METHOD: Final = {Method.LIST: "get", Method.COPY: "put"}
#: Work that a hard limit stops; a backup or restore goes on, whatever it costs.
STOPPABLE: Final = frozenset({Work.VERIFY, Work.PREFETCH})
_work: ContextVar[Work] = ContextVar("s3 work", default=Work.OTHER)
_cost: ContextVar["TaskCost | None"] = ContextVar("s3 cost", default=None)


@contextmanager
def counted_as(work: Work) -> Iterator[None]:
    """Count the requests of this block, and of tasks started in it, as `work`."""
    token = _work.set(work)
    try:
        yield
    finally:
        _work.reset(token)


@contextmanager
def counted_unless_named(work: Work) -> Iterator[None]:
    """As `counted_as`, unless somebody further out has said what it is for."""
    with counted_as(work) if _work.get() is Work.OTHER else nullcontext():
        yield


@contextmanager
def counted_for(cost: "TaskCost") -> Iterator[None]:
    """Count the requests of this block, and of tasks started in it, for `cost` as well."""
    token = _cost.set(cost)
    try:
        yield
    finally:
        _cost.reset(token)


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices in one currency; the defaults are list prices of AWS in USD."""

    per_1000_writes: float = 0.005  #: PUT, COPY, POST and LIST
    per_1000_reads: float = 0.0004  #: GET and HEAD
    per_gib_out: float = 0.09  #: bytes downloaded


@dataclass(frozen=True, slots=True)
class Totals:
    """Requests and bytes of one kind of work, or of all."""

    requests: Mapping[Method, int]
    uploaded: int  #: bytes of bodies
    downloaded: int  #: bytes of bodies

    def estimate(self, prices: Prices) -> float:
        """What they cost."""
        count = self.requests.get
        writes = sum(count(method, 0) for method in (Method.PUT, Method.COPY, Method.POST, Method.LIST))
        reads = count(Method.GET, 0) + count(Method.HEAD, 0)
        requests = writes * prices.per_1000_writes + reads * prices.per_1000_reads
        return requests / 1000 + self.downloaded / GIB * prices.per_gib_out


class CostWords(Protocol):
    """Says for people what counts mean; whoever opens a store knows its prices."""

    def line(self, totals: Totals) -> str:
        """What was needed, and an estimate of what it costs."""
        ...

    def crossing(self, name: str, value: int) -> str:
        """That the threshold `name` was passed."""
        ...


@dataclass(slots=True, eq=False)
class Counters:
    """Counts; may be shared by several clients.

    `thresholds` has PBS's names (`s3-get`, `s3-put`, `s3-post`, `s3-head`, `s3-delete`, `s3-upload`, `s3-download`);
    `crossed` is told once for each that is passed. The two limits stop verify and prefetch.
    """

    thresholds: Mapping[str, int] = field(default_factory=dict)
    crossed: Callable[[str, int], None] | None = None  #: name and value
    limit_requests: int | None = None
    limit_downloaded: int | None = None  #: bytes
    words: CostWords | None = None
    _requests: dict[tuple[Work, Method], int] = field(default_factory=dict)
    _bytes: dict[tuple[Work, str], int] = field(default_factory=dict)
    _passed: set[str] = field(default_factory=set)

    def request(self, method: Method) -> None:
        """Count one attempt that reached the server."""
        for counters in self._all():
            counters._add_request(method)

    def uploaded(self, size: int) -> None:
        """Count bytes of a body that was sent."""
        self._add_bytes("upload", size)

    def downloaded(self, size: int) -> None:
        """Count bytes of a body that came."""
        self._add_bytes("download", size)

    def check_limit(self, where: str) -> None:
        """Stop work that may be stopped.

        Raises:
            S3BudgetError: the current work is verify or prefetch, and a limit is reached.
        """
        work = _work.get()
        if work not in STOPPABLE:
            return
        # Limits are those of one task.
        spent = self._all()[-1].totals(work)
        requests = sum(spent.requests.values())
        if self.limit_requests is not None and requests >= self.limit_requests:
            raise S3BudgetError(work.value, where, f"its limit of {self.limit_requests} requests is reached")
        if self.limit_downloaded is not None and spent.downloaded >= self.limit_downloaded:
            raise S3BudgetError(work.value, where, f"its limit of {self.limit_downloaded} bytes is reached")

    def totals(self, work: Work | None = None) -> Totals:
        """What `work`, or everything, has taken so far."""
        requests: dict[Method, int] = {}
        for (kind, method), count in self._requests.items():
            if work in (None, kind):
                requests[method] = requests.get(method, 0) + count
        sizes = {"upload": 0, "download": 0}
        for (kind, way), size in self._bytes.items():
            if work in (None, kind):
                sizes[way] += size
        return Totals(requests, sizes["upload"], sizes["download"])

    def pbs(self) -> dict[str, int]:
        """All counts under PBS's seven names."""
        total = self.totals()
        counts = {f"s3-{name}": 0 for name in ("get", "put", "post", "head", "delete")}
        for method, count in total.requests.items():
            counts[f"s3-{_PBS_METHOD.get(method, method.value)}"] += count
        return {**counts, "s3-upload": total.uploaded, "s3-download": total.downloaded}

    def _all(self) -> "list[Counters]":
        """These, and what the task that runs now has of its own."""
        cost = _cost.get()
        return [self] if cost is None else [self, cost.part(self)]

    def _add_request(self, method: Method) -> None:
        key = (_work.get(), method)
        self._requests[key] = self._requests.get(key, 0) + 1
        self._compare(f"s3-{_PBS_METHOD.get(method, method.value)}")

    def _add_bytes(self, way: str, size: int) -> None:
        key = (_work.get(), way)
        for counters in self._all():
            counters._bytes[key] = counters._bytes.get(key, 0) + size
            counters._compare(f"s3-{way}")

    def _compare(self, name: str) -> None:
        threshold = self.thresholds.get(name)
        if threshold is None or name in self._passed or self.crossed is None:
            return
        value = self.pbs()[name]
        if value > threshold:
            self._passed.add(name)
            self.crossed(name, value)


class TaskCost:
    """What one task needs of all stores that it uses, where many tasks of a process use the same ones.

    Args:
        warn: told when the task passes a threshold; may be set later.
    """

    def __init__(self, warn: Callable[[str], None] = lambda text: None) -> None:
        self.warn = warn
        self._parts: list[tuple[Counters, Counters]] = []

    def part(self, counters: Counters) -> Counters:
        """The task's part of what `counters` count, with their thresholds."""
        for known, part in self._parts:
            if known is counters:
                return part
        part = Counters(counters.thresholds)
        if (words := counters.words) is not None:
            part.crossed = lambda name, value: self.warn(words.crossing(name, value))
        self._parts.append((counters, part))
        return part

    def lines(self) -> list[str]:
        """For people, a line for each store of which something was needed and that knows words for it."""
        costs = [(counters.words, part.totals()) for counters, part in self._parts]
        return [words.line(totals) for words, totals in costs if words is not None and totals.requests]
