"""What became of the files of a backup: counts, and what somebody should know."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, TypeAlias

from pxar.format import escaped

#: Warnings that are kept as texts; further ones are counted.
MAX_WARNINGS: Final = 1000
#: Mount points that are named.
MAX_MOUNTS: Final = 100


class Trouble(Enum):
    """Why an entry is not in the archive as it is on the disk. The value is what the warning says."""

    VANISHED = "vanished while it was read"
    UNREADABLE = "cannot be read and was left out"
    UNREADABLE_REST = "cannot be read to its end, and what is missing was filled up with zeros"
    GROWN = "grew while it was read; what was added is left out"
    SHRUNK = "shrank while it was read and was filled up with zeros"
    CHANGED = "changed while it was read; its parts may be of different times"
    UNSTORABLE = "cannot be stored and was left out"
    ATTRIBUTES = "has extended attributes that are too large; they were left out"
    PATTERNS = "holds patterns that are not used"
    REFERENCE = "cannot be read any more, so every file is read from here on"


@dataclass(slots=True, eq=False)
class CreateReport:
    """Kept up to date while an archive is written, so it can be shown at any time; sizes in bytes.

    `reused_files` and `changed_files` together are the regular files, without further names of one (`hardlinks`). Their
    sizes count the 16 bytes before each content, as PBS's figures do.
    """

    files: int = 0  #: regular files, without further names
    hardlinks: int = 0  #: further names of files
    folders: int = 0  #: the root too
    others: int = 0  #: symlinks, devices, FIFOs, sockets
    excluded: int = 0  #: entries that patterns, options or device boundaries left out, without what lies below them
    size: int = 0  #: of all regular files
    read: int = 0  #: of content read from the source (with a dry run: that would be)

    reused_files: int = 0  #: of which nothing was read
    reused_size: int = 0
    changed_files: int = 0  #: new, changed, or unchanged among too much that is not needed any more
    changed_size: int = 0
    injected_chunks: int = 0  #: chunks of the previous payload stream that were put in
    injected_size: int = 0
    padding: int = 0  #: of these, bytes that no file refers to
    partial_chunks: int = 0  #: injected chunks with padding

    #: Paths of mount points that are stored as empty folders, at most `MAX_MOUNTS`.
    skipped_mounts: list[bytes] = field(default_factory=list)
    more_mounts: int = 0  #: how many are not in the list
    troubles: Counter[Trouble] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)  #: at most `MAX_WARNINGS`
    more_warnings: int = 0  #: how many are not in the list

    def skip_mount(self, path: bytes) -> None:
        """The mount point at `path` (from the root) is stored as an empty folder."""
        self.excluded += 1
        if len(self.skipped_mounts) < MAX_MOUNTS:
            self.skipped_mounts.append(path)
        else:
            self.more_mounts += 1

    @property
    def entries(self) -> int:
        """Entries of the archive."""
        return self.files + self.hardlinks + self.folders + self.others

    def warn(self, trouble: Trouble, path: bytes, why: str = "") -> None:
        """Something about the entry at `path` (from the root)."""
        self.note(trouble, f"{shown_path(path)} {trouble.value}" + (f": {why}" if why else ""))

    def note(self, trouble: Trouble, text: str) -> None:
        """Something else."""
        self.troubles[trouble] += 1
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)
        else:
            self.more_warnings += 1

    def summary(self) -> list[str]:
        """The figures of change detection in the words of PBS's client, in bytes."""
        total = self.files + self.hardlinks
        return [
            f"{total} total files ({self.hardlinks} hardlinks)",
            f"{self.reused_files} unchanged, reusable files with {self.reused_size} B data",
            f"{self.changed_files} changed or non-reusable files with {self.changed_size} B data",
            f"{self.padding} B padding in {self.partial_chunks} partially reused chunks",
        ]


#: Called with the report as it grows; may raise.
Progress: TypeAlias = Callable[[CreateReport], None]


def shown_path(path: bytes) -> str:
    """A path for people: whole, as somebody has to find it, with nothing in it that a terminal would act on."""
    return f"'{escaped(path or b'.')}'"
