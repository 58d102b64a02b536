from pathlib import Path

import pytest

from agent.registry import Registry
from core.errors import FleeceError


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "state/fleece/datastores.toml")


def test_what_was_added_is_read_back(registry: Registry) -> None:
    registry.add("main", Path('/backup/with "quotes" \\ and \n line'), "file")
    registry.add("other", Path("/backup/ähm"))
    found = Registry(registry.path).datastores()
    assert found["main"].path == Path('/backup/with "quotes" \\ and \n line')
    assert [found["main"].sync_level, found["other"].sync_level] == ["file", None]
    assert found["other"].path == Path("/backup/ähm")


def test_the_same_again_is_fine_and_another_folder_or_name_is_not(registry: Registry) -> None:
    registry.add("main", Path("/backup/main"))
    registry.add("main", Path("/backup/main"))
    with pytest.raises(FleeceError, match="the name 'main' belongs to /backup/main"):
        registry.add("main", Path("/elsewhere"))
    with pytest.raises(FleeceError, match="registered as 'main' already"):
        registry.add("second", Path("/backup/main"))


def test_removing_forgets_and_removing_again_changes_nothing(registry: Registry) -> None:
    registry.add("main", Path("/backup/main"))
    registry.remove("main")
    registry.remove("main")
    assert registry.datastores() == {}


@pytest.mark.parametrize(
    "text", ["[datastore", "[datastore.main]\n", '[datastore.main]\npath = "relative"\n', "[datastore]\nmain = 3\n"]
)
def test_a_damaged_list_is_an_error_and_stays_as_it_is(registry: Registry, text: str) -> None:
    registry.path.parent.mkdir(parents=True)
    registry.path.write_text(text)
    with pytest.raises(FleeceError, match="datastores"):
        registry.add("other", Path("/x"))
    assert registry.path.read_text() == text


def test_no_temporary_file_stays_when_the_list_cannot_be_replaced(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add("main", Path("/backup/main"))

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(FleeceError, match="No space left on device"):
        registry.add("other", Path("/x"))
    assert sorted(path.name for path in registry.path.parent.iterdir()) == [".datastores.lock", "datastores.toml"]
    assert list(registry.datastores()) == ["main"]
