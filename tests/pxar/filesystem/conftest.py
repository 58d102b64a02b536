"""Fixtures of the tests of metadata of real files."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pxar import filesystem, filesystem_python
from tests.pxar.filesystem.folders import READER
from tests.support.file_systems import mounted


@pytest.fixture(params=["c", "python"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each form of the calls, one after the other."""
    if request.param == "python":
        monkeypatch.setattr(filesystem, "_reader", filesystem_python)
    elif READER is filesystem_python:
        pytest.skip("the C part is not built")
    return str(request.param)


@pytest.fixture(scope="session")
def ext4_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("ext4", tmp_path_factory.mktemp("file-system")) as point:
        yield point


@pytest.fixture
def ext4(ext4_root: Path, request: pytest.FixtureRequest) -> Path:
    """An empty folder on ext4 with projects."""
    folder = ext4_root / str(len(list(ext4_root.iterdir())))
    folder.mkdir()
    return folder
