"""Writes a folder of the file system as a file archive.

    `Source` opens  ->  the walk orders  ->  [`Lookahead` reuses]  ->  `EntryWriter`  ->  encoder  ->  sinks

Synchronous, for one worker thread; where files are compared, another one may read ahead of it (`Ahead`). Folders are
gone through depth first, names sorted by their bytes. Memory is bounded by the entries of the folders that are open at
the same time (`CreateOptions.entries_max`) and by files with several names.

Docs: docs/formats.md, "File archives".
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

from core.errors import SourceError, os_reason
from pxar.ahead import Ahead, SeenFolder
from pxar.behind import Beside
from pxar.create_report import CreateReport, Progress, Trouble, shown_path
from pxar.detection import Lookahead
from pxar.encoder import ArchiveEncoder
from pxar.entry_writer import FILE, FOLDER, FORMAT, EntryWriter, Measuring
from pxar.features import DEFAULT, Features
from pxar.filesystem import UNKNOWN_TYPE, Opened, Scanned, list_folder
from pxar.folders import Folder
from pxar.metadata import Metadata, Stat, encode_metadata
from pxar.patterns import CLI_FILE, EXCLUDE_FILE, MatchList, MatchPattern, parse_exclude_file, pattern_lines, prelude
from pxar.reference import OldFolder, Reference
from pxar.sinks import ArchiveSink, CatalogSink, PayloadSink
from pxar.source import CACHE_TAG, Source, devices_of

_CLI_MODE: Final = 0o100600
LOST_AND_FOUND: Final = b"lost+found"
#: Names whose metadata are read in one call.
BATCH: Final = 1024
#: `d_type` of a folder.
_DT_DIR: Final = 4


#: Opens the previous backup's archive; None if it cannot be read.
OpenReference: TypeAlias = Callable[[], Reference | None]


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """What goes into an archive. The defaults are those of `proxmox-backup-client`."""

    exclude: Sequence[MatchPattern] = ()  #: before the patterns of `.pxarexclude` files; the last match decides
    all_file_systems: bool = False  #: enter every mount point; without, they are stored as empty folders
    include_devices: Sequence[str] = ()  #: enter those that are on the device of one of these paths
    skip_lost_and_found: bool = False
    #: Of folders with a valid `CACHEDIR.TAG` keep the folder and the tag only, as GNU tar's `--exclude-caches` does.
    exclude_caches: bool = False
    skip_e2big_xattr: bool = False  #: leave extended attributes out that are too large to be read, instead of ending
    entries_max: int = 1 << 20  #: of the folders that are open at the same time, together
    #: With a reference: a change of owner, permissions or attributes does not make a file be read again.
    loose: bool = False
    features: Features = DEFAULT  #: which metadata are read


def create_archive(
    root: str,
    archive: ArchiveSink,
    payload: PayloadSink | None = None,
    options: CreateOptions | None = None,
    *,
    reference: Reference | OpenReference | None = None,
    catalog: CatalogSink | None = None,
    report: CreateReport | None = None,
    progress: Progress | None = None,
    beside: Beside | None = None,
) -> CreateReport:
    """Write the folder `root` to `archive`: self-contained, or split if there is a `payload` stream.

    `reference`, for split archives only: the previous backup, whose payload is reused for unchanged files, or what
    opens it while folders are read already. `report` is kept up to date while it runs (a new one otherwise);
    `progress` is called with it at least once per folder and every 4 MiB of a file, and may raise to stop. `beside`
    lends a second thread, of use with a reference. Entries that vanish, cannot be read or change are warnings in the
    report; nothing of that makes an archive that cannot be read.
    The sinks are not closed.

    Raises:
        SourceError: `root` cannot be read; more entries than `entries_max`; no memory or descriptors; extended
            attributes that are too large to be read, unless they are left out.
        UsageError: a path of `include_devices` is not there.
        FleeceError: what the sinks raise. The streams are of no use after any error.
    """
    if options is None:
        options = CreateOptions()
    if report is None:
        report = CreateReport()
    with Source(root, options.features, report, skip_e2big=options.skip_e2big_xattr) as source:
        _Walk(source, options, archive, payload, reference, catalog, progress, None).run(beside)
    return report


def measure_archive(
    root: str,
    options: CreateOptions | None = None,
    *,
    split: bool = True,
    reference: Reference | OpenReference | None = None,
    report: CreateReport | None = None,
    progress: Progress | None = None,
) -> CreateReport:
    """What `create_archive` would do, without reading contents: `report.read` is what it would read.

    Raises:
        SourceError: as `create_archive`, except for contents.
        UsageError: as `create_archive`.
    """
    if options is None:
        options = CreateOptions()
    if report is None:
        report = CreateReport()
    content, archive = Measuring(), Measuring()
    with Source(root, options.features, report, skip_e2big=options.skip_e2big_xattr) as source:
        if split:
            _Walk(source, options, archive, content, reference, None, progress, content).run()
        else:
            _Walk(source, options, content, None, None, None, progress, content).run()
    return report


def _given_patterns(options: CreateOptions) -> list[MatchPattern]:
    given = list(options.exclude)
    if options.skip_lost_and_found:
        given.append(MatchPattern.parse(LOST_AND_FOUND))
    return given


class _Level:
    """A folder that is gone through."""

    __slots__ = ("ahead", "entered", "folder", "index", "kinds", "names", "old", "patterns", "scanned", "scanned_at")

    def __init__(self, folder: Folder, names: list[bytes], kinds: bytes, patterns: bool, old: OldFolder | None) -> None:
        self.folder = folder
        self.names, self.kinds = names, kinds
        self.patterns = patterns  #: it brought patterns of its own
        self.old = old
        self.index = 0  #: of the next name
        #: Metadata that were read ahead, of the names from `scanned_at` on.
        self.scanned: list[Scanned | int] = []
        self.scanned_at = 0
        #: What another thread read of all names, and whether it reads the folders in it too.
        self.ahead: list[Scanned | int | None] | None = None
        self.entered = False


class _Walk:
    def __init__(
        self,
        source: Source,
        options: CreateOptions,
        archive: ArchiveSink,
        payload: PayloadSink | None,
        reference: Reference | OpenReference | None,
        catalog: CatalogSink | None,
        progress: Progress | None,
        measure: Measuring | None,
    ) -> None:
        self._source, self._options, self._progress = source, options, progress
        self._report: CreateReport = source.report
        self._split = payload is not None
        given = _given_patterns(options)
        #: Patterns that do not come from the tree, as a self-contained archive keeps them.
        self._stored = b"" if self._split else pattern_lines(given)
        self._matches = MatchList(given)
        self._warned_of_class = False
        self._warn_of_classes(given, "of the command line")
        encoder = ArchiveEncoder(archive, payload, prelude=prelude(given) if self._split else None)
        self._writer = EntryWriter(
            encoder, self._report, source.is_at, split=self._split, catalog=catalog, progress=progress, measure=measure
        )
        self._payload, self._reference = payload, reference
        self._lookahead: Lookahead | None = None
        self._ahead: Ahead | None = None
        self._open_entries = 0
        self._devices: frozenset[int] | None = None
        if not options.all_file_systems:
            self._devices = frozenset(devices_of(options.include_devices) | {source.root.dev})

    def run(self, beside: Beside | None = None) -> None:
        """All of it; `beside` lends a thread."""
        source = self._source
        try:
            names, kinds = list_folder(source.folders.fd(source.root))
        except OSError as error:
            raise SourceError("back up", source.path, os_reason(error)) from error
        self._writer.encoder.begin(source.root_meta)
        self._report.folders += 1
        root = self._level(source.root, names, kinds, None)
        with self._reading_ahead(beside, names, kinds):
            root.old = self._open_reference()
            root.entered = root.old is not None
            self._go_through(root)
        if self._lookahead is not None:
            self._lookahead.finish()
        if self._stored:
            meta = encode_metadata(Metadata(Stat(_CLI_MODE, 0, os.getuid(), os.getgid())))
            self._writer.made(CLI_FILE, meta, self._stored)
        self._writer.encoder.finish()

    @contextmanager
    def _reading_ahead(self, beside: Beside | None, names: list[bytes], kinds: bytes) -> Iterator[None]:
        """Another thread reads folders while the block runs, if they are to be compared."""
        # What patterns leave out is not looked at, not even ahead.
        chooses = self._matches or self._options.exclude_caches or CLI_FILE in names
        if beside is None or self._reference is None or self._payload is None or chooses:
            yield
            return
        source, skip = self._source, self._options.skip_e2big_xattr
        fd = source.folders.fd(source.root)
        with Ahead(beside, source.root, fd, names, kinds, last=EXCLUDE_FILE, skip_e2big=skip) as self._ahead:
            yield

    def _open_reference(self) -> OldFolder | None:
        """The root of the previous archive, with which the walk begins to compare; None if there is none."""
        reference = self._reference
        if reference is None or self._payload is None:
            return None
        if not isinstance(reference, Reference):
            reference = reference()
            if reference is None:
                return None
        self._lookahead = Lookahead(self._writer, self._source, self._payload, reference, loose=self._options.loose)
        return self._lookahead.root()

    def _go_through(self, root: _Level) -> None:
        source, lookahead = self._source, self._lookahead
        levels = [root]
        while levels:
            below = self._go_on(levels[-1])
            if below is not None:
                levels.append(below)
                continue
            level = levels.pop()
            self._open_entries -= len(level.names)
            if level.patterns:
                self._matches.pop()
            if lookahead is None:
                source.folders.forget(level.folder)
            if levels:
                if lookahead is not None:
                    lookahead.end_folder(levels[-1].folder)
                else:
                    self._writer.end_folder()
            if self._progress is not None:
                self._progress(self._report)

    # --- one folder --------------------------------------------------------------------------------------------------

    def _level(self, folder: Folder, names: list[bytes], kinds: bytes, old: OldFolder | None) -> _Level:
        """What of a folder's entries is wanted."""
        if folder is self._source.root and CLI_FILE in names:
            names, kinds = _kept(names, kinds, [name != CLI_FILE for name in names])
        if self._options.exclude_caches and _has(names, CACHE_TAG) and self._source.is_cache(folder):
            self._report.excluded += len(names) - 1
            names, kinds = _kept(names, kinds, [name == CACHE_TAG for name in names])
        patterns = _has(names, EXCLUDE_FILE) and self._read_patterns(folder)
        if self._matches:
            decisions = self._decide(folder, names, kinds)
            self._report.excluded += len(names) - sum(decisions)
            names, kinds = _kept(names, kinds, decisions)
        self._open_entries += len(names)
        if self._open_entries > self._options.entries_max:
            raise SourceError(
                "back up",
                self._source.path,
                f"with {shown_path(folder.path)} more than {self._options.entries_max} entries would be in memory",
                "--entries-max allows more",
            )
        return _Level(folder, names, kinds, patterns, old)

    def _read_patterns(self, folder: Folder) -> bool:
        """Take the patterns that lie in a folder; whether there are any."""
        text = self._source.patterns(folder, EXCLUDE_FILE)
        if text is None:
            return False
        patterns, faults = parse_exclude_file(text, b"/" + folder.path)
        path = folder.path_of(EXCLUDE_FILE)
        for fault in faults:
            self._report.warn(Trouble.PATTERNS, path, fault)
        if not patterns:
            return False
        self._warn_of_classes(patterns, f"in {shown_path(path)}")
        self._matches.push(patterns)
        return True

    def _warn_of_classes(self, patterns: Sequence[MatchPattern], where: str) -> None:
        """Once: somebody may mean something else."""
        if self._warned_of_class:
            return
        for pattern in patterns:
            if pattern.bang_class:
                self._warned_of_class = True
                text = (
                    f"pattern {shown_path(pattern.text)} {where}: a '!' at the begin of a class is one of its members"
                )
                self._report.note(Trouble.PATTERNS, f"{text}; '^' is what negates it")
                return

    def _decide(self, folder: Folder, names: list[bytes], kinds: bytes) -> list[bool]:
        """For each name whether it goes into the archive."""
        prefix = b"/" + folder.path_of(b"")
        decide = self._matches.decide
        decisions = []
        for name, kind in zip(names, kinds, strict=True):
            is_folder = kind == _DT_DIR
            if kind == UNKNOWN_TYPE:
                is_folder = self._is_folder(folder, name)
            decisions.append(not decide(prefix + name, is_folder))
        return decisions

    def _is_folder(self, folder: Folder, name: bytes) -> bool:
        try:
            found = os.stat(name, dir_fd=self._source.folders.fd(folder), follow_symlinks=False)
        except OSError:
            return False  # opening it will say why
        return found.st_mode & FORMAT == FOLDER

    def _go_on(self, level: _Level) -> _Level | None:
        """Go through a folder up to the next one in it, which is entered and returned; None at its end."""
        names, kinds = level.names, level.kinds
        while level.index < len(names):
            index = level.index
            if kinds[index] == _DT_DIR:
                level.index += 1
                seen = self._ahead.take(names[index]) if level.entered and self._ahead is not None else None
                below = self._open(level, index) if seen is None else self._enter_seen(level, names[index], seen)
            else:
                end = kinds.find(_DT_DIR, index, index + BATCH)
                if end < 0:
                    end = min(len(names), index + BATCH)
                below = self._compare(level, end) if level.old is not None else self._open_all(level, end)
                if self._progress is not None:
                    self._progress(self._report)
            if below is not None:
                return below
        return None

    def _open_all(self, level: _Level, end: int) -> _Level | None:
        """The entries up to index `end` are opened one by one."""
        while level.index < end:
            level.index += 1
            below = self._open(level, level.index - 1)
            if below is not None:
                return below
        return None

    def _compare(self, level: _Level, end: int) -> _Level | None:
        """The entries up to index `end` are compared with those of the previous backup first."""
        lookahead, old = self._lookahead, level.old
        assert lookahead is not None
        assert old is not None
        folder = level.folder
        if level.index >= level.scanned_at + len(level.scanned):
            level.scanned_at = level.index
            if level.ahead is not None:
                level.scanned = level.ahead[level.index : end]  # type: ignore[assignment]  # no folders among them
            else:
                names = level.names[level.index : end]
                level.scanned = self._source.scan(folder, names, level.kinds[level.index : end])
        first, scanned = level.scanned_at, level.scanned
        names = level.names[first : first + len(scanned)]
        index = level.index - first
        while True:
            index = lookahead.files(folder, old, names, scanned, index)
            level.index = first + index + 1
            if index == len(scanned):
                level.index -= 1
                level.scanned = []
                return None
            found = scanned[index]
            if isinstance(found, int):
                self._source.left_out(folder.path_of(names[index]), found)
            elif found[0] & FORMAT == FILE:
                if not lookahead.file(folder, old, names[index], found):
                    below = self._open(level, first + index)
                    if below is not None:
                        return below
                elif found[8]:
                    self._report.warn(Trouble.ATTRIBUTES, folder.path_of(names[index]))
            elif found[0] & FORMAT == FOLDER:
                below = self._open(level, first + index)
                if below is not None:
                    return below
            else:
                if found[8]:
                    self._report.warn(Trouble.ATTRIBUTES, folder.path_of(names[index]))
                lookahead.other(folder, names[index], found)
            index += 1

    # --- one entry ---------------------------------------------------------------------------------------------------

    def _open(self, level: _Level, index: int) -> _Level | None:
        """Write an entry; if it is a folder that is entered, the level of that."""
        folder, name = level.folder, level.names[index]
        found = self._source.open(folder, name, level.kinds[index])
        if found is None:
            return None
        kind = found[0] & FORMAT
        if kind == FILE:
            if self._lookahead is not None:
                self._lookahead.new_file(folder, name, found)
            else:
                self._writer.file(folder, name, found)
            return None
        if kind == FOLDER:
            return self._enter(level, name, found)
        os.close(found[9])
        if self._lookahead is not None:
            self._lookahead.other(folder, name, found)
        else:
            self._writer.other(folder, name, found)
        return None

    def _enter_seen(self, level: _Level, name: bytes, seen: SeenFolder) -> _Level:
        """Enter a folder that was read ahead."""
        lookahead, found = self._lookahead, seen.found
        assert lookahead is not None
        parent = level.folder
        folder = Folder(parent, name, found[3], found[4], parent.features)
        if found[8]:
            self._report.warn(Trouble.ATTRIBUTES, folder.path)
        lookahead.start_folder(folder, found[1])
        old = lookahead.folder(level.old, name) if level.old is not None else None
        below = self._level(folder, seen.names, seen.kinds, old)
        # Patterns found in it leave out names, and the thread has not gone on below.
        if not below.patterns:
            below.ahead, below.entered = seen.scanned, seen.entered
        return below

    def _enter(self, level: _Level, name: bytes, found: Opened) -> _Level | None:
        parent, fd, meta, lookahead = level.folder, found[9], found[1], self._lookahead
        features, enter = parent.features, True
        names: list[bytes] = []
        kinds = b""
        try:
            if found[3] != parent.dev:
                enter, features, meta = self._source.mounted(parent, found, self._devices)
            if enter:
                names, kinds = list_folder(fd)
        except OSError as error:
            os.close(fd)
            self._source.left_out(parent.path_of(name), error.errno or 0)
            return None
        except BaseException:
            os.close(fd)
            raise
        folder = Folder(parent, name, found[3], found[4], features)
        if enter:
            self._source.folders.add(folder, fd)
        else:
            os.close(fd)
            self._report.skip_mount(folder.path)
        if lookahead is not None:
            lookahead.start_folder(folder, meta)
        else:
            self._writer.start_folder(name, meta)
        if not enter:
            if lookahead is not None:
                lookahead.end_folder(parent)
            else:
                self._writer.end_folder()
            return None
        old = None
        if lookahead is not None and level.old is not None:
            old = lookahead.folder(level.old, name)
        return self._level(folder, names, kinds, old)


def _has(names: list[bytes], name: bytes) -> bool:
    """Whether the sorted `names` have `name`."""
    index = bisect_left(names, name)
    return index < len(names) and names[index] == name


def _kept(names: list[bytes], kinds: bytes, keep: Sequence[bool]) -> tuple[list[bytes], bytes]:
    """Those of `names` and `kinds` for which `keep` says so."""
    if all(keep):
        return names, kinds
    chosen = [index for index, wanted in enumerate(keep) if wanted]
    return [names[index] for index in chosen], bytes(kinds[index] for index in chosen)
