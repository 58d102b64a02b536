"""The options of `fleece backup` that concern folders."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from core.errors import UsageError, os_reason

if TYPE_CHECKING:
    from agent.file_archives import FileArchiveOptions
    from pxar.patterns import MatchPattern

ChangeDetectionOption = Annotated[
    Literal["legacy", "data", "metadata"] | None,
    typer.Option(
        "--change-detection-mode",
        help="legacy: one stream, every file is read. data: metadata and contents apart, every file is read. "
        "metadata: unchanged files are not read. Else the configuration's, else legacy.",
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="PATTERN",
        help="Leave out what matches; repeatable, the last match decides, !PATTERN takes in again. A leading / means "
        "the archive's root, a trailing / folders only.",
    ),
]  # fmt: skip
ExcludeFromOption = Annotated[
    list[Path] | None,
    typer.Option("--exclude-from", metavar="FILE", help="A file of such patterns, one a line; repeatable."),
]
IncludeDeviceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include-dev", metavar="PATH", help="Enter mount points on the file system of this path too; repeatable."
    ),
]
EntriesOption = Annotated[
    int, typer.Option("--entries-max", min=1, help="Entries of the folders that are open at the same time, together.")
]
ChunkSizeOption = Annotated[
    int | None,
    typer.Option("--chunk-size", metavar="KIB", help="Average of a chunk of folders: a power of two, 64 to 4096."),
]
_MIN_CHUNK_KIB: Final = 64
_MAX_CHUNK_KIB: Final = 4096
#: Bytes of a file of patterns.
_MAX_PATTERNS: Final = 1 << 20


def archive_options(
    *,
    mode: Literal["legacy", "data", "metadata"] | None,
    exclude: list[str] | None,
    exclude_from: list[Path] | None,
    exclude_caches: bool,
    include_dev: list[str] | None,
    all_file_systems: bool,
    skip_lost_and_found: bool,
    skip_e2big_xattr: bool,
    entries_max: int,
    chunk_size: int | None,
) -> "FileArchiveOptions":
    """The options put together and checked.

    Raises:
        UsageError: they contradict each other, a pattern is wrong, or a file of patterns cannot be read.
    """
    from agent.file_archives import FileArchiveOptions
    from pxar.create import CreateOptions

    if include_dev and all_file_systems:
        raise UsageError("use", "--include-dev", "--all-file-systems enters every file system", "leave one of them out")
    if chunk_size is not None and (not _MIN_CHUNK_KIB <= chunk_size <= _MAX_CHUNK_KIB or chunk_size & (chunk_size - 1)):
        raise UsageError(
            "use", f"--chunk-size {chunk_size}", f"a power of two from {_MIN_CHUNK_KIB} to {_MAX_CHUNK_KIB} is needed"
        )
    create = CreateOptions(
        exclude=_patterns(exclude or [], exclude_from or []),
        all_file_systems=all_file_systems,
        include_devices=include_dev or (),
        skip_lost_and_found=skip_lost_and_found,
        exclude_caches=exclude_caches,
        skip_e2big_xattr=skip_e2big_xattr,
        entries_max=entries_max,
    )
    return FileArchiveOptions(mode or "legacy", (chunk_size or _MAX_CHUNK_KIB) << 10, create)


def _patterns(texts: list[str], files: list[Path]) -> "tuple[MatchPattern, ...]":
    """The patterns of the files, then those of the command line, which so have the last word."""
    import os

    from pxar.patterns import MatchPattern

    found = []
    for path in files:
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_PATTERNS + 1)
        except OSError as error:
            raise UsageError("read the patterns in", str(path), os_reason(error)) from error
        if len(data) > _MAX_PATTERNS:
            raise UsageError("read the patterns in", str(path), f"more than {_MAX_PATTERNS} bytes")
        for number, line in enumerate(data.split(b"\n"), 1):
            text = line.strip()
            if text and not text.startswith(b"#"):
                try:
                    found.append(MatchPattern.parse(text))
                except UsageError as error:
                    raise UsageError("use the pattern", f"{path}:{number}", error.why, error.hint) from error
    found += [MatchPattern.parse(os.fsencode(text)) for text in texts]
    return tuple(found)
