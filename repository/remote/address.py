"""Where a remote repository is: `[[user@realm[!token]@]host[:port]:]store`."""

import re
from dataclasses import dataclass
from typing import Final, Self

from core.errors import UsageError
from datastore.names import check_store_name, is_safe_id

DEFAULT_PORT: Final = 8007
DEFAULT_USER: Final = "root@pam"
DEFAULT_HOST: Final = "localhost"

_FORM: Final = "[[user@realm[!token]@]host[:port]:]store"
_HOST: Final = r"\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]|[^\s:/\[\]@?#\\%]+"
_REMOTE: Final = re.compile(rf"(?:(?P<auth>\S+)@)?(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?:(?P<store>[^\s:/@]+)")
_USER: Final = re.compile(r"[^\s:/\x00-\x1f\x7f]+@[A-Za-z0-9_][A-Za-z0-9._\-]*")


def check_auth_id(text: str) -> str:
    """Return `text` if it names a user (`name@realm`) or an API token (`name@realm!token`).

    Raises:
        UsageError: another form, or not 3 to 64 characters.
    """
    user, mark, token = text.rpartition("!") if "!" in text.rpartition("@")[2] else (text, "", "")
    if not 3 <= len(text) <= 64 or _USER.fullmatch(user) is None or (mark and not is_safe_id(token)):
        raise UsageError("use the user", repr(text[:80]), "it is not of the form name@realm or name@realm!token")
    return text


@dataclass(frozen=True, slots=True)
class RemoteAddress:
    """A datastore on a server, and who asks for it."""

    store: str
    host: str = DEFAULT_HOST  #: name or address, an IPv6 one without brackets
    port: int = DEFAULT_PORT
    auth_id: str = DEFAULT_USER

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a repository string that has at least a host. The user's part ends at the last `@` before the host.

        Raises:
            UsageError: another form.
        """
        match = _REMOTE.fullmatch(text)
        if match is None:
            raise UsageError("use the repository", repr(text[:200]), f"it is not of the form {_FORM}")
        port = int(match["port"] or DEFAULT_PORT)
        if not 1 <= port <= 65535:
            raise UsageError("use the repository", repr(text), f"{port} is no port")
        auth_id = check_auth_id(match["auth"]) if match["auth"] is not None else DEFAULT_USER
        return cls(check_store_name(match["store"]), _host_name(match["host"]), port, auth_id)

    @property
    def is_token(self) -> bool:
        """True if an API token asks."""
        return "!" in self.auth_id.rpartition("@")[2]

    @property
    def server(self) -> str:
        """Host and port as in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"{self.auth_id}@{host}{port}:{self.store}"


def _host_name(text: str) -> str:
    """A name or address as it is looked up and sent; names beyond ASCII in the form of the domain name system."""
    if text.startswith("["):
        return text.strip("[]")
    try:
        return text.encode("idna").decode("ascii")
    except UnicodeError:
        raise UsageError("use the host", repr(text[:80]), "it is no host name") from None


def is_remote(text: str) -> bool:
    """True if `text` has the form of a datastore on a server."""
    return "/" not in text and _REMOTE.fullmatch(text) is not None
