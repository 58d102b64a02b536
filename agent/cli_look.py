"""`fleece ls`, `find`, `diff`, `catalog dump`: looking into archives without restoring them."""

import os
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from agent.invocation import Invocation, command
from core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from agent.snapshot_archives import OpenSnapshot
    from core.progress import Progress
    from datastore.codec import ChunkCodec
    from datastore.names import Namespace
    from diskfs.process import Worker

_LETTERS = "dflhbcps"
_SnapshotText = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="type/id/time or type/id/latest.")]


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    command(
        application,
        "ls",
        examples="""
fleece ls host/web/latest root.pxar
fleece ls host/web/latest root.pxar/etc/ssh
fleece ls host/web/latest root.pxar/etc --recursive
fleece ls host/web/2026-01-02T03:04:05Z root.pxar/etc/shadow --output json | jq '.[0].mode'
fleece ls vm/100/latest drive-scsi0.img                 partitions and volumes of a disk
fleece ls vm/100/latest drive-scsi0.img/part1/etc
""",
        keys="read",
    )(ls)
    command(
        application,
        "find",
        examples="""
fleece find '*.conf'                                in the newest snapshot of each group
fleece find /etc/hosts host/web/latest              a path from the root of an archive
fleece find 'etc/**/*.pem' host/web --versions      which versions a group has, and where
fleece find 'invoice-2026*' --all-snapshots --type f
fleece find /etc/fstab vm/100/latest --images       also in the file systems of disk images
fleece find '*.sql' host/db/latest --output json | jq -r '.[].path'
""",
        keys="read",
    )(find)
    command(
        application,
        "diff",
        examples="""
fleece diff host/web/2026-01-01T03:00:00Z host/web/latest
fleece diff host/web/2026-01-01T03:00:00Z host/web/latest root.pxar/etc
fleece diff host/web/2026-01-01T03:00:00Z host/web/latest root.pxar --content
fleece diff vm/100/2026-01-01T03:00:00Z vm/100/latest drive-scsi0.img    which ranges of a disk
fleece diff vm/100/2026-01-01T03:00:00Z vm/100/latest drive-scsi0.img/part1/etc    which files on it
""",
        keys="read",
    )(diff)
    group = typer.Typer(
        no_args_is_help=True, help="What catalogs know: every name of a snapshot.", rich_markup_mode=None
    )
    application.add_typer(group, name="catalog")
    command(
        group,
        "dump",
        examples="""
fleece catalog dump host/web/latest
fleece catalog dump host/web/latest --output json | jq 'map(.size // 0) | add'
""",
        keys="read",
    )(catalog_dump)


def ls(
    invocation: Invocation,
    snapshot: _SnapshotText,
    archive: Annotated[
        str,
        typer.Argument(
            metavar="ARCHIVE[/PATH]", help="A file archive or disk, and what in it: root.pxar/etc, disk.img/part1."
        ),
    ],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Also all directories below, as paths.")] = False,
    directory: Annotated[
        bool, typer.Option("--directory", "-d", help="The directory itself, not what it holds.")
    ] = False,
) -> None:
    """List a directory of a file archive or of a disk image: kind and mode, owner, group, size, time, name.

    Of a disk image itself its partitions and volumes are listed: name, size, file system. The archive is not read as
    a whole, and no contents are. Owners are numbers, as they were stored. Names that are not printable are escaped:
    \\n, \\xff.
    """
    # If it is a disk, a process will read it, which gets ready while this one does.
    worker = _early_worker(archive)
    try:
        _ls(invocation, snapshot, archive, recursive, directory, worker)
    finally:
        if worker is not None:
            worker.stop()


def _early_worker(archive: str) -> "Worker | None":
    """The process that reads disk images, if `archive` is called like one."""
    from diskfs.process import Worker

    return Worker() if ".img" in archive.partition("/")[0] else None


def _ls(
    invocation: Invocation, snapshot: str, archive: str, recursive: bool, directory: bool, worker: "Worker | None"
) -> None:
    from agent.archive_listing import Listed, entry_document, entry_line, list_entry
    from agent.image_trees import image_part, list_image, open_image_of, volume_document, volume_line
    from agent.listing_output import listing
    from agent.snapshot_archives import in_walk
    from diskfs.entries import Volume

    ns, codec = invocation.namespace(), invocation.reading_key().codec()
    name, path = _archive_and_path(archive)

    def line(one: Listed | Volume) -> str:
        return volume_line(one) if isinstance(one, Volume) else entry_line(one)

    def document(one: Listed | Volume) -> object:
        return volume_document(one) if isinstance(one, Volume) else entry_document(one.path, one.node)

    with listing(invocation, line, document) as found:

        async def work(progress: "Progress") -> None:
            async with _opened(invocation, [snapshot], ns, codec, progress) as (opened,):
                part = image_part(opened.manifest, archive)
                if part is not None:
                    async with open_image_of(opened, part.name, worker) as image:

                        def walk_image() -> None:
                            for one in list_image(image, part.path, recursive, directory):
                                found.add(one)

                        await in_walk(walk_image)
                    return
                accessor = await opened.accessor(opened.file_archive(name))

                def walk() -> None:
                    for one in list_entry(accessor, path, recursive, directory):
                        found.add(one)

                await in_walk(walk)

        invocation.run(work, what="list", where=f"{snapshot} {archive}")


