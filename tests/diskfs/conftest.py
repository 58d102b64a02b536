"""Images that other programs made."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.diskfs.reading import Files
from tests.support.cache import Unavailable
from tests.support.disk_images import MadeImage, made_image


@pytest.fixture
def made() -> Callable[[str], MadeImage]:
    """The image of a kind; skips where it cannot be made (no root, no loop devices, no packages)."""

    def get(kind: str) -> MadeImage:
        try:
            return made_image(kind)
        except Unavailable as reason:
            pytest.skip(f"no {kind} to test with: {reason}")

    return get


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
