"""Datastores in buckets as the commands open them."""

from pathlib import Path

import pytest
import trio

from agent.config import Config, parse_config
from agent.registry import Datastore, Registry, S3Place
from agent.repositories import local_store, repository_at
from agent.s3_budget import Budget
from agent.s3_endpoints import EndpointRegistry, EndpointSection
from agent.s3_use import S3Use
from core.errors import FleeceError, NotFoundError
from datastore.s3.counters import Method
from datastore.s3.errors import S3BackendError
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_service import ACCESS_KEY, BUCKET, REGION, SECRET
from tests.support.s3_stores import NAME, adopt_folder, settings


@pytest.fixture
def endpoints(tmp_path: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch) -> EndpointRegistry:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    found = EndpointRegistry(tmp_path / "s3-endpoints.toml", tmp_path / "secrets")
    section = EndpointSection.model_validate(
        {
            "endpoint": "127.0.0.1",
            "port": s3_emulator.port,
            "region": REGION,
            "access-key": ACCESS_KEY,
            "path-style": True,
            "allow-http": True,
        }
    )
    found.add("emu", section, SECRET)
    return found


@pytest.fixture
def registry(tmp_path: Path, store_folder: Path, s3_emulator: S3Emulator) -> Registry:
    adopt_folder(settings(store_folder, s3_emulator.endpoint()))
    registry = Registry(tmp_path / "datastores.toml")
    registry.add(NAME, store_folder, "none", s3=S3Place("emu", BUCKET, 1 << 20))
    return registry


def test_a_bucket_is_found_by_name_by_its_cache_and_by_a_configured_name(registry: Registry) -> None:
    datastore = registry.datastores()[NAME]
    config = parse_config(f'[repository.nice]\npath = "{datastore.path}"\nns = "a"\nsync-level = "file"\n', "f")
    for spec in (NAME, str(datastore.path)):
        assert local_store(spec, Config(), registry).bucket == datastore
    found = local_store("nice", config, registry)
    assert (found.bucket, found.sync_level) == (datastore, "file")


async def test_a_repository_in_a_bucket_opens_without_a_request(
    registry: Registry, endpoints: EndpointRegistry, s3_emulator: S3Emulator
) -> None:
    use = S3Use(endpoints)
    async with repository_at(NAME, Config(), registry, lambda: use) as repository:
        assert await repository.namespaces()
        assert repository.name == NAME
    assert use.requests == 0
    assert use.endpoint == "emu"
    assert s3_emulator.requests() == []
    assert "no requests" in use.line()


async def test_an_endpoint_that_is_gone_is_named(registry: Registry, tmp_path: Path) -> None:
    use = S3Use(EndpointRegistry(tmp_path / "none.toml", tmp_path / "none"))
    with pytest.raises(NotFoundError, match=r"'emu'.*fleece s3 endpoint add"):
        async with repository_at(NAME, Config(), registry, lambda: use):
            raise AssertionError("opened")


async def test_a_folder_is_opened_without_the_rest(tmp_path: Path, store_folder: Path) -> None:
    def fail() -> S3Use:
        raise AssertionError("not needed")

    registry = Registry(tmp_path / "datastores.toml")
    async with repository_at(str(store_folder), Config(), registry, fail) as repository:
        assert await repository.namespaces()


async def test_new_keys_are_used_without_opening_the_store_again(
    registry: Registry, endpoints: EndpointRegistry, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.s3_use.WATCH_EVERY_S", 0.05)
    use = S3Use(endpoints)
    async with use.open(registry.datastores()[NAME]) as store:
        await store.client.head_bucket()
        s3_emulator.access_key, s3_emulator.secret = "AKIANEW", "new/secret"
        with pytest.raises(S3BackendError):
            await store.client.page(store.keys.metadata)
        (endpoints.secrets.folder / "s3-emu").chmod(0o644)
        endpoints.path.touch()
        await trio.sleep(0.2)  # refused, and the old ones stay
        assert store.client.link.endpoint.secret == SECRET
        endpoints.update("emu", {"access-key": "AKIANEW"}, "new/secret")
        with trio.fail_after(60):
            while store.client.link.endpoint.access_key != "AKIANEW":  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.02)
        assert not (await store.client.page(store.keys.metadata)).objects
    assert use.counters.totals().requests == {Method.HEAD: 1, Method.LIST: 2}


async def test_what_it_cost_has_the_prices_of_the_endpoint_and_a_budget_warns_once(
    registry: Registry, endpoints: EndpointRegistry
) -> None:
    config = parse_config(
        '[s3]\nbudget = "put=1"\n[s3.prices.emu]\ncurrency = "EUR"\nper-1000-writes = 1\n'
        "[s3.prices.default]\nper-1000-writes = 5\n",
        "f",
    )
    warned: list[str] = []
    use = S3Use(endpoints, config.s3, warn=warned.append)
    async with use.open(registry.datastores()[NAME]) as store:
        for number in range(3):
            await store.client.put(f"{NAME}/.cnt/vm/{number}/owner", [b"root@pam\n"])
    document = use.to_json()
    assert document["endpoint"] == "emu"
    assert document["requests"]["put"] == 3
    assert (document["uploaded"], document["currency"], document["estimate"]) == (27, "EUR", 0.003)
    assert document["by-work"]["other"]["requests"]["put"] == 3
    assert use.line() == "S3 endpoint emu: 3 PUT; 27 B sent, 0 B received; about 0.0030 EUR"
    assert warned == ["S3 budget: more than 1 PUT requests"]
    quiet = S3Use(endpoints, config.s3, budget=Budget(), warn=warned.append)
    async with quiet.open(registry.datastores()[NAME]) as store:
        for number in range(3):
            await store.client.put(f"{NAME}/.cnt/vm/{number}/owner", [b"root@pam\n"])
    assert len(warned) == 1


def test_patience_is_the_configurations_but_nobody_waits_long_at_a_terminal(endpoints: EndpointRegistry) -> None:
    use = S3Use(endpoints)
    assert use.policy().patience_s == 900
    assert use.policy(attended=True).patience_s == 30
    short = S3Use(endpoints, parse_config('[s3]\npatience = "5s"\n', "f").s3)
    assert (short.policy().patience_s, short.policy(attended=True).patience_s) == (5, 5)


def test_a_folder_is_no_bucket(endpoints: EndpointRegistry) -> None:
    with pytest.raises(FleeceError, match="lies in a folder"):
        S3Use(endpoints).settings(Datastore("x-x", Path("/x")))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[s3]\nbudget = "gets=1"\n', "f:2.*'gets=1' is none of"),
        ('[s3]\npatience = "long"\n', "f:2.*not a number"),
        ("[s3.prices.emu]\nper-1000-write = 1\n", "f:2.*did you mean 'per-1000-writes'"),
        ("[s3.prices.emu]\nper-gib-out = -1\n", "f:2.*greater than or equal"),
        ("[s3]\nbudgets = 1\n", "f:2.*did you mean 'budget'"),
    ],
)
def test_errors_of_the_section_name_the_line(text: str, why: str) -> None:
    with pytest.raises(FleeceError, match=why):
        parse_config(text, "f")
