"""Fuzzes a parser of file archives: `python -m tests.fuzz.fuzz_archives decoder --seconds 60`.

Inputs come from changing those of the corpus, `tests/data/fuzz/TARGET/`. One that ends in a way not seen before is
changed further, and kept in the corpus with `--keep`. A find is written to the current folder and ends the run.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path
from random import Random

from pxar.metadata import encode_metadata
from tests.fuzz.targets import TARGETS, joined, outcome
from tests.pxar.archives import archived
from tests.pxar.samples import every_kind, example

CORPUS = Path(__file__).parents[1] / "data/fuzz"
#: Numbers that are wrong in most places.
NUMBERS = [0, 1, 15, 16, 17, 24, 40, 4097, 1 << 20, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]

PATTERNS = [
    b"*.o\n!keep.o\n/cache/\n\0dir/a.o\0keep.o\0a/cache\0a/cache/x",
    b"a[!b-d]?*/**/z\n[[:alpha:]]*\n[^]x]\n\\*\n\0ab1/c/d/z\0abc\0]\0*",
    b"# text\n\n \t/a/b*c[[:digit:][:upper:]]\\[\n**\n\0a/b/c1[\0a/bxcX[",
]


def seeds(target: str) -> list[bytes]:
    """Valid inputs to begin with."""
    if target == "patterns":
        return list(PATTERNS)
    trees = [every_kind(), example()]
    if target != "metadata":
        return [joined(*archived(tree, split=split)) for tree in trees for split in (False, True)]
    folder = trees[0].children[b"acl"]
    return [encode_metadata(one.metadata) for one in (folder, folder.children[b"f"], trees[1])]


def changed(data: bytes, others: list[bytes], random: Random) -> bytes:
    """`data` with one to four changes."""
    result = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(result) + 1)
        what = random.randrange(7)
        if what == 0 and result:
            result[at % len(result)] ^= 1 << random.randrange(8)
        elif what == 1:
            number = random.choice(NUMBERS) + random.choice([-1, 0, 0, 1])
            result[at : at + 8] = (number % (1 << 64)).to_bytes(8, "little")
        elif what == 2 and len(result) >= 8:
            at = min(at, len(result) - 8)
            number = int.from_bytes(result[at : at + 8], "little") + random.choice([-24, -16, -1, 1, 16, 24])
            result[at : at + 8] = (number % (1 << 64)).to_bytes(8, "little")
        elif what == 3:
            del result[at : at + random.randint(1, 60)]
        elif what == 4:
            result[at:at] = result[at : at + random.randint(1, 120)]
        elif what == 5:
            other = random.choice(others)
            start = random.randrange(len(other) + 1)
            result[at:at] = other[start : start + random.randint(1, 120)]
        elif len(result) >= 16:
            # A value from elsewhere in the same input: a type, a size or an offset of something else.
            start, end = (random.randrange(len(result) - 7) for _ in range(2))
            result[end : end + 8] = result[start : start + 8]
    return bytes(result)


def main() -> int:
    """Run as a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="add inputs that end in a new way to the corpus")
    options = parser.parse_args()
    folder = CORPUS / options.target
    random = Random(options.seed)
    inputs = seeds(options.target) + [path.read_bytes() for path in sorted(folder.glob("*"))]
    seen = {outcome(options.target, data) for data in inputs}
    end, runs = time.monotonic() + options.seconds, 0
    while time.monotonic() < end:
        data = changed(random.choice(inputs), inputs, random)
        try:
            result = outcome(options.target, data)
        except BaseException:
            find = Path(f"find-{options.target}-{hashlib.sha256(data).hexdigest()[:12]}")
            find.write_bytes(data)
            print(f"after {runs} runs: {find}", file=sys.stderr)
            raise
        runs += 1
        if result not in seen:
            seen.add(result)
            inputs.append(data)
            if options.keep:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
    print(f"{runs} runs, {len(seen)} ways to end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
