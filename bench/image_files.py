"""Looking into disk images: how soon the first directory is there, and how fast files come out.

    python bench/image_files.py [--size GIB] [--files N] [--work FOLDER] [--rounds N]

Makes a sparse disk of SIZE GiB (default 100) with a GPT and one ext4 that holds N files (default 2000), backs it up
into a local datastore in FOLDER (default a new one in /var/tmp), and prints JSON, seconds as minimum, median and
maximum:

first_ls_s       `fleece ls vm/1/latest disk.img/part1`, from the start of the process, the kernel having forgotten
                 the datastore
warm_ls_s        the same, the kernel having it
version_s        `fleece version`: what starting the command takes
restore_files_s  `fleece restore` of the N files
mount_first_s    the first `ls` of the same directory in a mount, the mount not counted
restore_mib_s    MiB a second of one file of 1 GiB (a tenth of the disk at most) to /dev/null

Goal: the first listing of a disk of 100 GiB in half a second.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FLEECE = ROOT / ".venv/bin/fleece"
_GIB = 1 << 30
_MIB = 1 << 20


def make_disk(path: Path, size: int, files: int, work: Path) -> None:
    """A disk of `size` bytes with one partition, an ext4 of a few files."""
    sys.path.insert(0, str(ROOT))
    from tests.support.file_systems import run_tool

    tree = work / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/fstab").write_text("UUID=1 / ext4\n")
    (tree / "many").mkdir()
    for number in range(files):
        (tree / f"many/file {number}").write_bytes(os.urandom(2000))
    with (tree / "large").open("wb") as file:
        for _ in range(min(_GIB, size // 10) // _MIB):
            file.write(os.urandom(_MIB))
    with path.open("wb") as disk:
        disk.truncate(size)
    run_tool(["sfdisk", "-q", path], stdin="label: gpt\nstart=2048,type=L\n")
    blocks = (size - 4 * _MIB) // 4096
    offset = f"offset={2048 * 512},lazy_itable_init=1"
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-E", offset, "-d", tree, path, str(blocks)], check=True
    )
    shutil.rmtree(tree)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forget(store: Path) -> None:
    """Have the kernel forget what it has read of the datastore."""
    for path in store.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fdatasync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def spread(seconds: list[float]) -> list[float]:
    """Minimum, median, maximum."""
    return [round(value, 3) for value in (min(seconds), statistics.median(seconds), max(seconds))]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="fleece-bench-", dir=given.work or "/var/tmp"))
    store, disk = work / "store", work / "disk.raw"
    (work / "fleece.toml").touch()
    environment = {
        **os.environ, "FLEECE_REPOSITORY": str(store), "FLEECE_CONFIG": str(work / "fleece.toml"),
        "FLEECE_STATE_DIR": str(work / "state"), "FLEECE_RUN_DIR": str(work / "run"),
    }  # fmt: skip

    def fleece(*arguments: str | Path) -> None:
        subprocess.run([FLEECE, "-q", *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)

    found: dict[str, Any] = {"size_gib": given.size}
    try:
        make_disk(disk, given.size * _GIB, given.files, work)
        fleece("datastore", "create", store)
        fleece("backup", f"disk.img:{disk}", "--backup-type", "vm", "--backup-id", "1")
        disk.unlink()
        place = ("vm/1/latest", "disk.img/part1")

        def cold() -> float:
            forget(store)
            return timed(lambda: fleece("ls", *place))

        found["first_ls_s"] = spread([cold() for _ in range(given.rounds)])
        found["warm_ls_s"] = spread([timed(lambda: fleece("ls", *place)) for _ in range(given.rounds)])
        found["version_s"] = spread([timed(lambda: fleece("version")) for _ in range(given.rounds)])
        many = timed(lambda: fleece("restore", place[0], f"{place[1]}/many", work / "many"))
        found["restore_files_s"] = round(many, 3)
        size = min(_GIB, given.size * _GIB // 10) / _MIB
        found["restore_mib_s"] = round(size / timed(lambda: fleece("restore", place[0], f"{place[1]}/large", "-")))
        mount = work / "mnt"
        mount.mkdir()
        fleece("mount", mount)
        try:
            found["mount_first_s"] = round(
                timed(lambda: list((mount / "vm/1/latest/disk.img.d/part1/many").iterdir())), 3
            )  # fmt: skip
        finally:
            subprocess.run(["umount", mount], check=True)
    finally:
        shutil.rmtree(work)
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
