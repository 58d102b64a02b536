"""Making file archives of many small files, without a datastore: CPU time per file in each mode, warm.

The sinks drop what they get, so this is the walk, the reading, the encoder, and what change detection adds or saves.

    .venv/bin/python bench/create.py [FOLDER]     makes 400 folders of 200 files in FOLDER and removes them
"""

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from core.buffers import Buffer
from pxar.create import create_archive, measure_archive
from pxar.create_report import CreateReport
from pxar.entry_writer import Measuring
from pxar.reference import Reference

FOLDERS, FILES, SIZE = 400, 200, 1000
RUNS = 3
CHUNK = 4 << 20


class Kept(Measuring):
    """A sink that keeps the metadata archive, to be the next one's reference."""

    def __init__(self) -> None:
        super().__init__()
        self.data = bytearray()
        self.size = 0

    def write(self, data: Buffer) -> None:
        super().write(data)
        self.data += data
        self.size = len(self.data)

    def read(self, offset: int, length: int) -> memoryview:
        return memoryview(self.data)[offset : offset + length]


class Chunks:
    """The index of a payload stream of `size` bytes, in chunks of 4 MiB."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = -(-size // CHUNK)

    def digest(self, number: int) -> bytes:
        return number.to_bytes(32, "big")

    def span(self, number: int) -> tuple[int, int]:
        return number * CHUNK, min(CHUNK, self.size - number * CHUNK)

    def find(self, offset: int) -> int:
        return offset // CHUNK


def make(base: Path) -> None:
    content = random.Random(0).randbytes(SIZE)
    for folder in range(FOLDERS):
        (base / f"{folder:03}").mkdir()
        for file in range(FILES):
            (base / f"{folder:03}" / f"file-{file:04}").write_bytes(content)


def best(work: Callable[[], CreateReport]) -> float:
    """Microseconds of CPU time per file."""
    seconds = []
    for _ in range(RUNS):
        start = os.times()
        report = work()
        assert report.files == FOLDERS * FILES
        assert not report.warnings
        seconds.append(sum(os.times()[:2]) - sum(start[:2]))
    return min(seconds) / FOLDERS / FILES * 1e6


def main() -> None:
    base = Path(tempfile.mkdtemp(prefix="fleece-bench-", dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        make(base)
        root = str(base)
        archive, payload = Kept(), Measuring()
        create_archive(root, archive, payload)
        chunks = Chunks(payload.position)

        def unchanged() -> CreateReport:
            report = create_archive(root, Measuring(), Measuring(), reference=Reference(archive, chunks))
            assert report.read == 0
            return report

        print(f"legacy, all is read:              {best(lambda: create_archive(root, Measuring())):6.2f} µs/file")
        print(f"data, all is read:                {best(lambda: create_archive(root, Measuring(), Measuring())):6.2f}")
        print(f"metadata, nothing has changed:    {best(unchanged):6.2f}")
        print(f"dry run, no contents are read:    {best(lambda: measure_archive(root)):6.2f}")
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
