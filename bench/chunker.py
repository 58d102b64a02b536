"""How fast cuts are found, against reading the same memory: `python bench/chunker.py [--size 64MiB] [--output json]`.

Rows: a plain read (memchr for a byte that is not there), the scan of every position in each form of the hash, and the
chunker as archives use it (average 4 MiB), which skips what cannot be a cut. Blocks of 256 KiB, by turns, best of the
rounds in thread time. Cycles are of the clock that /proc/cpuinfo gives. Goal: 2.0 cycles per byte for the scan.
"""

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.limits import cpu_count  # noqa: E402
from core.units import parse_size  # noqa: E402
from datastore.buzhash import WINDOW, available, finder  # noqa: E402
from datastore.chunker import Chunker  # noqa: E402

BLOCK = 256 << 10
GOAL = 2.0
#: Of 32 bits no place is a hit by chance, so that everything is scanned.
BITS = 32
#: The readable forms get this part of the data.
SLOW = {"numpy": 1 / 16, "python": 1 / 256}


def clock_hz() -> float:
    """Cycles per second of the CPU, as the kernel says; 0 if it does not."""
    found = re.search(r"^cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return float(found[1]) * 1e6 if found else 0.0


def reading(data: bytes) -> None:
    for start in range(0, len(data), BLOCK):
        assert data.find(b"\0", start, start + BLOCK) < 0


def scanning(form: str, data: bytes) -> None:
    find, view, history = finder(form), memoryview(data), bytes(WINDOW)
    for start in range(0, len(data), BLOCK):
        block = view[start : start + BLOCK]
        find(block, history, 1, len(block), BITS)


def cutting(data: bytes) -> None:
    chunker, view = Chunker(), memoryview(data)
    for start in range(0, len(data), BLOCK):
        block = view[start : start + BLOCK]
        while cut := chunker.scan(block):
            block = block[cut:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=64 << 20, help="bytes to go through (default 64MiB)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", choices=["text", "json"], default="text")
    arguments = parser.parse_args()
    data = random.Random(1).randbytes(max(BLOCK, arguments.size)).replace(b"\0", b"\1")
    rows: list[tuple[str, int, Callable[[bytes], None]]] = [("plain read", len(data), reading)]
    for form in available():
        size = max(BLOCK, int(len(data) * SLOW.get(form, 1)))
        rows.append((f"scan, {form}", size, partial(scanning, form)))
    rows.append(("chunker, average 4 MiB", len(data), cutting))
    best = [float("inf")] * len(rows)
    for _ in range(max(1, arguments.rounds)):
        for number, (_, size, work) in enumerate(rows):
            part = data if size == len(data) else data[:size]
            start = time.thread_time()
            work(part)
            best[number] = min(best[number], time.thread_time() - start)
    hz = clock_hz()
    results: list[dict[str, Any]] = [
        {"work": name, "rate": size / seconds, "cycles_per_byte": hz * seconds / size or None}
        for (name, size, _), seconds in zip(rows, best, strict=True)
    ]
    if arguments.output == "json":
        print(json.dumps({"cores": cpu_count(), "clock_hz": hz, "goal": GOAL, "results": results}, indent=2))
        return
    for row in results:
        cycles = f"{row['cycles_per_byte']:>9.2f} cycles/byte" if hz else ""
        share = row["rate"] / results[0]["rate"]
        print(f"{row['work']:<26}{row['rate'] / 1e6:>8.0f} MB/s{cycles}{share:>8.2f} of a plain read")


if __name__ == "__main__":
    main()
