"""Sections with secrets, whatever they are of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.config_types import Section
from agent.section_options import check_credential, given, unset_too
from agent.section_store import Kind, SectionStore, validated
from core.errors import FleeceError, NotFoundError, UsageError

KIND = Kind("lamp", "desk lamp", "lamp", "fleece lamp", "Lamps.", "lamp", "--key-file")


class Lamp(Section):
    """For tests."""

    watts: int
    room_name: str = "hall"


def checked(id: str, values: Mapping[str, Any]) -> Lamp:
    lamp = validated(Lamp, values, "desk lamp")
    if lamp.watts > 100:
        raise UsageError("use the desk lamp", id, "it would burn")
    return lamp


@pytest.fixture
def lamps(tmp_path: Path) -> SectionStore[Lamp]:
    return SectionStore(tmp_path / "lamps.toml", tmp_path / "secrets", KIND, checked)


def lamp(**values: Any) -> Lamp:
    return Lamp.model_validate(values)


def test_what_was_added_is_there_with_its_secret_until_it_is_forgotten(lamps: SectionStore[Lamp]) -> None:
    lamps.add("one", lamp(watts=5), "s3cret")
    lamps.add("two", lamp(watts=6), None)
    assert {id: one.watts for id, one in lamps.sections().items()} == {"one": 5, "two": 6}
    assert lamps.secret("one") == "s3cret"
    assert "s3cret" not in lamps.path.read_text()
    with pytest.raises(NotFoundError, match=r"'fleece lamp update two --key-file FILE' stores it.* lamp-two"):
        lamps.secret("two")
    assert lamps.update("one", {"room-name": "attic", "watts": 7}, "other") == lamp(watts=7, **{"room-name": "attic"})
    assert lamps.update("one", {"room-name": None}, None).room_name == "hall"
    assert lamps.secret("one") == "other"
    lamps.forget("one")
    with pytest.raises(NotFoundError, match="no lamp has that name; known lamps: two"):
        lamps.section("one")
    with pytest.raises(NotFoundError):
        lamps.secret("one")


def test_what_is_refused_changes_nothing(lamps: SectionStore[Lamp]) -> None:
    lamps.add("one", lamp(watts=5), "s3cret")
    before = lamps.path.read_bytes()
    with pytest.raises(UsageError, match="there is one of that name already; 'fleece lamp update one' changes it"):
        lamps.add("one", lamp(watts=9), "other")
    with pytest.raises(UsageError, match="it would burn"):
        lamps.add("two", lamp(watts=1000), None)
    for changes in ({"watts": 1000}, {"watts": "many"}, {"colour": "red"}, {"watts": None}):
        with pytest.raises(UsageError):
            lamps.update("one", changes, "other")

    def keep() -> None:
        raise FleeceError("remove the desk lamp", "one", "it is on")

    with pytest.raises(FleeceError, match="it is on"):
        lamps.forget("one", keep)
    assert (lamps.path.read_bytes(), lamps.secret("one")) == (before, "s3cret")


def test_a_file_that_nobody_of_ours_wrote_is_told(lamps: SectionStore[Lamp]) -> None:
    lamps.path.write_text("[lamp.one]\nwatts = 1000\n")
    with pytest.raises(FleeceError, match=r"lamp\.one: it would burn; repair or remove the file"):
        lamps.sections()


def test_values_of_a_command_line() -> None:
    changes = given(watts=5, room_name=None)
    assert changes == {"watts": 5}
    unset_too(changes, ["room-name"], Lamp, "a lamp")
    assert changes == {"watts": 5, "room-name": None}
    for name, why in (
        ("watts", "it is given as well"),
        ("colour", "a lamp has no such value; it has watts, room-"),
    ):
        with pytest.raises(UsageError, match=why):
            unset_too(changes, [name], Lamp, "a lamp")
    check_credential(True, None, None)
    check_credential(False, Path("x"), None)
    for file, descriptor in ((Path("x"), None), (None, 0)):
        with pytest.raises(UsageError, match="no secret is stored then"):
            check_credential(True, file, descriptor)
