"""Trees to back up, made from a seed: the same names, sizes, contents and times on every machine.

    python bench/trees.py source FOLDER [--scale 1.0]    80 000 small text files, sizes as in the source of Linux
    python bench/trees.py images FOLDER [--scale 1.0]    20 000 files of 100 to 200 KiB that cannot be compressed

`source`: 5000 folders up to six deep; half of the files have less than 4.5 KiB, the mean is about 13 KiB, and zstd
makes about a fourth of it. `images`: 40 folders.
"""

import argparse
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

SEED: Final = 4
#: Seconds: the first file's time; each next one is a second later.
EPOCH: Final = 1_700_000_000
#: Of the natural logarithm of a source file's size: mean and deviation; and the largest.
_SIZE: Final = (math.log(4500), 1.45)
_LARGEST: Final = 1 << 20
#: Bytes of text that source files are pieced together from, so small that zstd makes a fourth of it; of each piece.
_TEXT: Final = 224 << 10
_PIECE: Final = (40, 360)


class Tree(NamedTuple):
    """What was made."""

    path: Path
    files: int
    folders: int
    size: int  #: bytes of all contents


def source_tree(path: Path, scale: float = 1.0) -> Tree:
    """Many small files of text in `path`, a new folder."""
    choose = random.Random(SEED)
    folders, files = max(1, round(5000 * scale)), round(80_000 * scale)
    text = _text(choose)
    paths = [path]
    path.mkdir()
    depth = {path: 0}
    for number in range(1, folders):
        parent = path
        while depth[parent] < 5 and choose.random() < 0.75 and len(paths) > 1:
            parent = choose.choice(paths)
            if depth[parent] < 5:
                break
        if depth[parent] > 5:
            parent = path
        folder = parent / f"{_word(choose)}{number}"
        folder.mkdir()
        depth[folder] = depth[parent] + 1
        paths.append(folder)
    # Some folders have hundreds of files, most have a few.
    weights = [choose.paretovariate(1.2) for _ in paths]
    places = choose.choices(paths, weights, k=files)
    size = 0
    for number, folder in enumerate(places):
        length = min(_LARGEST, round(choose.lognormvariate(*_SIZE)))
        name = f"{_word(choose)}-{number:x}.{'ch'[number % 3 == 0]}"
        _write(folder / name, _pieces(choose, text, length), number)
        size += length
    return Tree(path, files, folders, size)


def image_tree(path: Path, scale: float = 1.0) -> Tree:
    """Many files of noise in `path`, a new folder."""
    choose = random.Random(SEED + 1)
    files, folders = round(20_000 * scale), 40
    path.mkdir()
    size = 0
    for number in range(files):
        folder = path / f"album-{number * folders // files:02}"
        if not folder.exists():
            folder.mkdir()
        length = choose.randint(100 << 10, 200 << 10)
        _write(folder / f"IMG_{number:05}.jpg", choose.randbytes(length), number)
        size += length
    return Tree(path, files, folders, size)


def _write(path: Path, content: bytes, number: int) -> None:
    path.write_bytes(content)
    os.utime(path, ns=((EPOCH + number) * 10**9, (EPOCH + number) * 10**9 + number))


def _text(choose: random.Random) -> bytes:
    """Lines of words, the frequent ones being short, as in source code."""
    words = sorted({_word(choose) for _ in range(6000)}, key=len)
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    marks = [" ", " ", " ", " = ", "(", ", ", ");\n\t", ";\n\t", " {\n\t\t", "->", "\n\t}\n\n", "_"]
    count = _TEXT // 6
    chosen = zip(choose.choices(words, weights, k=count), choose.choices(marks, k=count), strict=True)
    return "".join(part for pair in chosen for part in pair).encode()[:_TEXT]


def _pieces(choose: random.Random, text: bytes, length: int) -> bytes:
    def pieces() -> Iterator[bytes]:
        left = length
        while left > 0:
            size = min(left, choose.randint(*_PIECE))
            start = choose.randrange(len(text) - size)
            yield text[start : start + size]
            left -= size

    return b"".join(pieces())


def _word(choose: random.Random) -> str:
    return "".join(choose.choices("etaoinshrdlcumwfgypbvk", k=choose.randint(2, 9)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", choices=["source", "images"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    arguments = parser.parse_args()
    make = source_tree if arguments.tree == "source" else image_tree
    tree = make(arguments.folder, arguments.scale)
    print(f"{tree.files} files in {tree.folders} folders, {tree.size} bytes")


if __name__ == "__main__":
    main()
