import pytest

from agent.s3_budget import Budget, crossing
from core.errors import UsageError


def test_names_are_those_of_pbs_and_sizes_have_units() -> None:
    budget = Budget.parse("get=10, put=20,download=5GiB,upload=1MB")
    assert budget.thresholds == {"s3-get": 10, "s3-put": 20, "s3-download": 5 << 30, "s3-upload": 10**6}
    assert (budget.limit_requests, budget.limit_downloaded) == (None, None)


def test_a_hard_limit_is_one_of_requests_and_of_what_is_downloaded() -> None:
    budget = Budget.parse("download=1M,requests=7,hard-limit")
    assert (budget.limit_requests, budget.limit_downloaded) == (7, 1 << 20)
    assert budget.thresholds == {"s3-download": 1 << 20}


@pytest.mark.parametrize(
    "text",
    ["", "get", "get=", "get=-1", "get=1.5", "get=x", "gets=1", "get=1,get=2", "download=fast", "hard-limit",
     "put=3,hard-limit", "requests=3", "get=١"],
)  # fmt: skip
def test_everything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Budget.parse(text)
    assert caught.value.hint


def test_the_warning_names_what_was_passed() -> None:
    assert crossing("s3-get", 11, 10) == "S3 budget: more than 10 GET requests"
    assert crossing("s3-download", 3 << 20, 1 << 20) == "S3 budget: 3.00 MiB received, more than 1.00 MiB"
