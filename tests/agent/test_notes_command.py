"""`fleece protect`, `unprotect`, `notes`, `owner`, `namespace`, as a person runs them."""

from pathlib import Path

import pytest

from .conftest import Fleece
from .test_prune_command import fill


def test_a_protected_snapshot_survives_forget_until_it_is_unprotected(stored: Fleece, store_folder: Path) -> None:
    (name,) = fill(store_folder, "vm/100", 1)
    assert stored.json("protect", "vm/100/latest") == [{"snapshot": name, "ns": "", "protected": True, "changed": True}]
    assert "already" in stored("protect", name).out
    answer = stored("forget", name, "--output", "json")
    assert answer.code == 1
    assert answer.error["hint"] == f"'fleece unprotect {name}' allows it"
    assert stored.json("unprotect", name)[0]["changed"] is True
    stored.json("forget", name)
    assert stored("protect", name).code == 1


def test_a_wrong_name_among_several_changes_nothing(stored: Fleece, store_folder: Path) -> None:
    (name,) = fill(store_folder, "vm/100", 1)
    assert stored("protect", name, "vm/1/latest").code == 1
    assert stored.json("show", name)["protected"] is False


def test_notes_are_shown_set_and_cleared(stored: Fleece, store_folder: Path) -> None:
    (name,) = fill(store_folder, "vm/100", 1)
    assert stored.json("notes", name) == {"snapshot": name, "ns": "", "notes": ""}
    stored.json("notes", name, "one\ntwo")
    assert stored("notes", name).out == "one\ntwo\n"
    assert stored.json("show", name)["comment"] == "one\ntwo"
    assert stored("notes", "vm/100", "-", stdin="größer").code == 0
    assert stored.json("notes", "vm/100") == {"group": "vm/100", "ns": "", "notes": "größer"}
    assert stored.json("notes", name, "--clear")["notes"] == ""
    for arguments in (("x",), (name, "a", "--clear"), ()):
        assert stored("notes", *arguments).code == 2
    assert stored("notes", "vm/1").code == 1
    assert stored("notes", "vm/100", "-", stdin="x" * 70000).code == 2


def test_the_owner_is_shown_and_changed(stored: Fleece, store_folder: Path) -> None:
    fill(store_folder, "vm/100", 1)
    assert stored.json("owner", "vm/100") == {"group": "vm/100", "ns": "", "owner": "root@pam"}
    stored.json("owner", "vm/100", "b@pbs!t")
    assert stored("owner", "vm/100").out == "b@pbs!t\n"
    stored.json("change-owner", "vm/100", "c@pbs")
    assert (store_folder / "vm/100/owner").read_text() == "c@pbs\n"
    assert stored("owner", "vm/100", "nobody").code == 2
    assert stored("owner", "vm/1", "a@b").code == 1


def test_namespaces_live_and_die(stored: Fleece, store_folder: Path) -> None:
    assert stored.json("namespace", "create", "a/b") == {"ns": "a/b", "created": True}
    assert stored.json("namespace", "create", "a") == {"ns": "a", "created": False}
    assert stored.json("namespace", "list") == [{"ns": ""}, {"ns": "a"}, {"ns": "a/b"}]
    assert stored.json("namespace", "list", "--ns", "a", "--max-depth", "0") == [{"ns": "a"}]
    (name,) = fill(store_folder, "vm/100", 1, ns="a/b")
    refused = stored("namespace", "delete", "a", "--output", "json")
    assert refused.code == 1
    assert "--delete-groups" in refused.error["hint"]
    stored.json("protect", name, "--ns", "a/b")
    kept = stored("namespace", "delete", "a", "--delete-groups", "--output", "json")
    assert kept.code == 3
    assert kept.document == {"removed": [], "kept": ["a/b", "a"], "protected": [{"ns": "a/b", "snapshot": name}]}
    moved = stored.json("namespace", "move", "a/b", "c")
    assert moved == {"moved": [{"ns": "c", "group": "vm/100"}], "failed": []}
    assert stored.json("show", name, "--ns", "c")["protected"] is True
    stored.json("unprotect", name, "--ns", "c")
    assert stored.json("namespace", "delete", "c", "--delete-groups")["removed"] == ["c"]
    assert stored.json("namespace", "delete", "a")["removed"] == ["a"]
    assert stored("namespace", "list").out == "No namespaces.\n"


@pytest.mark.parametrize(
    "arguments",
    [["create", ""], ["create", "a//b"], ["delete", ""], ["move", "a", "a/b"], ["create", "a", "--ns", "b"], []],
)
def test_namespaces_that_cannot_be_are_wrong_usage(arguments: list[str], stored: Fleece) -> None:
    answer = stored("namespace", *arguments)
    assert (answer.code, answer.out) == (2, "")
