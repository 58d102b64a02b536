"""What can go wrong with file archives.

FleeceError
├── FormatError
│   └── ArchiveError        bytes that no writer of file archives makes
├── EncodeError             (ValueError) something that a file archive cannot hold
└── UsageError
    └── PatternError        (ValueError) a pattern for paths that breaks the syntax
"""

from core.errors import FleeceError, FormatError, UsageError


class ArchiveError(FormatError):
    """A file archive that is cut off, damaged or forged; the text names the position in the stream."""


class EncodeError(FleeceError, ValueError):
    """Something that a file archive cannot hold: a name, a size that changed while it was written, a wrong order."""


class PatternError(UsageError, ValueError):
    """A pattern for paths that breaks the syntax."""
