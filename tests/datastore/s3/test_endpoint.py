"""Endpoints as configured."""

import pytest

from core.errors import UsageError
from datastore.s3.endpoint import check_bucket
from tests.datastore.s3.conftest import endpoint


def test_bucket_and_region_come_into_the_host_name() -> None:
    aws = endpoint(endpoint="{{bucket}}.s3.{{region}}.amazonaws.com", region="eu-central-1")
    assert aws.host("bkt") == "bkt.s3.eu-central-1.amazonaws.com"
    assert aws.path("bkt", "st1/.in-use") == "/st1/.in-use"
    assert aws.path("bkt") == "/"


def test_without_a_bucket_its_part_is_left_out() -> None:
    aws = endpoint(endpoint="{{bucket}}.s3.{{region}}.amazonaws.com", region="eu-central-1")
    assert aws.host(None) == "s3.eu-central-1.amazonaws.com"
    assert aws.path(None) == "/"


def test_path_style_has_the_bucket_in_the_path_and_the_port_in_the_authority() -> None:
    local = endpoint(endpoint="10.0.0.5", port=7480, path_style=True)
    assert local.authority("bkt") == "10.0.0.5:7480"
    assert local.path("bkt", "st1/a") == "/bkt/st1/a"
    assert local.path("bkt") == "/bkt/"
    assert endpoint(endpoint="[::1]", path_style=True, port=80).authority("bkt") == "[::1]:80"


def test_a_bucket_that_would_be_nowhere_is_refused() -> None:
    with pytest.raises(UsageError, match="neither in the host name nor in the path; set path-style"):
        endpoint(endpoint="s3.example.org").host("bkt")
    assert endpoint(endpoint="bkt.s3.example.org").host("bkt") == "bkt.s3.example.org"


@pytest.mark.parametrize(
    "template",
    [
        "",
        "https://s3.example.org",
        "s3.example.org:443",
        "s3.example.org/path",
        "s3.{{bucket}}.example.org",
        "{{bucket}}",
        "s3.{{region}}",
        "s3.{{zone}}.org",
        "-s3.example.org",
        "s3..org",
        "a" * 64 + ".org",
        "::1",
        "[10.0.0.5]",
        "s3.example.org\n",
        "user@s3.example.org",
    ],
)
def test_what_is_no_host_name_is_refused(template: str) -> None:
    with pytest.raises(UsageError, match="no host name, address or template"):
        endpoint(endpoint=template)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"id": "ab"}, "3 to 32"),
        ({"id": ".ab"}, "3 to 32"),
        ({"region": "EU"}, "no region"),
        ({"region": "a"}, "no region"),
        ({"port": 0}, "no port"),
        ({"port": 65536}, "no port"),
        ({"access_key": ""}, "access key is empty"),
        ({"secret": ""}, "secret key is empty"),
        ({"fingerprint": "00:11"}, "32 bytes"),
        ({"fingerprint_only": True}, "needs a fingerprint"),
        ({"put_rate_limit": 0}, "put-rate-limit must be more than 0"),
        ({"put_rate_limit": float("nan")}, "put-rate-limit must be more than 0"),
        ({"request_rate_limit": float("inf")}, "request-rate-limit must be more than 0"),
        ({"throttle_codes": ("403/",)}, "no status, code or STATUS/CODE"),
        ({"throttle_codes": ("",)}, "no status, code or STATUS/CODE"),
    ],
)
def test_values_that_cannot_be_right_are_refused(changes: dict[str, object], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        endpoint(**changes)


def test_the_secret_is_not_shown() -> None:
    assert "very secret" not in repr(endpoint(secret="very secret"))
    with pytest.raises(UsageError) as raised:
        endpoint(secret="very secret", port=0)
    assert "very secret" not in str(raised.value)


def test_https_unless_http_is_allowed() -> None:
    assert endpoint().scheme == "https"
    assert endpoint(allow_http=True).scheme == "http"


def test_fingerprints_are_compared_in_lower_case() -> None:
    text = ":".join(["AB"] * 32)
    assert endpoint(fingerprint=text).fingerprint == text.lower()


@pytest.mark.parametrize(
    ("codes", "status", "code", "expected"),
    [
        ((), 403, "AccessDenied", False),
        (("403",), 403, "AccessDenied", True),
        (("403",), 400, "AccessDenied", False),
        (("403/RateLimited",), 403, "RateLimited", True),
        (("403/RateLimited",), 403, "AccessDenied", False),
        (("TooBusy",), 400, "TooBusy", True),
        (("TooBusy", "403"), 403, "", True),
    ],
)
def test_more_answers_can_mean_slower(codes: tuple[str, ...], status: int, code: str, expected: bool) -> None:
    assert endpoint(throttle_codes=codes).is_throttle(status, code) is expected


@pytest.mark.parametrize("name", ["abc", "a-b", "a" * 63, "1bc"])
def test_buckets_that_pbs_allows(name: str) -> None:
    assert check_bucket(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "ab", "a" * 64, "-bc", "ab-", "a.b", "aBc", "a_b", "abc\n"),
        *("xn--abc", "sthree-abc", "amzn-s3-demo-a", "abc--ol-s3", "abc.mrap", "abc--x-s3"),
    ],
)
def test_buckets_that_pbs_refuses(name: str) -> None:
    with pytest.raises(UsageError, match="use the bucket"):
        check_bucket(name)
