"""The golden trees, stored by Fleece: the same indexes as PBS's client made, and as much of them reused."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import pxar.create
from agent.file_archives import ChangeDetection, FileArchiveOptions, FileArchiveReport, add_file_archives
from agent.specifications import parse_specifications
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.keyfile import KeyFile
from datastore.names import BackupType, Group
from pxar.patterns import parse_exclude_file
from repository.backup import SnapshotWriter
from repository.local import LocalRepository, open_local
from repository.verify import verify
from tests.pxar.backups import ext4, run_script

MIB = 1 << 20
GROUP = Group(BackupType.HOST, "tree")


@pytest.fixture
async def repo(store_folder: Path) -> AsyncIterator[LocalRepository]:
    repository = await open_local(store_folder)
    yield repository
    repository.close()


@pytest.fixture
def as_pbs_excludes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchored patterns below the root match nothing, which is an error of PBS."""

    def parsed(data: bytes, folder: bytes) -> Any:
        return parse_exclude_file(data, folder if folder == b"/" else b"/nowhere")

    monkeypatch.setattr(pxar.create, "parse_exclude_file", parsed)


async def back_up(
    repo: LocalRepository, day: int, root: Path, mode: ChangeDetection, codec: ChunkCodec | None = None
) -> FileArchiveReport:
    async with repo.backup(GROUP.at(1_767_225_600 + 86_400 * day)) as session:
        writer = SnapshotWriter(session, codec or ChunkCodec())
        wanted = parse_specifications([f"root.pxar:{root}"])
        (report,) = await add_file_archives(writer, repo, wanted, FileArchiveOptions(mode))
        await writer.finish()
    assert not writer.progress.warnings
    return report


@pytest.mark.usefixtures("as_pbs_excludes")
@pytest.mark.parametrize("mode", ["legacy", "data", "metadata"])
async def test_indexes_are_those_of_pbs(
    repo: LocalRepository, golden: Path, tmp_path: Path, mode: ChangeDetection
) -> None:
    known = json.loads((golden / "expected.json").read_text())
    with ext4(tmp_path, 128 * MIB) as mounted:
        root = mounted / "tree"
        for day, stage in enumerate((1, 2, 2, 3) if mode == "metadata" else (1, 2)):
            if day != 2:
                run_script(golden / "make_tree.py", root, "--stage", str(stage))
            report = await back_up(repo, day, root, mode)
            theirs = known[f"host/tree-{mode}/2026-01-0{day + 1}T00:00:00Z"]
            (latest,) = [info for info in await repo.snapshots() if info.snapshot.ctime % 86_400 == 0][-1:]
            async with repo.reader(latest.snapshot) as reader:
                names = [file.filename for file in latest.files if file.filename.endswith(".didx")]
                assert set(names) == {name for name in theirs if name.endswith(".didx")}
                for name in names:
                    index = await reader.open_index(name)
                    if mode != "metadata" or day == 0:
                        assert (index.size, index.count) == (theirs[name]["size"], theirs[name]["chunks"])
                        assert index.csum.hex() == theirs[name]["csum"], (day, name)
                    elif name.endswith(".ppxar.didx"):
                        assert index.size <= theirs[name]["size"]
            if day == 2:
                assert report.figures.read == 0
    results = await verify(repo, [info.snapshot for info in await repo.snapshots()], ChunkCodec())
    assert [result.errors for result in results] == [[]] * len(results)


@pytest.mark.usefixtures("as_pbs_excludes")
@pytest.mark.parametrize(
    ("group", "mode", "crypt_mode"),
    [
        ("enc", "metadata", CryptMode.ENCRYPT),
        ("enc-legacy", "legacy", CryptMode.ENCRYPT),
        ("signed", "data", CryptMode.SIGN_ONLY),
    ],
)
async def test_keyed_archives_are_those_of_pbs_and_are_reused(
    repo: LocalRepository, golden: Path, tmp_path: Path, group: str, mode: ChangeDetection, crypt_mode: CryptMode
) -> None:
    theirs = json.loads((golden / "expected.json").read_text())[f"host/{group}/2026-01-01T00:00:00Z"]
    key = KeyFile.parse((golden / "keys/plain.key").read_bytes(), where="plain.key").unlock(None, where="plain.key")
    codec = ChunkCodec(key, crypt_mode)
    with ext4(tmp_path, 128 * MIB) as mounted:
        root = mounted / "tree"
        run_script(golden / "make_tree.py", root, "--stage", "1", "--small", "--seed", "small-fleece")
        await back_up(repo, 0, root, mode, codec)
        (info,) = await repo.snapshots()
        async with repo.reader(info.snapshot) as reader:
            for name in [name for name in theirs if name.endswith(".didx")]:
                index = await reader.open_index(name)
                assert (index.size, index.count) == (theirs[name]["size"], theirs[name]["chunks"]), name
                assert index.csum.hex() == theirs[name]["csum"], name
        report = await back_up(repo, 1, root, "metadata", codec)
        if mode == "legacy":
            assert report.reason == "the previous snapshot has it in mode legacy"
        else:
            assert (report.reason, report.figures.read) == (None, 0)
        other = ChunkCodec(CryptKey(bytes(range(32))), crypt_mode)
        assert (await back_up(repo, 2, root, "metadata", other)).reason == "key changed"
        assert (await back_up(repo, 3, root, "metadata")).reason == "key changed"
    first, second, third, fourth = [info.snapshot for info in await repo.snapshots()]
    for snapshots, reading in (([first, second], codec), ([third], other), ([fourth], ChunkCodec())):
        assert [result.errors for result in await verify(repo, snapshots, reading)] == [[]] * len(snapshots)
