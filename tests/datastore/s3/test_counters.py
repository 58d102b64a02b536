"""What requests cost."""

import pytest

from core.units import GIB
from datastore.s3.counters import Counters, Method, Prices, TaskCost, Totals, Work, counted_as, counted_for
from datastore.s3.errors import S3BudgetError


def test_requests_count_for_the_work_they_are_made_for() -> None:
    counters = Counters()
    counters.request(Method.GET)
    with counted_as(Work.GC):
        counters.request(Method.LIST)
        counters.request(Method.POST)
        with counted_as(Work.VERIFY):
            counters.request(Method.GET)
            counters.downloaded(10)
        counters.request(Method.LIST)
    assert counters.totals(Work.GC).requests == {Method.LIST: 2, Method.POST: 1}
    assert counters.totals(Work.VERIFY).downloaded == 10
    assert counters.totals(Work.OTHER).requests == {Method.GET: 1}
    assert sum(counters.totals().requests.values()) == 5


def test_pbs_counts_by_http_method() -> None:
    counters = Counters()
    for method in Method:
        counters.request(method)
    counters.uploaded(3)
    counters.downloaded(4)
    assert counters.pbs() == {
        "s3-get": 2, "s3-put": 2, "s3-post": 1, "s3-head": 1, "s3-delete": 1, "s3-upload": 3, "s3-download": 4,
    }  # fmt: skip


def test_estimate_at_list_prices() -> None:
    counters = Counters()
    for _ in range(2000):
        counters.request(Method.PUT)
        counters.request(Method.GET)
        counters.request(Method.DELETE)
    counters.downloaded(10 * GIB)
    assert counters.totals().estimate(Prices()) == pytest.approx(0.01 + 0.0008 + 0.9)


def test_a_threshold_is_told_once_when_it_is_passed() -> None:
    told: list[tuple[str, int]] = []
    counters = Counters({"s3-put": 2, "s3-download": 100}, lambda name, value: told.append((name, value)))
    counters.request(Method.PUT)
    counters.request(Method.COPY)
    assert told == []
    counters.request(Method.PUT)
    counters.request(Method.PUT)
    counters.downloaded(1000)
    assert told == [("s3-put", 3), ("s3-download", 1000)]


@pytest.mark.parametrize("work", [Work.VERIFY, Work.PREFETCH])
def test_a_limit_stops_verify_and_prefetch(work: Work) -> None:
    counters = Counters(limit_requests=2, limit_downloaded=100)
    with counted_as(work):
        counters.request(Method.GET)
        counters.check_limit("here")
        counters.request(Method.GET)
        with pytest.raises(S3BudgetError, match="its limit of 2 requests"):
            counters.check_limit("here")
    other = Counters(limit_downloaded=100)
    with counted_as(work):
        other.downloaded(100)
        with pytest.raises(S3BudgetError, match="its limit of 100 bytes"):
            other.check_limit("here")


@pytest.mark.parametrize("work", [Work.BACKUP, Work.RESTORE, Work.GC])
def test_a_limit_never_stops_a_backup_or_restore(work: Work) -> None:
    counters = Counters(limit_requests=0, limit_downloaded=0)
    with counted_as(work):
        counters.request(Method.PUT)
        counters.check_limit("here")


class Words:
    """Says little."""

    def line(self, totals: Totals) -> str:
        return f"{sum(totals.requests.values())} requests, {totals.uploaded} sent, {totals.downloaded} received"

    def crossing(self, name: str, value: int) -> str:
        return f"{name} {value}"


def test_a_task_of_a_server_has_its_own_part_with_limits_and_thresholds_of_its_own() -> None:
    told: list[str] = []
    counters = Counters({"s3-get": 1}, limit_requests=3, words=Words())
    for _ in range(3):
        cost = TaskCost(told.append)
        with counted_for(cost), counted_as(Work.VERIFY):
            for _ in range(3):
                counters.check_limit("here")
                counters.request(Method.GET)
            counters.downloaded(10)
            with pytest.raises(S3BudgetError):
                counters.check_limit("here")
        assert cost.lines() == ["3 requests, 0 sent, 10 received"]
    assert told == ["s3-get 2"] * 3
    assert counters.totals().requests == {Method.GET: 9}
    assert counters.totals().downloaded == 30
    counters.request(Method.GET)
    assert cost.lines() == ["3 requests, 0 sent, 10 received"]


def test_a_task_tells_of_each_store_that_it_has_asked_something_of() -> None:
    stores = [Counters(words=Words()) for _ in range(3)] + [Counters()]
    cost = TaskCost()
    with counted_for(cost):
        for number in (2, 0, 2, 3):
            stores[number].request(Method.PUT)
            stores[number].uploaded(5)
        stores[1].check_limit("here")
    assert cost.lines() == ["2 requests, 10 sent, 0 received", "1 requests, 5 sent, 0 received"]
