"""Other servers that this one syncs with: what the REST interface asks of whoever keeps their list."""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol

from repository.remote.repository import RemoteRepository
from server.errors import ApiError

#: Rates of a connection, as parameters are called; texts as people write them (`20MiB`).
RATES: Final = ("rate-in", "burst-in", "rate-out", "burst-out")


class Remotes(Protocol):
    """The list of remotes. All but `open` is called in a worker thread.

    Raises:
        FleeceError: the list or a secret cannot be read or written; a value that cannot be right.
    """

    def listed(self) -> Mapping[str, Mapping[str, Any]]:
        """Every remote by its name: `host`, `auth-id`, and if they are set `port`, `fingerprint`, `comment`."""
        ...

    def add(self, name: str, values: Mapping[str, Any], password: str) -> None:
        """Make a remote known; `values` by the names of `listed`."""
        ...

    def update(self, name: str, changes: Mapping[str, Any], password: str | None) -> None:
        """Change values of a remote that is there; None takes one away."""
        ...

    def remove(self, name: str) -> None:
        """Forget a remote that is there, and its secret."""
        ...

    def open(
        self, name: str, store: str, rates: Mapping[str, str | None]
    ) -> AbstractAsyncContextManager[RemoteRepository]:
        """A datastore of a remote that is there, while the block runs; rates that are None are the remote's own."""
        ...


class NoRemotes:
    """No remotes, and none can be added."""

    def listed(self) -> Mapping[str, Mapping[str, Any]]:
        """See `Remotes.listed`."""
        return {}

    def add(self, name: str, values: Mapping[str, Any], password: str) -> None:
        """See `Remotes.add`."""
        raise ApiError("this server keeps no remotes")

    def update(self, name: str, changes: Mapping[str, Any], password: str | None) -> None:
        """See `Remotes.update`."""
        raise no_remote(name)

    def remove(self, name: str) -> None:
        """See `Remotes.remove`."""
        raise no_remote(name)

    def open(
        self, name: str, store: str, rates: Mapping[str, str | None]
    ) -> AbstractAsyncContextManager[RemoteRepository]:
        """See `Remotes.open`."""
        raise no_remote(name)


def no_remote(name: str) -> ApiError:
    """The refusal for a remote that is not there."""
    return ApiError(f"no such remote '{name}'")
