"""Fuzzes what the server reads of its clients: `python -m tests.fuzz.fuzz_server http1|http2 --seconds 60`.

A find is written to the current folder and ends the run; `--replay FILE` tries one again.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.fuzz.fuzz_archives import changed
from tests.fuzz.server_targets import HTTP1_SEEDS, Targets, changed_frames, http2_seeds

KINDS = ("http1", "http2")


def seeds(kind: str) -> list[bytes]:
    """What clients say."""
    return list(HTTP1_SEEDS) if kind == "http1" else http2_seeds()


def one_changed(kind: str, inputs: list[bytes], random: Random) -> bytes:
    """One of `inputs` with some changes."""
    data = random.choice(inputs)
    if kind == "http2" and random.random() < 0.7:
        for _ in range(random.randint(1, 3)):
            data = changed_frames(data, random)
        return data
    return changed(data, inputs, random)


def main() -> int:
    """Run as a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=KINDS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=Path, help="only this input")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run: Callable[[bytes], str] = getattr(Targets(Path(folder)), options.target)
        if options.replay is not None:
            print(run(options.replay.read_bytes()))
            return 0
        random = Random(options.seed)
        inputs = seeds(options.target)
        seen = {run(data) for data in inputs}
        end, runs = time.monotonic() + options.seconds, 0
        while time.monotonic() < end:
            data = one_changed(options.target, inputs, random)
            try:
                result = run(data)
            except BaseException:
                find = Path(f"find-{options.target}-{hashlib.sha256(data).hexdigest()[:12]}")
                find.write_bytes(data)
                print(f"after {runs} runs: {find}", file=sys.stderr)
                raise
            runs += 1
            if result not in seen:
                seen.add(result)
                inputs.append(data)
        print(f"{runs} runs, {len(seen)} ways to end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
