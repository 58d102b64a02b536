"""Images that other programs made."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.diskfs.reading import Files


@pytest.fixture
def files() -> Iterator[Callable[..., Files]]:
    """Opens images; they are closed at the end."""
    opened: list[Files] = []

    def get(*paths: Path) -> Files:
        opened.append(Files(*paths))
        return opened[-1]

    yield get
    for one in opened:
        one.close()
