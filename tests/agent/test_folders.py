"""`fleece backup NAME.pxar:FOLDER` as a command."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.file_archives import FileArchiveReport
from pxar.create_report import MAX_MOUNTS, CreateReport
from tests.support.file_systems import mounted
from tests.support.fleece_command import FleeceCommand
from tests.support.warm_command import WarmCommand

FILES = {
    "etc/hosts": b"127.0.0.1 localhost\n",
    "etc/big": os.urandom(3 << 20),
    "cache/CACHEDIR.TAG": b"Signature: 8a477f597d28d172789f06886806bc55\n",
    "cache/thing": b"x" * 1000,
    "tmp/a.tmp": b"t",
    "lost+found/x": b"l",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name, data in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "link").symlink_to("etc/hosts")
    os.link(root / "etc/hosts", root / "same")
    os.mkfifo(root / "fifo")
    return root


@pytest.fixture
def fleece(store_folder: Path, tmp_path: Path, warm_command: WarmCommand) -> FleeceCommand:
    return FleeceCommand(tmp_path / "h", store_folder, warm=warm_command)


async def back_up(fleece: FleeceCommand, tree: Path, *options: str, code: int = 0) -> Any:
    return await fleece.json("backup", f"root.pxar:{tree}", "--backup-id", "web", *options, code=code)


def listed(document: Any) -> list[str]:
    return [file["filename"] for file in document["files"]]


async def test_each_mode_makes_its_archives(fleece: FleeceCommand, tree: Path) -> None:
    document = await back_up(fleece, tree)
    assert [archive["name"] for archive in document["archives"]] == ["root.pxar", "catalog.pcat1"]
    (figures,) = document["file-archives"]
    assert figures["change-detection-mode"] == "legacy"
    assert (figures["files"], figures["hardlinks"], figures["directories"]) == (6, 1, 5)
    assert figures["size"] == figures["read"] == sum(map(len, FILES.values()))
    document = await back_up(fleece, tree, "--change-detection-mode", "data")
    assert [archive["name"] for archive in document["archives"]] == ["root.ppxar", "root.mpxar"]
    document = await back_up(fleece, tree, "--change-detection-mode", "metadata")
    (figures,) = document["file-archives"]
    assert (figures["reason"], figures["read"], figures["files-reused"]) == (None, 0, 6)
    assert document["archives"][0]["mode"] == "incremental"
    (tree / "etc/hosts").write_bytes(b"changed\n")
    document = await back_up(fleece, tree, "--change-detection-mode", "metadata")
    assert document["file-archives"][0]["files-changed"] >= 1
    assert [len(listed(snapshot)) for snapshot in await fleece.json("list")] == [3, 3, 3, 3]
    assert {result["state"] for result in await fleece.json("verify")} == {"ok"}


async def test_reason_is_told_when_every_file_is_read(fleece: FleeceCommand, tree: Path) -> None:
    document = await back_up(fleece, tree, "--change-detection-mode", "metadata")
    assert document["file-archives"][0]["reason"] == "no previous snapshot that is good"
    await back_up(fleece, tree)
    document = await back_up(fleece, tree, "--change-detection-mode", "metadata")
    assert document["file-archives"][0]["reason"] == "the previous snapshot has it in mode legacy"


async def test_mode_of_the_configuration(fleece: FleeceCommand, tree: Path) -> None:
    fleece.home.mkdir()
    fleece.config.write_text('change-detection-mode = "metadata"\n')
    assert (await back_up(fleece, tree))["file-archives"][0]["change-detection-mode"] == "metadata"
    document = await back_up(fleece, tree, "--change-detection-mode", "data")
    assert document["file-archives"][0]["change-detection-mode"] == "data"
    fleece.config.write_text('change-detection-mode = "none"\n')
    assert (await fleece.run("backup", f"root.pxar:{tree}")).code == 2


async def test_what_the_options_leave_out(fleece: FleeceCommand, tree: Path, tmp_path: Path) -> None:
    patterns = tmp_path / "patterns"
    patterns.write_text("# comment\n\n*.tmp\n")
    options = ["--exclude", "/etc/big", "--exclude-from", str(patterns), "--exclude-caches", "--skip-lost-and-found"]
    (figures,) = (await back_up(fleece, tree, *options))["file-archives"]
    assert figures["files"] == 2  # etc/hosts and the tag
    assert figures["size"] == len(FILES["etc/hosts"]) + len(FILES["cache/CACHEDIR.TAG"])
    outcome = await fleece.run("backup", f"root.pxar:{tree}", "--entries-max", "3")
    assert outcome.code == 1
    assert outcome.error["hint"] == "--entries-max allows more"
    patterns.write_text("fine\n[bad\n")
    outcome = await fleece.run("backup", f"root.pxar:{tree}", "--exclude-from", str(patterns))
    assert (outcome.code, outcome.error["where"]) == (2, f"{patterns}:2")


async def test_other_file_systems_are_entered_as_the_options_say(fleece: FleeceCommand, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "b").mkdir(parents=True)
    first, second, inner = 1, 2, 4  # the sizes of their files, so that a sum tells which ones are stored
    with mounted("ext4", tree) as one:
        (one / "file").write_bytes(bytes(first))
        with mounted("ext4", one) as three, mounted("ext4", tree / "b") as two:
            (two / "file").write_bytes(bytes(second))
            (three / "file").write_bytes(bytes(inner))

            async def stored(*options: str) -> tuple[int, list[str]]:
                (figures,) = (await back_up(fleece, tree, *options, "--exclude", "*.img"))["file-archives"]
                return figures["size"], [mount["path"] for mount in figures["mount-points"]]

            assert await stored() == (0, ["/b/ext4", "/ext4"])
            assert await stored("--include-dev", str(two)) == (second, ["/ext4"])
            # What is below a mount point that is not entered is not reached.
            assert await stored("--include-dev", str(three)) == (0, ["/b/ext4", "/ext4"])
            both = ["--include-dev", str(three), "--include-dev", str(one)]
            assert await stored(*both) == (first + inner, ["/b/ext4"])
            assert await stored("--all-file-systems") == (first + inner + second, [])


def test_mount_points_that_are_not_entered_are_named() -> None:
    figures = CreateReport()
    for number in range(MAX_MOUNTS + 2):
        figures.skip_mount(b"mnt/\n%d" % number)
    report = FileArchiveReport("root.pxar", "/", "data", "mode data reads every file", figures)
    assert figures.excluded == MAX_MOUNTS + 2
    line = report.lines()[-1]
    assert line.startswith(r"root.pxar: mount points stored as empty folders: 'mnt/\n0', 'mnt/\n1', ")
    assert line.endswith(" and 2 more")
    assert report.to_json()["mount-points"][0] == {"path": "/mnt/\n0"}
    assert len(report.to_json()["mount-points"]) == MAX_MOUNTS


async def test_attributes_that_the_kernel_does_not_return_are_left_out_on_demand(
    fleece: FleeceCommand, tmp_path: Path
) -> None:
    with mounted("btrfs", tmp_path) as tree:
        (tree / "file").write_bytes(b"content")
        for number in range(300):  # more than 64 KiB of names
            os.setxattr(tree / "file", f"trusted.{number:03}{'x' * 240}", b"")
        outcome = await fleece.run("backup", f"root.pxar:{tree}", "--backup-id", "web")
        assert outcome.code == 1
        assert outcome.error["hint"] == "--skip-e2big-xattr leaves them out"
        assert await fleece.json("list") == []
        document = await back_up(fleece, tree, "--skip-e2big-xattr", code=3)
        why = "has extended attributes that are too large; they were left out"
        assert document["warnings"] == [f"root.pxar: 'file' {why}"]
        assert document["file-archives"][0]["files"] == 1


async def test_dry_run_reads_and_writes_nothing(fleece: FleeceCommand, tree: Path) -> None:
    document = await back_up(fleece, tree, "--dry-run")
    assert document["dry-run"] is True
    assert document["file-archives"][0]["read"] == sum(map(len, FILES.values()))
    assert await fleece.json("list") == []
    await back_up(fleece, tree, "--change-detection-mode", "data")
    document = await back_up(fleece, tree, "--dry-run", "--change-detection-mode", "metadata")
    assert document["file-archives"][0]["read"] == 0
    assert document["file-archives"][0]["reason"] is None


async def test_several_archives_share_one_catalog(fleece: FleeceCommand, tree: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(1 << 20))
    conf = tmp_path / "x.conf"
    conf.write_text("text")
    document = await fleece.json(
        "backup", f"root.pxar:{tree}", f"etc.pxar:{tree}/etc", f"disk.img:{image}", f"x.conf:{conf}", "--backup-id", "w"
    )
    names = [archive["name"] for archive in document["archives"]]
    assert sorted(names) == ["catalog.pcat1", "disk.img", "etc.pxar", "root.pxar", "x.conf"]
    assert {result["state"] for result in await fleece.json("verify")} == {"ok"}


@pytest.mark.parametrize("source", ["/no/such/folder", "/etc/hostname", "/proc"])
async def test_a_source_that_is_no_folder_of_files_lists_nothing(fleece: FleeceCommand, source: str) -> None:
    outcome = await fleece.run("backup", f"root.pxar:{source}", "--backup-id", "web")
    assert outcome.code == 1
    assert outcome.error["where"] == source
    assert await fleece.json("list") == []


async def test_what_is_odd_in_the_tree_is_a_warning(fleece: FleeceCommand, tree: Path) -> None:
    (tree / "etc/.pxarexclude").write_text("[bad\n")
    document = await back_up(fleece, tree, code=3)
    (warning,) = document["warnings"]
    assert warning.startswith("root.pxar: 'etc/.pxarexclude' holds patterns that are not used")


async def test_killed_and_interrupted_backups_leave_no_snapshot(fleece: FleeceCommand, tree: Path) -> None:
    for number in range(40):
        (tree / f"file{number}").write_bytes(os.urandom(1 << 20))
    line = ["backup", f"root.pxar:{tree}", "--backup-id", "web", "--bwlimit", "2M"]
    for which in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        async with fleece.start(*line) as running:
            with trio.fail_after(60):
                while not list(Path(fleece.repo).glob("host/web/*/*.tmp_didx")):  # noqa: ASYNC110
                    await trio.sleep(0.05)
            await trio.sleep(0.3)
            os.kill(running.pid, which)
            with trio.fail_after(60):
                await running.process.wait()
        assert await fleece.json("list") == []
    await back_up(fleece, tree)
    assert len(await fleece.json("list")) == 1
    assert {result["state"] for result in await fleece.json("verify")} == {"ok"}
