"""Fuzz the catalog reader: `python tests/fuzz/fuzz_catalog.py [--seconds 60] [--seed N] [--corpus DIR]`.

Inputs are mutations of the corpus (tests/data/fuzz/catalog), whose every file tests/datastore/test_catalog.py replays.
An input that breaks the reader is kept beside the corpus as `crash-...`, and the program ends with status 1.
"""

import argparse
import hashlib
import random
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from core.errors import FormatError  # noqa: E402
from datastore.catalog import DIRECTORY, MAX_DEPTH, Catalog, name_problem  # noqa: E402

CORPUS = ROOT / "tests/data/fuzz/catalog"
_INTERESTING = (b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"d\x01d", b"f\x01f", b"\xff" * 9 + b"\x01", b"\x81\0")
_LONGEST = 1 << 16


def one_input(data: bytes) -> int:
    """Read everything in `data`; the number of entries, or -1 if it is refused as it should be.

    Raises:
        Exception: the reader is broken.
    """
    count = 0
    try:
        catalog = Catalog(data, where="fuzz")
        for depth, entry in catalog.walk():
            count += 1
            # An entry has three bytes or more, and no byte counts twice.
            assert 3 * count <= len(data), "the walk is longer than the catalog"
            assert depth <= MAX_DEPTH
            assert not name_problem(entry.name)
            assert 0 <= entry.size < 1 << 64
            assert -(1 << 63) <= entry.mtime_s < 1 << 63
            if entry.kind == DIRECTORY:
                assert 8 <= entry.block < entry.limit <= len(data) - 8
        for entry in catalog.entries(catalog.root):
            assert catalog.lookup(catalog.root, entry.name) is not None
    except FormatError:
        return -1
    return count


def mutated(rng: random.Random, corpus: list[bytes]) -> bytes:
    """One of `corpus`, changed in a few places; the offset of the root at the end stays as a rule."""
    data = bytearray(rng.choice(corpus))
    trailer = bytes(data[-8:])
    if rng.random() < 0.9:
        del data[-8:]
    else:
        trailer = b""
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[place % len(data)] = rng.randrange(256)
            case 2:
                data[place:place] = rng.choice(_INTERESTING)
            case 3:
                value = rng.choice(_INTERESTING)
                data[place : place + len(value)] = value
            case 4:
                del data[place : place + rng.randint(1, 8)]
            case _:
                other = rng.choice(corpus)
                start = rng.randrange(len(other) + 1)
                data[place:place] = other[start : start + rng.randint(1, 40)]
    del data[_LONGEST:]
    if trailer and rng.random() < 0.2:
        trailer = rng.randrange(len(data) + 10).to_bytes(8, "little")
    return bytes(data) + trailer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    corpus = [path.read_bytes() for path in sorted(arguments.corpus.iterdir())]
    end, inputs, accepted = time.monotonic() + arguments.seconds, 0, 0
    while time.monotonic() < end:
        data = mutated(rng, corpus)
        inputs += 1
        try:
            accepted += one_input(data) >= 0
        except Exception:  # whatever it is, this input shows it
            traceback.print_exc()
            crash = arguments.corpus / f"crash-{hashlib.sha256(data).hexdigest()[:16]}"
            crash.write_bytes(data)
            print(f"seed {arguments.seed}: {crash}", file=sys.stderr)
            return 1
    print(f"seed {arguments.seed}: {inputs} inputs, {accepted} of them catalogs, none broke the reader")
    return 0


if __name__ == "__main__":
    sys.exit(main())
