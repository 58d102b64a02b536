"""Fuzzes the C parser of ACLs under sanitizers, with the Python form as its oracle.

`python -m tests.fuzz.fuzz_acls --seconds 60`. A kernel checks what it is told to set, but a file system in user space
or over the network may answer anything. The first find ends the run.
"""

import argparse
import errno
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from struct import Struct
from sysconfig import get_path
from typing import Final

from pxar.filesystem_python import parse_acls
from pxar.metadata import Metadata, Stat, encode_metadata

_SOURCE: Final = Path(__file__).with_name("acls.c")
_LENGTH: Final = Struct("<H")
_ANSWER: Final = Struct("<iI")
_ENTRY: Final = Struct("<HHI")
_PLAIN: Final = len(encode_metadata(Metadata(Stat(0o040755))))
_EMPTY: Final = b"\2\0\0\0"
Pair = tuple[bytes, bytes]


def build(folder: Path) -> Path:
    """The parser as a program of its own.

    Raises:
        FileNotFoundError, CalledProcessError: there is no compiler, it has no sanitizers, or the parser is broken.
    """
    program = folder / "acls"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
    # The rest of the file is for Python, and never called.
    linked = [
        "-DPy_LIMITED_API=0x030b0000",
        f"-I{get_path('include')}",
        "-no-pie",
        "-Wl,--unresolved-symbols=ignore-all",
    ]
    subprocess.run(["gcc", *sanitizers, *linked, _SOURCE, "-o", program], check=True, capture_output=True, timeout=120)
    return program


def acl(random: Random) -> bytes:
    """An ACL, valid or nearly so."""
    entries = []
    for _ in range(random.choice([0, 0, 1, 3, 4, 7, 40])):
        tag = random.choice([1, 2, 2, 2, 4, 8, 8, 16, 32] + [random.randrange(1 << 16)] * (random.random() < 0.02))
        identity = random.choice([0, 1, 1000, 0xFFFF, 0x10000, 0xFFFFFFFF, random.randrange(1 << 32)])
        entries.append(_ENTRY.pack(tag, random.choice([0, 5, 7, 8, 0xFFFF]), identity))
    data = bytearray(_EMPTY + b"".join(entries))
    if random.random() < 0.2:
        what = random.randrange(3)
        if what == 0:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        elif what == 1:
            del data[random.randrange(len(data)) :]
        else:
            data += random.randbytes(random.randrange(1, 20))
    return bytes(data)


def expected(access: bytes, default: bytes) -> tuple[int, bytes]:
    """What the Python form makes of them: errno and nothing, or 0 and the items."""
    try:
        parsed = parse_acls(access, default)
    except OSError as error:
        return error.errno or 0, b""
    return 0, encode_metadata(Metadata(Stat(0o040755), (), parsed))[_PLAIN:]


def answers(program: Path, pairs: list[Pair]) -> list[tuple[int, bytes]]:
    """What the C parser makes of them.

    Raises:
        AssertionError: a sanitizer ended it, which says why.
    """
    data = b"".join(_LENGTH.pack(len(one)) + one for pair in pairs for one in pair)
    done = subprocess.run([program], input=data, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    found, position = [], 0
    for _ in pairs:
        error, length = _ANSWER.unpack_from(done.stdout, position)
        position += _ANSWER.size
        found.append((error, done.stdout[position : position + length]))
        position += length
    assert position == len(done.stdout)
    return found


def compare(program: Path, random: Random, count: int) -> set[int]:
    """Try `count` pairs; the errors that there were.

    Raises:
        AssertionError: a find.
    """
    # The longest that the kernel hands out: 65536 bytes.
    pairs = [(acl(random), acl(random)) for _ in range(count)]
    pairs += [(b"", _EMPTY), (_EMPTY, b""), (_EMPTY + _ENTRY.pack(2, 7, 5) * 8191, _EMPTY)]
    found = answers(program, pairs)
    for pair, answer in zip(pairs, found, strict=True):
        assert answer == expected(*pair), pair
    return {error for error, _ in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    random = Random(arguments.seed)
    count, end = 0, time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        while time.monotonic() < end:
            assert compare(program, random, 20_000) == {0, errno.EINVAL}
            count += 20_000
    print(f"{count} pairs of ACLs, nothing found", file=sys.stderr)


if __name__ == "__main__":
    main()
