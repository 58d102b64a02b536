"""Files on disk images in the index: asked for with `--images`, and found as the images themselves have them."""

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest

from agent.find_index.recording import Records
from repository.local import open_local
from tests.agent.conftest import Fleece
from tests.diskfs.reading import Files
from tests.support.cache import Unavailable
from tests.support.disk_images import MadeImage, partitioned
from tests.support.finder import Finder
from tests.support.stores import chunk_files
from tests.support.volume_groups import made_group

#: Each costs some starts of the process that looks into images.
PATTERNS = ["**", "/etc/fstab", "/etc/**"]
MORE = ["fstab", "/part2/etc/*", "part1/**", "p*/", "*.conf", "**/"]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEECE_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
async def finder(stored: Fleece, tmp_path: Path, made: Callable[[str], MadeImage]) -> AsyncIterator[Finder]:
    """Snapshots with a folder and a disk of FAT and ext4; of the last one a part of the disk is unknown."""
    fat, ext4 = made("fat16").path, made("ext4").path
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / "fstab").write_text("in an archive")
    image = tmp_path / "disk.raw"
    partitioned(image, [fat, ext4])
    for day in (1, 2, 3):
        if day == 3:
            partitioned(image, [fat, ext4, b"nobody knows what this is" * 4000])
        done = stored(
            "backup", f"etc.pxar:{folder}", f"disk.img:{image}", "--backup-type", "vm", "--backup-id", "100",
            "--backup-time", f"2026-01-0{day}T00:00:00Z",
        )  # fmt: skip
        assert done.code == 0, done
    assert stored.repo is not None
    repository = await open_local(stored.repo, name="main")
    yield Finder(repository)
    repository.close()


@pytest.mark.long
async def test_more_patterns_mean_the_same_in_the_index(finder: Finder) -> None:
    for pattern in MORE:
        direct = await finder.find(pattern, index=False, images=True)
        assert await finder.find(pattern, images=True) == direct, pattern


async def test_images_are_found_in_the_index_as_they_are(finder: Finder) -> None:
    plain = await finder.find("**", index=False)
    assert await finder.find("**") == plain
    direct = {pattern: await finder.find(pattern, index=False, images=True) for pattern in PATTERNS}
    assert len([one for one in direct["/etc/fstab"][0] if one.archive == "disk.img"]) == 3
    (warning,) = direct["**"][1]
    assert "part3" in warning
    for pattern in PATTERNS:
        assert await finder.find(pattern, images=True) == direct[pattern], pattern
    assert await finder.find("**") == plain
    named = await finder.find("fstab", "vm/100", images=True, archive="disk.img")
    assert {one.archive for one in named[0]} == {"disk.img"}
    # Equal disks are gone through once, and what is not whole is not kept.
    with closing((await finder.file()).open()) as connection:
        parts = [part for known in Records(connection).snapshots().values() for part in known.parts if part.image]
    assert [(part.why, part.state is None) for part in parts] == [("", False), ("", False), ("warned", True)]
    assert parts[0].state == parts[1].state
    # An update that nobody asked for images keeps them.
    assert (await finder.update()).indexed == 0
    await finder.repository.forget((await finder.repository.snapshots())[2].snapshot)
    for chunk in chunk_files(finder.folder):
        chunk.unlink()
    found, warnings = await finder.find("/etc/fstab", images=True)
    assert (len(found), warnings) == (2, [])
    assert len((await finder.find("**/fstab", images=True))[0]) == 4


async def test_what_lies_on_several_disks_is_gone_through_again_if_another_one_has_changed(
    stored: Fleece, tmp_path: Path, made: Callable[[str], MadeImage]
) -> None:
    try:
        paths, _ = made_group()
    except Unavailable as reason:  # not root, or neither packages nor a network to get them by
        pytest.skip(f"no volume group to test with: {reason}")
    disks = [Path(shutil.copy(path, tmp_path)) for path in paths]
    source = Files(*disks)
    runs = list(source.image()._found()[b"guest/stripe"].blocks.places(0, 2 << 20, 0))
    source.close()
    assert {run.disk for run in runs} == {0, 1}
    fat = made("fat12").path.read_bytes()
    # A name in the root directory, which lies on the first disk.
    for day, name in ((1, b"HELLO   TXT"), (2, b"ADIEU   TXT"), (3, b"ADIEU   TXT")):
        content = fat.replace(b"HELLO   TXT", name, 1)
        for run in runs:
            with disks[run.disk].open("r+b") as file:
                os.pwrite(file.fileno(), content[run.offset : run.offset + run.length], run.position)
        done = stored(
            "backup", f"a.img:{disks[0]}", f"b.img:{disks[1]}", "--backup-type", "vm", "--backup-id", "100",
            "--backup-time", f"2026-01-0{day}T00:00:00Z",
        )  # fmt: skip
        assert done.code == 0, done
    assert stored.repo is not None
    repository = await open_local(stored.repo, name="main")
    finder = Finder(repository)
    direct = await finder.find("/*.txt", index=False, images=True)
    assert [one.path.rpartition(b"/")[2] for one in direct[0]] == [b"hello.txt"] * 2 + [b"adieu.txt"] * 4
    assert await finder.find("/*.txt", images=True) == direct
    with closing((await finder.file()).open()) as connection:
        known = [one.parts for _, one in sorted(Records(connection).snapshots().items())]
    assert known[1] == known[2]
    repository.close()
