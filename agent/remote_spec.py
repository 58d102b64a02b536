"""What a datastore on a server is called; apart from `agent.remotes`, whose imports cost local commands time."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from repository.remote.address import RemoteAddress

if TYPE_CHECKING:
    from agent.config import RepositorySection


@dataclass(frozen=True, slots=True)
class RemoteSpec:
    """A datastore on a server, and what the configuration says of it."""

    address: RemoteAddress
    section: "RepositorySection | None" = None
