"""`fleece datastore` on folders in memory."""

from pathlib import Path

from .conftest import Fleece


def test_a_new_datastore_has_a_name_from_its_folder_and_can_be_used_by_it(fleece: Fleece, tmpfs: Path) -> None:
    path = tmpfs / "main"
    assert fleece.json("datastore", "create", path) == {"name": "main", "path": str(path), "created": True}
    assert fleece.json("datastore", "list") == [{"name": "main", "path": str(path), "source": "created"}]
    assert fleece.json("list", "--repo", "main") == []
    again = fleece("datastore", "create", path, "--output", "json")
    assert again.code == 2
    assert str(path) in again.error["where"]
    assert fleece.json("datastore", "remove", "main") == {"name": "main", "path": str(path), "destroyed": False}
    assert (path / ".chunks").is_dir()
    assert fleece("list", "--repo", "main").code == 1
    assert fleece.json("datastore", "create", path, "--reuse", "--name", "again")["created"] is False
    assert fleece.json("list", "--repo", "again") == []


def test_a_configured_repository_is_created_under_its_name(fleece: Fleece, tmpfs: Path) -> None:
    path = tmpfs / "x"
    (fleece.home / "fleece.toml").write_text(f'[repository.offsite]\npath = "{path}"\n')
    fleece.json("datastore", "create", "offsite")
    assert fleece.json("datastore", "list") == [{"name": "offsite", "path": str(path), "source": "configuration"}]
    refused = fleece("datastore", "remove", "offsite")
    assert refused.code == 1
    assert "configuration" in refused.err


def test_a_sync_level_that_the_configuration_would_overrule_is_refused(fleece: Fleece, tmpfs: Path) -> None:
    path = tmpfs / "x"
    config = fleece.home / "fleece.toml"
    config.write_text(f'[repository.offsite]\npath = "{path}"\n')
    for arguments in (["offsite"], [str(path), "--name", "offsite"]):
        refused = fleece("datastore", "create", *arguments, "--sync-level", "file", "--output", "json")
        assert (refused.code, refused.out) == (2, "")
        assert 'sync-level = "file" into [repository.offsite]' in refused.error["hint"]
        assert not path.exists()
    config.write_text(config.read_text() + 'sync-level = "file"\n')
    assert fleece.json("datastore", "create", "offsite", "--sync-level", "file")["created"] is True


def test_a_folder_with_other_things_in_it_is_refused_and_untouched(fleece: Fleece, tmpfs: Path) -> None:
    (tmpfs / "photo.jpg").write_bytes(b"x")
    answer = fleece("datastore", "create", tmpfs, "--name", "main")
    assert answer.code in (1, 2)
    assert [path.name for path in tmpfs.iterdir()] == ["photo.jpg"]
    assert fleece.json("datastore", "list") == []


def test_a_folder_that_is_no_datastore_is_not_registered(fleece: Fleece, tmpfs: Path) -> None:
    assert fleece("datastore", "create", tmpfs, "--reuse", "--name", "main").code == 1
    assert fleece("datastore", "create", tmpfs / "a b", "--output", "json").code == 2
    assert fleece.json("datastore", "list") == []


def test_data_is_destroyed_only_on_demand(fleece: Fleece, store_folder: Path) -> None:
    fleece.json("datastore", "create", store_folder, "--reuse", "--name", "main")
    conf = fleece.home / "x.conf"
    conf.write_text("x")
    fleece.json("backup", f"x.conf:{conf}", "--repo", "main", "--backup-id", "web")
    (store_folder / "foreign.txt").write_text("stays")
    assert fleece.json("datastore", "remove", "main", "--destroy-data")["destroyed"] is True
    assert [path.name for path in store_folder.iterdir()] == ["foreign.txt"]
