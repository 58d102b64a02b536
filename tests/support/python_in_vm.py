"""Rooms of Fleece, and the libraries they need, as files to be unpacked into a VM that has a Python but no Fleece."""

import py_compile
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
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


def compiled(files: Mapping[str, bytes | Path]) -> dict[str, bytes]:
    """The sources in `files` compiled, by the paths where Python looks for that: in a VM it takes long.

    For the Python of the distribution, which tests run in; another one compiles them itself.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.py"), Path(folder, "target.pyc")
        for name, content in files.items():
            if name.endswith(".py") and isinstance(content, bytes):
                source.write_bytes(content)
                mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
                py_compile.compile(str(source), str(target), dfile=name, doraise=True, invalidation_mode=mode)
                path = PurePosixPath(name)
                cached = path.parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc"
                found[str(cached)] = target.read_bytes()
    return found


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
