from pathlib import Path

import pytest

from agent.registry import Registry, S3Place
from agent.s3_endpoints import EndpointRegistry, section_of
from agent.secrets import Source
from core.errors import FleeceError, NotFoundError, UsageError
from datastore.s3.endpoint import ContentMd5, Quirk

SECRET = "top/secret+KEY"
ALL = {
    "endpoint": "{{bucket}}.s3.{{region}}.amazonaws.com",
    "access-key": "AKIA",
    "port": 8443,
    "region": "eu-central-1",
    "path-style": True,
    "fingerprint": ":".join(["ab"] * 32),
    "fingerprint-only": True,
    "allow-http": False,
    "put-rate-limit": 10.5,
    "request-rate-limit": 100.0,
    "rate-in": "10M",
    "burst-in": "20M",
    "rate-out": "1MB",
    "burst-out": "2MB",
    "provider-quirks": ["skip-if-none-match-header"],
    "throttle-codes": ["403/TooBusy", "429"],
    "content-md5": "always",
    "proxy": "http://proxy.example.org:3128",
}


@pytest.fixture
def endpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EndpointRegistry:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    return EndpointRegistry(tmp_path / "state/s3-endpoints.toml", tmp_path / "state/secrets")


@pytest.fixture
def stores(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "state/datastores.toml")


def test_every_value_survives_the_file_and_reaches_the_client(endpoints: EndpointRegistry) -> None:
    endpoints.add("aws", section_of(ALL), SECRET)
    assert SECRET not in endpoints.path.read_text()
    read = EndpointRegistry(endpoints.path, endpoints.secrets.folder)
    assert read.section("aws").to_json() == ALL
    found = read.endpoint("aws")
    assert (found.secret, found.port, found.region) == (SECRET, 8443, "eu-central-1")
    assert (found.rate_in, found.burst_in, found.rate_out, found.burst_out) == (10 << 20, 20 << 20, 10**6, 2 * 10**6)
    assert (found.put_rate_limit, found.request_rate_limit) == (10.5, 100.0)
    assert found.quirks == {Quirk.SKIP_IF_NONE_MATCH}
    assert (found.content_md5, found.proxy) == (ContentMd5.ALWAYS, "http://proxy.example.org:3128")
    assert found.is_throttle(403, "TooBusy")
    assert not found.is_throttle(403, "AccessDenied")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"endpoint": "https://host"}, "no host name"),
        ({"region": "EU!"}, "no region"),
        ({"port": 70000}, "no port"),
        ({"fingerprint": "ab:cd"}, "32 bytes"),
        ({"provider-quirks": ["x"]}, "provider-quirks"),
        ({"throttle-codes": ["9/"]}, "no status"),
        ({"rate-in": "fast"}, "not a number"),
        ({"proxy": "socks5://host"}, "http://host"),
        ({"proxy": "http://user:word@host"}, "http://host"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be_right_is_refused_and_nothing_is_written(
    endpoints: EndpointRegistry, changes: dict[str, object], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        endpoints.add("aws", section_of({**ALL, **changes}), SECRET)
    assert not endpoints.path.exists()
    assert endpoints.secrets.source("s3-aws") is Source.MISSING


def test_one_that_is_there_is_not_replaced_but_changed(endpoints: EndpointRegistry) -> None:
    endpoints.add("aws", section_of(ALL), SECRET)
    with pytest.raises(UsageError, match="already"):
        endpoints.add("aws", section_of(ALL), "other")
    assert endpoints.endpoint("aws").secret == SECRET
    endpoints.update("aws", {"region": "us-east-1", "port": None, "access-key": "NEW"}, "other")
    found = endpoints.endpoint("aws")
    assert (found.region, found.port, found.access_key, found.secret) == ("us-east-1", None, "NEW", "other")
    with pytest.raises(UsageError, match="no region"):
        endpoints.update("aws", {"region": "!"}, "third")
    assert endpoints.endpoint("aws").secret == "other"


def test_one_in_use_is_not_removed_and_its_secret_goes_with_it(endpoints: EndpointRegistry, stores: Registry) -> None:
    endpoints.add("aws", section_of(ALL), SECRET)
    stores.add("main", Path("/cache/main"), s3=S3Place("aws", "bucket", 1 << 30))
    assert endpoints.listed(stores)[0].used_by == ("main",)
    with pytest.raises(FleeceError, match="main uses it"):
        endpoints.remove("aws", stores)
    assert stores.datastores()["main"].s3 == S3Place("aws", "bucket", 1 << 30)
    stores.remove("main")
    endpoints.remove("aws", stores)
    assert endpoints.sections() == {}
    assert list(endpoints.secrets.folder.iterdir()) == []
    with pytest.raises(NotFoundError, match="fleece s3 endpoint add"):
        endpoints.endpoint("aws")


def test_without_a_secret_the_error_names_both_ways(endpoints: EndpointRegistry) -> None:
    endpoints.add("aws", section_of(ALL), None)
    with pytest.raises(NotFoundError, match=r"update aws --secret-file FILE.*systemd credential s3-aws"):
        endpoints.endpoint("aws")


@pytest.mark.parametrize("text", ["[endpoint", "[endpoint]\naws = 1\n", '[endpoint.aws]\nendpoint = "x.y"\n'])
def test_a_damaged_list_is_an_error_and_stays_as_it_is(endpoints: EndpointRegistry, text: str) -> None:
    endpoints.path.parent.mkdir(parents=True)
    endpoints.path.write_text(text)
    with pytest.raises(FleeceError, match="S3 endpoints"):
        endpoints.add("aws", section_of(ALL), SECRET)
    assert endpoints.path.read_text() == text


def test_a_name_is_one_bucket_of_one_endpoint(stores: Registry) -> None:
    stores.add("main", Path("/cache/main"), s3=S3Place("aws", "bucket"))
    stores.add("main", Path("/cache/main"), s3=S3Place("aws", "bucket"))
    with pytest.raises(FleeceError, match="bucket 'bucket' of endpoint 'aws' already"):
        stores.add("main", Path("/cache/main"), s3=S3Place("aws", "other"))
    with pytest.raises(FleeceError, match="bucket 'bucket'"):
        stores.add("main", Path("/cache/main"))
