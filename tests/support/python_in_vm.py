"""Rooms of Fleece, and the libraries they need, as files to be unpacked into a VM that has a Python but no Fleece."""

import re
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from tests.support.cache import ROOT


def python_files(rooms: Iterable[str], libraries: Iterable[str]) -> dict[str, bytes | Path]:
    """Content by path below a folder for PYTHONPATH: the sources of `rooms`, and `libraries` with what they need."""
    files: dict[str, bytes | Path] = {}
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".so"):
                files[str(path.relative_to(ROOT))] = path.read_bytes()
    for library in _with_needed(libraries):
        for file in library.files or ():
            name, path = PurePosixPath(file), Path(str(library.locate_file(file)))
            if ".." not in name.parts and "__pycache__" not in name.parts and path.is_file():
                files[str(name)] = path.read_bytes()
    return files


def _with_needed(names: Iterable[str]) -> Iterator[Distribution]:
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # of another platform or version of Python
        yield found
        for requirement in found.requires or ():
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            if match is not None and "extra ==" not in requirement:
                todo.append(match[0])
