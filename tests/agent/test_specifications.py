import os
from pathlib import Path

import pytest

from agent.specifications import (
    Specification,
    SpecificationKind,
    parse_specification,
    parse_specifications,
    read_small_file,
)
from core.errors import SourceError, UsageError


@pytest.mark.parametrize(
    ("text", "specification"),
    [
        ("disk.img:/dev/vg/x", Specification("disk.img", SpecificationKind.IMAGE, "/dev/vg/x")),
        ("a.b.img:nbd://h:10809/x", Specification("a.b.img", SpecificationKind.IMAGE, "nbd://h:10809/x")),
        ("root-1_a.pxar:/a:b", Specification("root-1_a.pxar", SpecificationKind.ARCHIVE, "/a:b")),
        ("vm.conf:/etc/a:b", Specification("vm.conf", SpecificationKind.BLOB, "/etc/a:b")),
    ],
)
def test_name_and_source_are_split_at_the_first_colon(text: str, specification: Specification) -> None:
    assert parse_specification(text) == specification


@pytest.mark.parametrize(
    "text",
    [
        "",
        "disk.img",
        "disk.img:",
        ":/dev/x",
        "disk:/dev/x",
        "a/b.img:/x",
        "../x.img:/x",
        "x.exe:/x",
        ".img:/x",
        ".pxar:/x",
    ],
)
def test_other_forms_are_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError):
        parse_specification(text)


@pytest.mark.parametrize("name", ["a.b.pxar", "a b.pxar", "ä.pxar"])
def test_names_of_file_archives_are_plain(name: str) -> None:
    with pytest.raises(UsageError):
        parse_specification(f"{name}:/etc")


@pytest.mark.parametrize("name", ["index.json", "client.log"])
def test_names_that_the_format_needs_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="reserved"):
        parse_specification(f"{name}:/x")


def test_a_name_may_stand_once() -> None:
    with pytest.raises(UsageError, match="own name"):
        parse_specifications(["a.img:/x", "b.img:/x", "a.img:/y"])


def test_a_small_file_is_read_whole_and_a_folder_or_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"text")
    assert read_small_file(tmp_path / "x") == b"text"
    with pytest.raises(SourceError, match="Is a directory"):
        read_small_file(tmp_path)
    with pytest.raises(SourceError, match="no regular file"):
        read_small_file(Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="no regular file"):
        read_small_file(tmp_path / "pipe")
    with pytest.raises(SourceError, match="No such file"):
        read_small_file(tmp_path / "y")
