from pathlib import Path

import pytest

from fusefs.errors import MountError
from fusefs.mountpoint import check_mountpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def test_an_empty_folder_is_fit_and_its_real_path_is_returned(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert check_mountpoint(link, None) == folder


def test_a_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(MountError, match=r"does not exist; make it: mkdir -p .*/none"):
        check_mountpoint(tmp_path / "none", None)


def test_a_file_is_no_mountpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MountError, match="is not a folder"):
        check_mountpoint(tmp_path / "file", None)


def test_a_folder_with_something_in_it_is_refused(folder: Path) -> None:
    (folder / ".hidden").touch()
    with pytest.raises(MountError, match="not empty"):
        check_mountpoint(folder, None)


def test_the_datastore_itself_and_folders_in_it_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MountError, match="is the datastore itself"):
        check_mountpoint(folder, folder)
    with pytest.raises(MountError, match="lies inside the datastore"):
        check_mountpoint(folder, tmp_path)


def test_a_folder_that_holds_the_datastore_is_refused(folder: Path) -> None:
    store = folder / "deep" / "store"
    store.mkdir(parents=True)
    with pytest.raises(MountError, match="lies inside it and would be hidden"):
        check_mountpoint(folder, store)


def test_a_link_does_not_hide_the_datastore(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / "inner").mkdir(parents=True)
    (tmp_path / "alias").symlink_to(store / "inner")
    with pytest.raises(MountError, match="lies inside the datastore"):
        check_mountpoint(tmp_path / "alias", store)


def test_a_neighbour_with_the_same_beginning_is_fit(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "mn"
    store.mkdir()
    assert check_mountpoint(folder, store) == folder
