"""The servers that syncs use: what `fleece remote` wrote, and their secrets, which lie elsewhere.

`remotes.toml` in the state folder has everything but secrets; a secret is a file of its own in `secrets/`, or a
credential of systemd named `remote-ID`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from agent.config_types import Fingerprint, NamespaceText, RepositoryName, Section, Size
from agent.secrets import Source
from agent.section_store import Kind, SectionStore, validated
from core.dial import TlsPin, parse_fingerprint
from core.errors import UsageError
from core.units import parse_size
from datastore.names import check_store_name
from repository.remote.address import DEFAULT_PORT, RemoteAddress, check_auth_id
from repository.remote.opening import RemoteOptions

RATES: Final = ("rate_in", "burst_in", "rate_out", "burst_out")


class RemoteSection(Section):
    """`[remote.ID]` of the file; the names are PBS's where it has them."""

    host: str
    auth_id: str  #: `user@realm` or `user@realm!token`; owns what is pushed there
    port: int = DEFAULT_PORT
    fingerprint: Fingerprint | None = None
    fingerprint_only: bool = False
    store: RepositoryName | None = None  #: datastore there, when a command names none
    ns: NamespaceText = ""  #: namespace there, likewise
    rate_in: Size | None = None  #: bytes per second, as the next three
    burst_in: Size | None = None
    rate_out: Size | None = None
    burst_out: Size | None = None
    comment: str | None = None

    def address(self, store: str) -> RemoteAddress:
        """A datastore there.

        Raises:
            UsageError: a value that cannot be right.
        """
        host = f"[{self.host}]" if ":" in self.host else self.host
        return RemoteAddress.parse(f"{check_auth_id(self.auth_id)}@{host}:{self.port}:{check_store_name(store)}")

    def to_json(self) -> dict[str, Any]:
        """All values, as `fleece remote list` prints them."""
        return self.model_dump(by_alias=True, mode="json")


@dataclass(frozen=True, slots=True)
class ListedRemote:
    """One remote as people look at it."""

    id: str
    section: RemoteSection
    secret: Source


class _StoredSecret:
    """The secret of a remote; nobody is asked, since jobs use it."""

    def __init__(self, remotes: "RemoteRegistry", id: str) -> None:
        self._remotes, self._id = remotes, id

    async def password(self, address: RemoteAddress) -> str | None:
        """See `Secrets.password`."""
        return self._remotes.secret(self._id)

    async def second_factor(self, address: RemoteAddress) -> str | None:
        """See `Secrets.second_factor`."""
        return None


_KIND: Final = Kind(
    table="remote",
    noun="remote",
    short="remote",
    command="fleece remote",
    about="Servers that syncs use.",
    secret="remote",
    secret_option="--password-file",
)


class RemoteRegistry(SectionStore[RemoteSection]):
    """The remotes in the file `path`, their secrets in the folder `secrets`."""

    def __init__(self, path: Path, secrets: Path) -> None:
        super().__init__(path, secrets, _KIND, lambda id, values: section_of(values))

    def options(self, id: str, rates: Mapping[str, str | None] | None = None) -> RemoteOptions:
        """How the server is reached; `rates` by `RATES`, in place of its own.

        Raises:
            NotFoundError, FleeceError: as `section`.
            UsageError: a proxy or rate of another form.
        """
        from agent.remotes import proxy_from_environment

        section = self.section(id)
        pin = None if section.fingerprint is None else parse_fingerprint(section.fingerprint)
        own = {name: getattr(section, name) for name in RATES}
        return with_rates(
            RemoteOptions(
                pin=TlsPin(pin, section.fingerprint_only),
                proxy=proxy_from_environment(),
                secrets=_StoredSecret(self, id),
            ),
            {**own, **{name: text for name, text in (rates or {}).items() if text is not None}},
        )

    def listed(self) -> list[ListedRemote]:
        """All remotes, and whether they have a secret."""
        return [ListedRemote(id, section, self.source(id)) for id, section in self.sections().items()]

    def add(self, id: str, section: RemoteSection, secret: str | None) -> None:
        """As `SectionStore.add`; the id must be one that may name a remote."""
        super().add(check_remote_id(id), section, secret)

    def remove(self, id: str) -> None:
        """As `SectionStore.forget`."""
        self.forget(id)


def with_rates(options: RemoteOptions, rates: Mapping[str, str | None]) -> RemoteOptions:
    """The options with other rates, given as people write them; what is None stays.

    Raises:
        UsageError: a rate of another form, or a burst without its rate.
    """
    numbers = {name: float(parse_size(text)) for name, text in rates.items() if text is not None}
    changed = replace(
        options,
        rate_in=numbers.get("rate_in", options.rate_in) or None,
        burst_in=numbers.get("burst_in", options.burst_in) or None,
        rate_out=numbers.get("rate_out", options.rate_out) or None,
        burst_out=numbers.get("burst_out", options.burst_out) or None,
    )
    for way in ("in", "out"):
        if getattr(changed, f"burst_{way}") is not None and getattr(changed, f"rate_{way}") is None:
            raise UsageError("use", f"--burst-{way}", f"it needs --rate-{way}")
    return changed


def check_remote_id(id: str) -> str:
    """Return `id` if it may name a remote.

    Raises:
        UsageError: other characters, or not 3 to 32 of them.
    """
    try:
        return check_store_name(id)
    except UsageError as error:
        raise UsageError("use the remote's name", error.where, error.why) from None


def section_of(values: Mapping[str, Any]) -> RemoteSection:
    """Check values by their names in the file.

    Raises:
        UsageError: an unknown name, or a value of another kind or form.
    """
    section = validated(RemoteSection, values, "remote")
    section.address(section.store or "any")
    if section.fingerprint_only and section.fingerprint is None:
        raise UsageError("use the remote", "fingerprint-only", "it needs a fingerprint")
    with_rates(RemoteOptions(), {name: getattr(section, name) for name in RATES})
    return section
