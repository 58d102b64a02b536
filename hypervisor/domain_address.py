"""How a domain of libvirt is called where a QMP socket may be named as well: `libvirt+qemu:///system#web`."""

import os
import re
import urllib.parse
from dataclasses import dataclass
from typing import Final, Self

_SCHEME: Final = "libvirt+"
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DomainAddress:
    """A domain, running or not."""

    uri: str  #: of libvirt: `qemu:///system`
    domain: str  #: name or UUID

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read what `str` gives; None if it is a path."""
        if not text.startswith(_SCHEME):
            return None
        uri, mark, domain = text.removeprefix(_SCHEME).partition("#")
        return cls(uri, domain) if mark and uri and domain else None

    @staticmethod
    def is_uuid(text: str) -> bool:
        """Whether a domain is named by its UUID."""
        return _UUID.fullmatch(text) is not None

    def __str__(self) -> str:
        return f"{_SCHEME}{self.uri}#{self.domain}"


def is_elsewhere(uri: str) -> bool:
    """Whether the libvirt at `uri` is reached by the name of a host, so that its paths are none of this host's."""
    try:
        return bool(urllib.parse.urlsplit(uri).netloc)
    except ValueError:
        return True


def default_uri() -> str:
    """The libvirt that is meant if none is named, as its own tools choose it."""
    return os.environ.get("LIBVIRT_DEFAULT_URI") or ("qemu:///system" if os.geteuid() == 0 else "qemu:///session")