def find(
    invocation: Invocation,
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN",
            help="Of names or paths: * ? [a-z] within a name, ** over several; /... from the root; .../ directories.",
        ),
    ],
    snapshots: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SNAPSHOT|GROUP", help="Where; else the newest snapshot of each group.", show_default=False
        ),
    ] = None,
    all_snapshots: Annotated[bool, typer.Option("--all-snapshots", help="In every snapshot of the namespace.")] = False,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Also in the namespaces below.")] = False,
    archive: Annotated[
        str | None, typer.Option("--archive", metavar="NAME", help="Only in archives of this name.")
    ] = None,
    kinds: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="LETTERS",
            help="Only files f, directories d, symlinks l, hard links h, devices b c, FIFOs p, sockets s.",
        ),
    ] = _LETTERS,
    versions: Annotated[
        bool, typer.Option("--versions", help="Each path once, with its versions and the snapshots that have them.")
    ] = False,
    index: Annotated[
        bool, typer.Option("--index/--no-index", help="Use the index, and with --all-snapshots keep it up; else not.")
    ] = True,
    newer: Annotated[
        str | None,
        typer.Option("--newer", metavar="WHEN", help="Changed since: 2026-01-02, 2026-01-02T15:04, or 7d (ago)."),
    ] = None,
    older: Annotated[str | None, typer.Option("--older", metavar="WHEN", help="Changed before.")] = None,
    larger: Annotated[
        str | None, typer.Option("--larger", metavar="SIZE", help="Files of at least 10M, 4096, 2GiB.")
    ] = None,
    smaller: Annotated[str | None, typer.Option("--smaller", metavar="SIZE", help="Files of at most so much.")] = None,
    images: Annotated[
        bool, typer.Option("--images", help="Also in the file systems of disk images, whose directories are read.")
    ] = False,
) -> None:
    """Find files by name in file archives: kind, size, time and path of each.

    A pattern matches a whole path or its end from any slash on, as in .pxarexclude: 'hosts', 'etc/hosts', '*.conf';
    '/etc/hosts' only in the root of an archive. No contents are read: of split archives the metadata, of others the
    catalog, which knows sizes and times of files only. Symlinks are not followed.

    With --all-snapshots this host keeps an index, so that only new snapshots are read: the first time takes as long as
    to read all of them. The answer is the same with and without it. 'fleece index' makes and removes it.

    Finding nothing is no failure: the exit code is 0. Of several snapshots those that cannot be read (encrypted with
    another key, damaged) are left out with a warning, and the exit code is 3.
    """
    from agent.archive_listing import Found, VersionsOf, versions_document, versions_lines
    from agent.documents import in_namespace
    from agent.finding import Bounds, Query, find_in_selection
    from agent.listing_output import listing
    from agent.snapshot_archives import select_snapshots
    from core.units import parse_size
    from pxar.patterns import MatchPattern
    from repository.archive import open_cache
    from repository.stored_bytes import CACHE_SIZE

    if not pattern:
        raise UsageError("find", "''", "the pattern is empty", "'**' finds everything")
    if pattern.startswith("!"):
        raise UsageError(
            "find", repr(pattern), "a pattern to find cannot be negated", "write '\\!' for the character itself"
        )
    parsed = MatchPattern.parse(os.fsencode(pattern))
    if not kinds or set(kinds) - set(_LETTERS):
        raise UsageError(
            "find", f"--type {kinds}", f"kinds are letters of {_LETTERS}", "files and symlinks are --type fl"
        )
    if snapshots and (all_snapshots or recursive):
        raise UsageError("find", pattern, "either snapshots or groups are named, or all are meant", "see --help")
    ns, letters = invocation.namespace(), frozenset(kinds)
    # Who looks into many snapshots is not asked for the passphrase of a key that none of them may need.
    codec = invocation.reading_key().codec() if snapshots else invocation.codec()
    gathered = VersionsOf()
    bounds = Bounds(
        None if newer is None else _moment("--newer", newer),
        None if older is None else _moment("--older", older),
        None if larger is None else parse_size(larger),
        None if smaller is None else parse_size(smaller),
    )
    query = Query(parsed, letters, archive, images, bounds)

    def line(one: Found) -> str:
        return f"{in_namespace(one.snapshot)}  {one.line}"

    def document(one: Found) -> object:
        return {"ns": str(one.snapshot.group.ns), "snapshot": str(one.snapshot), **one.fields}

    def run(add: "Callable[[Found], None]") -> None:
        async def work(progress: "Progress") -> None:
            async with invocation.repository() as repository, open_cache(CACHE_SIZE) as cache:
                selection = await select_snapshots(
                    repository, snapshots or [], ns, everything=all_snapshots, recursive=recursive
                )
                await find_in_selection(
                    repository, selection, query, codec, cache, progress, add, index=index, recursive=recursive
                )

        invocation.run(work, what="find", where=pattern)

    if not versions:
        with listing(invocation, line, document) as found:
            run(found.add)
        return
    with listing(invocation, versions_lines, versions_document) as paths:
        run(gathered.add)
        for path in gathered:
            paths.add(path)


