"""Without the optional libraries."""

import sys
from collections.abc import Callable

import pytest

from diskfs import worker
from diskfs.errors import ImageLibraryError
from diskfs.image import RAW
from tests.diskfs.reading import Files
from tests.diskfs.test_hostile import Damaged
from tests.support.disk_images import MadeImage


@pytest.mark.parametrize(("kind", "library"), [("ext4", "dissect.extfs"), ("ntfs", "dissect.ntfs")])
def test_it_is_said_which_library_is_missing_and_what_installs_it(
    kind: str,
    library: str,
    made: Callable[[str], MadeImage],
    files: Callable[..., Files],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.startswith((library, "diskfs.ext", "diskfs.ntfs"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    source = files(made(kind).path)
    image = source.image()
    assert [volume.kind for volume in image.volumes()] == [kind]
    with pytest.raises(ImageLibraryError, match=f"{library} is not installed; install them with: pip install") as error:
        image.file_system(RAW)
    server = worker.Server(Damaged(source, {}), source.sizes, 0)  # type: ignore[arg-type]
    document, _ = server.answer({"op": "entry", "volume": "raw"})
    assert document == {"error": "library", "why": error.value.why, "where": "raw"}
