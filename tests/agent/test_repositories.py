from pathlib import Path

import pytest

from agent.config import Config, parse_config
from agent.registry import Registry
from agent.repositories import LocalStore, is_remote, local_store
from core.errors import NotFoundError, UsageError

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
    "spec", ["host:store", "root@pam@host:store", "root@pam!tok@host:8007:store", "[fe80::1]:store"]
)
def test_a_datastore_on_a_server_is_refused_clearly(spec: str, registry: Registry) -> None:
    assert is_remote(spec)
    with pytest.raises(UsageError, match="this version knows local ones only"):
        local_store(spec, Config(), registry)


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