def diff(
    invocation: Invocation,
    snapshot_a: Annotated[str, typer.Argument(metavar="SNAPSHOT_A", help="The one before: type/id/time.")],
    snapshot_b: Annotated[
        str, typer.Argument(metavar="SNAPSHOT_B", help="The one after: type/id/time or type/id/latest.")
    ],
    archive: Annotated[
        str | None, typer.Argument(metavar="ARCHIVE[/PATH]", help="Only this archive, or this part of it.")
    ] = None,
    content: Annotated[
        bool, typer.Option("--content", help="Read and compare the contents of files and images.")
    ] = False,
) -> None:
    """Show what differs between two snapshots: + added, - removed, ~ changed and how.

    Files of equal size and time count as equal. Where only the time differs, the same chunks in both snapshots prove
    equal contents; else 'content not compared' is said, and --content compares them. Directories of which only the time
    differs are not listed. Of disk images the ranges are shown that lie in different chunks of 4 MiB, without reading
    them and without a key; --content narrows them down.

    The exit code is 0 whether there are differences or not.
    """
    from collections import Counter

    from agent.archive_diff import Change, change_document, change_line, compare_snapshots
    from agent.listing_output import listing

    ns, codec = invocation.namespace(), invocation.reading_key().codec()
    name, path = _archive_and_path(archive or "")
    kinds: Counter[str] = Counter()

    with listing(invocation, change_line, change_document) as found:

        def add(change: Change) -> None:
            kinds[change.kind] += 1
            found.add(change)

        async def work(progress: "Progress") -> None:
            async with _opened(invocation, [snapshot_a, snapshot_b], ns, codec, progress) as (before, after):
                await compare_snapshots(before, after, name or None, path, add, content=content)

        invocation.run(work, what="compare", where=f"{snapshot_a} {snapshot_b}")
    if kinds:
        invocation.say(", ".join(f"{kinds[kind]} {kind}" for kind in ("added", "removed", "changed")))
    else:
        invocation.say("no differences")


def catalog_dump(invocation: Invocation, snapshot: _SnapshotText) -> None:
    """Print every entry of a snapshot's file archives: kind and path, of files also size and time (UTC).

    Read from the catalog or, where there is none, from the archives' directories.
    """
    from agent.archive_listing import Dumped, dump, dump_line
    from agent.listing_output import listing
    from core.errors import NotFoundError

    ns, codec = invocation.namespace(), invocation.reading_key().codec()

    def document(one: Dumped) -> object:
        return one.entry.fields

    with listing(invocation, dump_line, document) as found:

        async def work(progress: "Progress") -> None:
            async with _opened(invocation, [snapshot], ns, codec, progress) as (opened,):
                if not opened.file_archives:
                    raise NotFoundError("dump the catalog of", snapshot, "it has no file archives")
                for name in opened.file_archives:
                    await dump(opened, name, found.add)

        invocation.run(work, what="dump the catalog of", where=snapshot)


def _moment(option: str, text: str) -> int:
    """Unix seconds of a date or time, in this host's time zone unless it names one, or of so long ago.

    Raises:
        UsageError: neither.
    """
    import time
    from datetime import datetime

    from agent.cli_verify import parse_duration

    try:
        return int(datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError):
        pass
    try:
        return int(time.time() - parse_duration(text))
    except (UsageError, OverflowError):
        raise UsageError(
            "find",
            f"{option} {text}",
            "it is neither a time nor a duration",
            "write 2026-01-02, 2026-01-02T15:04 or 7d",
        ) from None


def _archive_and_path(text: str) -> tuple[str, bytes]:
    """`root.pxar/etc/ssh` as archive and path in it."""
    archive, _, path = text.partition("/")
    return archive, os.fsencode(path)


@asynccontextmanager
async def _opened(
    invocation: Invocation, snapshots: "Sequence[str]", ns: "Namespace", codec: "ChunkCodec", progress: "Progress"
) -> "AsyncIterator[list[OpenSnapshot]]":
    """The snapshots, open while the block runs."""
    from agent.documents import find_snapshot
    from agent.snapshot_archives import open_snapshot
    from repository.archive import open_cache
    from repository.stored_bytes import CACHE_SIZE

    async with AsyncExitStack() as stack:
        repository = await stack.enter_async_context(invocation.repository())
        cache = await stack.enter_async_context(open_cache(CACHE_SIZE))
        opened = []
        for text in snapshots:
            snapshot = await find_snapshot(repository, text, ns)
            opened.append(await stack.enter_async_context(open_snapshot(repository, snapshot, codec, cache, progress)))
        yield opened
