from pathlib import Path

import pytest

from agent.config import Config, parse_config
from agent.registry import Registry
from agent.repositories import LocalStore, local_store, remote_spec
from core.errors import NotFoundError, UsageError
from repository.remote.address import RemoteAddress

CONFIG = parse_config('[repository.named]\npath = "/backup/named"\nsync-level = "none"\n', "f")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "datastores.toml")
    registry.add("made", Path("/backup/made"), "file")
    return registry


@pytest.mark.parametrize(
    ("spec", "store"),
    [
        ("/backup/x", LocalStore(Path("/backup/x"))),
        ("named", LocalStore(Path("/backup/named"), "none")),
        ("made", LocalStore(Path("/backup/made"), "file")),
        ("/backup/named", LocalStore(Path("/backup/named"), "none")),
        ("/backup/made", LocalStore(Path("/backup/made"), "file")),
        ("./x", LocalStore(Path.cwd() / "x")),
    ],
)
def test_folders_configured_and_made_names_are_found(spec: str, store: LocalStore, registry: Registry) -> None:
    assert local_store(spec, CONFIG, registry) == store


def test_the_configuration_comes_before_what_commands_made(registry: Registry) -> None:
    registry.add("named", Path("/other"))
    assert local_store("named", CONFIG, registry).path == Path("/backup/named")


@pytest.mark.parametrize(
    ("spec", "address"),
    [
        ("host:store", RemoteAddress("store", "host")),
        ("root@pam@host:store", RemoteAddress("store", "host", 8007, "root@pam")),
        ("root@pam!tok@host:8008:store", RemoteAddress("store", "host", 8008, "root@pam!tok")),
        ("[fe80::1]:store", RemoteAddress("store", "fe80::1")),
    ],
)
def test_a_datastore_on_a_server_is_told_from_one_of_this_host(
    spec: str, address: RemoteAddress, registry: Registry
) -> None:
    found = remote_spec(spec, Config(), registry)
    assert found is not None
    assert (found.address, found.section) == (address, None)
    with pytest.raises(UsageError, match="only one of this host can be used for that"):
        local_store(spec, Config(), registry)
    for other in ("/backup/x", "named", "made"):
        assert remote_spec(other, CONFIG, registry) is None


def test_a_server_may_be_configured_under_a_name(registry: Registry) -> None:
    text = f"""
        [repository.offsite]
        server = "b@pbs!t@pbs.example.com:store1"
        fingerprint = "{":".join(["AB"] * 32)}"
        password-file = "/etc/fleece/token"
        rate-out = "10M"
    """
    config = parse_config(text, "f")
    for spec in ("offsite", "b@pbs!t@pbs.example.com:store1"):
        found = remote_spec(spec, config, registry)
        assert found is not None
        assert found.address == RemoteAddress("store1", "pbs.example.com", 8007, "b@pbs!t")
        assert found.section is config.repository["offsite"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('ns = "a"', "path is missing"),
        ('path = "/a"\nserver = "h:store"', "both path and server"),
        ('path = "/a"\nrate-in = "1M"', "rate-in means nothing for a datastore on this host"),
        ('server = "h:store"\nsync-level = "none"', "sync-level means nothing for a datastore on a server"),
        ('server = "h:store"\nfingerprint = "ab"', "not 32 pairs of hex digits"),
        ('server = "h:store"\nfingerprint-only = true', "needs a fingerprint"),
        ('server = "a/b"', "not of the form"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_config(f"[repository.named]\n{text}\n", "f")


def test_an_unknown_name_lists_the_known_ones(registry: Registry) -> None:
    with pytest.raises(NotFoundError, match="known names: made, named"):
        local_store("nmaed", CONFIG, registry)


def test_a_folder_named_without_a_slash_is_explained(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match=r"write \./store"):
        local_store("store", CONFIG, registry)
