"""What one command does with datastores in buckets: opens them, watches their keys, counts what it costs."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import trio

from agent.registry import Datastore
from agent.s3_budget import Budget, crossing, passed
from agent.s3_endpoints import EndpointRegistry
from core.errors import FleeceError, UsageError
from core.limits import in_io_thread
from core.nursery import open_nursery
from core.units import format_size
from datastore.errors import StoreError
from datastore.files import SyncLevel
from datastore.s3.counters import Counters, Method, Prices, Totals, Work
from datastore.s3.endpoint import Endpoint
from datastore.s3.link import EndpointLink, RetryPolicy
from datastore.s3.opening import S3Datastore, S3Settings, open_store

if TYPE_CHECKING:
    from agent.config import S3Section

_LOG = logging.getLogger(__name__)
#: Seconds between two looks whether the keys of an endpoint have changed.
WATCH_EVERY_S: Final = 5.0
#: Seconds for which a person at a terminal waits for an endpoint that does not answer.
_ATTENDED_S: Final = 30.0
_ATTENDED_ATTEMPTS: Final = 4
#: Prices of endpoints that have none of their own.
_DEFAULT: Final = "default"


class S3Use:
    """The buckets that one command, or one run of a job, uses; at most one endpoint at a time.

    Args:
        endpoints: those of this host.
        config: `[s3]` of the configuration.
        budget: the command's; else the configuration's.
        warn: told when a threshold is passed.
    """

    def __init__(
        self,
        endpoints: EndpointRegistry,
        config: "S3Section | None" = None,
        *,
        budget: Budget | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.endpoints: Final = endpoints
        self._config = config
        if budget is None:
            budget = Budget.parse(config.budget) if config is not None and config.budget is not None else Budget()
        self._budget = budget
        self._warn = warn
        self.counters: Final = Counters(
            thresholds=budget.thresholds,
            crossed=self._crossed,
            limit_requests=budget.limit_requests,
            limit_downloaded=budget.limit_downloaded,
            words=self,
        )
        self.endpoint: str | None = None  #: the endpoint that was used last; None: no store in a bucket was opened

    def _crossed(self, name: str, value: int) -> None:
        self._warn(self.crossing(name, value))

    def crossing(self, name: str, value: int) -> str:
        """See `CostWords.crossing`."""
        return crossing(name, value, self._budget.thresholds[name])

    # Opening.

    def policy(self, *, attended: bool = False) -> RetryPolicy:
        """How long requests are tried; `attended`: somebody waits for the answer, and nothing is lost without one."""
        from agent.cli_verify import parse_duration

        configured = None
        if self._config is not None and self._config.patience is not None:
            configured = parse_duration(self._config.patience)
        usual = RetryPolicy() if configured is None else RetryPolicy(patience_s=configured)
        if not attended:
            return usual
        return replace(usual, patience_s=min(usual.patience_s, _ATTENDED_S), attempts=_ATTENDED_ATTEMPTS)

    def use(self, id: str) -> Endpoint:
        """The endpoint with its secret; what follows is counted as its.

        Raises:
            NotFoundError: nobody knows it, or it has no secret.
            FleeceError: as `EndpointRegistry.endpoint`.
        """
        endpoint = self.endpoints.endpoint(id)
        self.endpoint = id
        return endpoint

    def settings(self, datastore: Datastore) -> S3Settings:
        """A registered datastore in a bucket as the storage wants it.

        Raises:
            NotFoundError: nobody knows its endpoint, or that has no secret.
            UsageError: names that cannot be.
        """
        place = datastore.s3
        if place is None:
            raise UsageError("use the datastore", datastore.name, "it lies in a folder, not in a bucket")
        return S3Settings(
            name=datastore.name,
            endpoint=self.use(place.endpoint),
            bucket=place.bucket,
            cache=datastore.path,
            cache_limit=place.max_cache_size,
            sync_level=SyncLevel(datastore.sync_level) if datastore.sync_level is not None else SyncLevel.FILESYSTEM,
        )

    @asynccontextmanager
    async def open(self, datastore: Datastore, *, attended: bool = False) -> AsyncIterator[S3Datastore]:
        """The datastore, open while the block runs. Nothing is sent for it; changed keys are picked up.

        Raises:
            FleeceError: as `settings` and `open_store`.
        """
        place = datastore.s3
        stamp = None if place is None else self.endpoints.stamp(place.endpoint)
        settings = self.settings(datastore)
        if place is not None and not await in_io_thread(datastore.path.is_dir):
            command = f"fleece datastore create {datastore.name} --s3 {place.endpoint} --bucket {place.bucket}"
            hint = f"'{command} --cache {datastore.path} --reuse --overwrite-in-use' makes it anew from the bucket"
            raise StoreError("open datastore", datastore.name, f"its cache {datastore.path} is not there", hint)
        policy = self.policy(attended=attended)
        async with open_store(settings, counters=self.counters, policy=policy) as store, open_nursery() as nursery:
            name = datastore.name
            store.s3.counter_file.next_time = next_time
            store.s3.crossed = lambda counter, value, limit: self._warn(passed(name, counter, value, limit))
            nursery.start_soon(_watch_keys, self.endpoints, store.client.link, stamp)
            try:
                yield store
            finally:
                nursery.cancel_scope.cancel()

    # The report.

    def prices(self) -> tuple[Prices, str]:
        """The prices that count here, and their currency."""
        sections = {} if self._config is None else self._config.prices
        section = sections.get(self.endpoint or "") or sections.get(_DEFAULT)
        if section is None:
            return Prices(), "USD"
        return Prices(section.per_1000_writes, section.per_1000_reads, section.per_gib_out), section.currency

    @property
    def requests(self) -> int:
        """How many were made."""
        return sum(self.counters.totals().requests.values())

    def to_json(self) -> dict[str, Any]:
        """What it cost: all together, and by kind of work."""
        prices, currency = self.prices()
        kinds = {work: self.counters.totals(work) for work in Work}
        return {
            "endpoint": self.endpoint,
            **_figures(self.counters.totals(), prices),
            "currency": currency,
            "by-work": {work.value: _figures(totals, prices) for work, totals in kinds.items() if totals.requests},
        }

    def line(self, totals: Totals | None = None) -> str:
        """The same in one line for people; of `totals`, which may be a part of it."""
        prices, currency = self.prices()
        totals = self.counters.totals() if totals is None else totals
        counts = [f"{totals.requests[method]} {method.value.upper()}" for method in Method if method in totals.requests]
        estimate = f"about {totals.estimate(prices):.4f} {currency}"
        bytes_ = f"{format_size(totals.uploaded)} sent, {format_size(totals.downloaded)} received"
        return f"S3 endpoint {self.endpoint}: {', '.join(counts) or 'no requests'}; {bytes_}; {estimate}"


def next_time(schedule: str, moment: float) -> int | None:
    """The first time (Unix seconds) after `moment` at which `schedule` is due; None if there is none."""
    from agent.calendar_times import CalendarTimes

    try:
        return CalendarTimes.parse(schedule).after(moment)
    except UsageError:  # written by somebody else
        return None


def _figures(totals: Totals, prices: Prices) -> dict[str, Any]:
    return {
        "requests": {method.value: totals.requests.get(method, 0) for method in Method},
        "uploaded": totals.uploaded,
        "downloaded": totals.downloaded,
        "estimate": round(totals.estimate(prices), 6),
    }


async def _watch_keys(endpoints: EndpointRegistry, link: EndpointLink, seen: object) -> None:
    """Sign with the endpoint's new keys once they are written; ends only by cancellation."""
    id = link.endpoint.id
    while True:
        await trio.sleep(WATCH_EVERY_S)
        stamp = await in_io_thread(endpoints.stamp, id)
        if stamp == seen:
            continue
        seen = stamp
        try:
            endpoint = await in_io_thread(endpoints.endpoint, id)
        except FleeceError as error:
            _LOG.warning("the keys of S3 endpoint %s stay as they were: %s", id, error)
            continue
        if (endpoint.access_key, endpoint.secret) != (link.endpoint.access_key, link.endpoint.secret):
            link.use_keys(endpoint.access_key, endpoint.secret)
            _LOG.info("S3 endpoint %s: signing with the new keys", id)
