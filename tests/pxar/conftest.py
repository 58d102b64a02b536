"""Fixtures of the tests of file archives."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pxar import writing
from tests.pxar.backups import ext4
from tests.pxar.restored import MIB


@pytest.fixture(params=["c", "python"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each form of what writes contents, one after the other."""
    if request.param == "python":
        monkeypatch.setattr(writing, "_writing", None)
    elif vars(writing)["_writing"] is None:
        pytest.skip("the C part is not built")
    return str(request.param)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system."""
    with ext4(tmp_path, 128 * MIB) as folder:
        yield folder
