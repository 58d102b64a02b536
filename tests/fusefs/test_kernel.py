from pathlib import Path

from fusefs.kernel import is_served, mount_options, raise_read_ahead, unescape


def test_every_mount_is_read_only_and_carries_its_source() -> None:
    options = mount_options("/backup/store", ["allow_other"])
    assert {"ro", "nosuid", "nodev", "default_permissions", "subtype=fleece", "allow_other"} < options
    assert "fsname=/backup/store" in options


def test_a_comma_in_the_source_ends_no_option_and_other_alphabets_do_no_harm() -> None:
    assert r"fsname=/a\,b\\c" in mount_options(r"/a,b\c")
    assert "fsname=/b?ckup" in mount_options("/bäckup")


def test_a_comma_in_the_value_of_an_option_ends_no_option() -> None:
    assert r'context="a\,suid"' in mount_options("/store", ['context="a,suid"'])


def test_a_folder_beneath_a_mount_that_is_gone_does_not_answer_for_it(tmp_path: Path) -> None:
    assert not is_served(str(tmp_path))
    assert not is_served(str(tmp_path / "missing"))
    assert is_served("/proc")


def test_paths_in_mountinfo_are_read_with_their_spaces() -> None:
    assert unescape(r"/mnt/a\040b\134c") == r"/mnt/a b\c"


def test_what_is_no_mountpoint_has_no_read_ahead(tmp_path: Path) -> None:
    assert not raise_read_ahead(str(tmp_path))
