"""SHA-256 of many chunks at once."""

import hashlib
from collections.abc import Sequence

from core.buffers import Buffer


def digest_many(chunks: Sequence[Buffer], *, suffix: bytes = b"") -> list[bytes]:
    """SHA-256 of each of `chunks`, followed by `suffix`, in order."""
    digests = []
    for chunk in chunks:
        state = hashlib.sha256(chunk)
        state.update(suffix)
        digests.append(state.digest())
    return digests


def implementation() -> str:
    """Name of what serves `digest_many`."""
    return "hashlib"
