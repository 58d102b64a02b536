"""Errors of looking into disk images.

FleeceError
├── FormatError
│   └── DiskFsError           a partition table, volume group or file system that is unknown, damaged, or asks too much
│       └── NotReadError      one that is sound, and of a kind that is not read here
└── ImageLibraryError         the libraries that read file systems are not installed
"""

from typing import Final

from core.errors import FleeceError, FormatError

#: What installs the libraries; docs/disk-images.md has it too.
INSTALL_HINT: Final = "install them with: pip install 'fleece[images]' (the Debian package of Fleece has them)"


class DiskFsError(FormatError):
    """What lies on a disk cannot be read as a file system; nothing else is concerned."""


class NotReadError(DiskFsError):
    """A file system is as it should be, and has something that is not known here."""


class ImageLibraryError(FleeceError):
    """Looking into disk images needs libraries that are not there."""

    def __init__(self, where: str, library: str) -> None:
        super().__init__("look into", where, f"the library {library} is not installed", INSTALL_HINT)
