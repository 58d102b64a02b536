"""What a restore of files is to do, and what became of it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from pxar.features import DEFAULT, Features
from pxar.format import shown
from pxar.patterns import MatchPattern

#: Warnings of one kind that name their entry; the others are counted.
MAX_ALIKE: Final = 20
#: Warnings that name an entry, in all.
_MAX_WARNINGS: Final = 1000


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """What of an archive is restored. The defaults restore everything, and replace nothing."""

    patterns: Sequence[MatchPattern] = ()  #: see `selection.py`
    #: What of the metadata is restored (OWNER, PERMISSIONS, XATTRS, ACL, FCAPS, QUOTA_PROJID, inode flags), and whether
    #: DEVICE_NODES, FIFOS and SOCKETS are.
    features: Features = DEFAULT
    allow_existing: bool = False  #: go into folders that are there already
    #: Replace what is there under the name of a file, symlink, hard link (which is no folder).
    overwrite_files: bool = False
    overwrite_symlinks: bool = False
    overwrite_hardlinks: bool = False
    overwrite_others: bool = False  #: the same for devices, FIFOs and sockets
    drop_setuid: bool = False  #: leave out setuid and setgid bits of what is no folder, and file capabilities


@dataclass(slots=True, eq=False)
class ExtractReport:
    """Kept up to date while files are written, so it can be shown at any time; sizes in bytes."""

    files: int = 0  #: regular files, copies of hard links included
    hardlinks: int = 0
    folders: int = 0  #: without those that were there
    others: int = 0  #: symlinks, devices, FIFOs, sockets
    size: int = 0  #: of content, holes included
    left_out: int = 0  #: entries whose kind was not wanted, or that the output cannot hold
    failed: int = 0  #: entries that are missing, or that lack content; a folder counts once, with all that is in it
    warnings: list[str] = field(default_factory=list)
    _named: Counter[tuple[str, str]] = field(default_factory=Counter)
    _counted: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def entries(self) -> int:
        """Entries that were restored."""
        return self.files + self.hardlinks + self.folders + self.others

    def complain(self, what: str, path: bytes, why: str, *, name_it: bool = True, alike: str | None = None) -> None:
        """Note that `what` of the entry at `path` (from the root) went wrong.

        `name_it` False: only count it. `alike`: the reason in the line that counts, if `why` speaks of this entry only.
        """
        key = what, alike or why
        seen = self._named[key]
        if name_it and seen < MAX_ALIKE and len(self.warnings) < _MAX_WARNINGS:
            self._named[key] += 1
            self.warnings.append(f"{shown_path(path)}: {what}: {why}")
        else:
            self._counted[key] += 1

    def settle(self) -> None:
        """Add to the warnings how many are not among them."""
        for key, count in self._counted.items():
            more = " more" if self._named[key] else ""
            self.warnings.append(f"{count}{more} {'entry' if count == 1 else 'entries'}: {key[0]}: {key[1]}")
        self._counted.clear()


def shown_path(path: bytes) -> str:
    """A path for people."""
    return shown(path or b"/")
