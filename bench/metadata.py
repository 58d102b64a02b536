"""Reading the metadata of many small files: what `pxar.filesystem.scan` costs per file, warm, beside `find -printf`.

`find` makes one stat per file and prints what that says; it reads no extended attributes, ACLs, flags or projects.

    .venv/bin/python bench/metadata.py [FOLDER]     makes 80 folders of 1000 files in FOLDER and removes them
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pxar import filesystem, filesystem_python
from pxar.filesystem import DEFAULT, Features, filesystem_type, supported_features

FOLDERS, FILES = 80, 1000
RUNS = 5
FORMAT = "%p %s %m %U %G %T@ %n %i %D %y %l\n"


def make(base: Path) -> None:
    for folder in range(FOLDERS):
        (base / f"{folder:02}").mkdir()
        for file in range(FILES):
            (base / f"{folder:02}" / f"file-{file:04}").touch()


def walk(base: Path, features: int) -> None:
    for folder in base.iterdir():
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        names, types = filesystem.list_folder(fd)
        for result in filesystem.scan(fd, names, features, types=types):
            assert not isinstance(result, int)
        os.close(fd)


def walk_in_python(base: Path, features: int) -> None:
    for folder in base.iterdir():
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        names, types = filesystem_python.list_folder(fd)
        filesystem_python.scan(fd, names, features, types, False)
        os.close(fd)


def find(base: Path) -> None:
    subprocess.run(["find", base, "-printf", FORMAT], stdout=subprocess.DEVNULL, check=True)


def cpu_time() -> float:
    return sum(os.times()[:4])  # this process and its children, user and system


def best(work: Callable[[], None]) -> float:
    """Microseconds of CPU time per file: what it costs on a busy machine as well."""
    seconds = []
    for _ in range(RUNS):
        start = cpu_time()
        work()
        seconds.append(cpu_time() - start)
    return min(seconds) / FOLDERS / FILES * 1e6


def main() -> None:
    base = Path(tempfile.mkdtemp(prefix="fleece-bench-", dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        make(base)
        fd = os.open(base, os.O_RDONLY)
        features = DEFAULT & supported_features(filesystem_type(fd))
        os.close(fd)
        everything = features | Features.XATTRS | Features.QUOTA_PROJID
        print(f"list and scan, what this file system has:  {best(lambda: walk(base, features)):5.2f} µs/file")
        print(f"list and scan, xattrs and project as well: {best(lambda: walk(base, everything)):5.2f} µs/file")
        print(
            f"the same in Python:                        {best(lambda: walk_in_python(base, everything)):5.2f} µs/file"
        )
        print(f"find -printf:                              {best(lambda: find(base)):5.2f} µs/file")
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
