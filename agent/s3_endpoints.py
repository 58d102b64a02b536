"""The S3 endpoints of this host: what `fleece s3 endpoint` wrote, and their secrets, which lie elsewhere.

`s3-endpoints.toml` in the state folder has everything but secrets. These are read anew for each use, and looked at
again while a store is open, so that a changed one counts without a restart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from agent.config_types import Section, Size
from agent.registry import Registry
from agent.secrets import Source, Stamp
from agent.section_store import Kind, SectionStore, validated
from core.errors import FleeceError
from core.units import parse_size
from datastore.s3.endpoint import DEFAULT_REGION, ContentMd5, Endpoint, Quirk

QuirkText = Literal["skip-if-none-match-header", "delete-objects-via-delete-object"]
ContentMd5Text = Literal["auto", "always", "never"]

#: In the place of a secret where only the rest of an endpoint is looked at.
_NO_SECRET: Final = "-"


class EndpointSection(Section):
    """`[endpoint.ID]` of the file; the names are PBS's where it has them."""

    endpoint: str  #: host name or template
    access_key: str
    port: int | None = None
    region: str = DEFAULT_REGION
    path_style: bool = False
    fingerprint: str | None = None
    fingerprint_only: bool = False
    allow_http: bool = False
    put_rate_limit: float | None = None  #: requests per second
    request_rate_limit: float | None = None
    rate_in: Size | None = None  #: bytes per second, as the next three
    burst_in: Size | None = None
    rate_out: Size | None = None
    burst_out: Size | None = None
    provider_quirks: tuple[QuirkText, ...] = ()
    throttle_codes: tuple[str, ...] = ()
    content_md5: ContentMd5Text = "auto"
    proxy: str | None = None

    def resolve(self, id: str, secret: str = _NO_SECRET) -> Endpoint:
        """The endpoint as the client wants it.

        Raises:
            UsageError: a value that cannot be right.
        """
        rates = {name: getattr(self, name) for name in ("rate_in", "burst_in", "rate_out", "burst_out")}
        return Endpoint(
            id=id,
            endpoint=self.endpoint,
            access_key=self.access_key,
            secret=secret,
            port=self.port,
            region=self.region,
            fingerprint=self.fingerprint,
            fingerprint_only=self.fingerprint_only,
            path_style=self.path_style,
            allow_http=self.allow_http,
            put_rate_limit=self.put_rate_limit,
            request_rate_limit=self.request_rate_limit,
            quirks=frozenset(map(Quirk, self.provider_quirks)),
            throttle_codes=self.throttle_codes,
            content_md5=ContentMd5(self.content_md5),
            proxy=self.proxy,
            **{name: None if text is None else parse_size(text) for name, text in rates.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """All values, as `fleece s3 endpoint list` prints them."""
        return self.model_dump(by_alias=True, mode="json")


@dataclass(frozen=True, slots=True)
class Listed:
    """One endpoint as people look at it."""

    id: str
    section: EndpointSection
    secret: Source
    used_by: tuple[str, ...]  #: names of datastores


_KIND: Final = Kind(
    table="endpoint",
    noun="S3 endpoint",
    short="endpoint",
    command="fleece s3 endpoint",
    about="S3 endpoints of this host.",
    secret="s3",
    secret_option="--secret-file",
)


class EndpointRegistry(SectionStore[EndpointSection]):
    """The endpoints in the file `path`, their secrets in the folder `secrets`."""

    def __init__(self, path: Path, secrets: Path) -> None:
        super().__init__(path, secrets, _KIND, _checked)

    def endpoint(self, id: str) -> Endpoint:
        """One endpoint with its secret.

        Raises:
            NotFoundError: there is none of that id, or it has no secret.
            FleeceError: others may read the secret, or the files cannot be read.
        """
        return self.section(id).resolve(id, self.secret(id))

    def stamp(self, id: str) -> tuple[Stamp | None, int]:
        """What changes whenever an endpoint's keys may have changed."""
        try:
            written = self.path.stat().st_mtime_ns
        except OSError:
            written = 0
        return self.secrets.stamp(self.secret_name(id)), written

    def listed(self, registry: Registry) -> list[Listed]:
        """All endpoints, with the datastores that use them."""
        users = used_by(registry)
        return [Listed(id, section, self.source(id), users.get(id, ())) for id, section in self.sections().items()]

    def remove(self, id: str, registry: Registry) -> None:
        """Forget an endpoint and its secret.

        Raises:
            NotFoundError: there is none of that id.
            FleeceError: a datastore uses it, or the files cannot be written.
        """

        def keep() -> None:
            if users := used_by(registry).get(id):
                why = f"the datastore{'s' * (len(users) > 1)} {', '.join(users)} use{'s' * (len(users) == 1)} it"
                hint = f"'fleece datastore remove {users[0]}' comes first"
                raise FleeceError("remove the S3 endpoint", repr(id), why, hint)

        self.forget(id, keep)


def _checked(id: str, values: Mapping[str, Any]) -> EndpointSection:
    section = section_of(values)
    section.resolve(id)
    return section


def section_of(values: Mapping[str, Any]) -> EndpointSection:
    """Check values by their names in the file.

    Raises:
        UsageError: an unknown name, or a value of another kind.
    """
    return validated(EndpointSection, values, "S3 endpoint")


def used_by(registry: Registry) -> dict[str, tuple[str, ...]]:
    """The datastores of each endpoint."""
    users: dict[str, tuple[str, ...]] = {}
    for name, datastore in sorted(registry.datastores().items()):
        if datastore.s3 is not None:
            users[datastore.s3.endpoint] = (*users.get(datastore.s3.endpoint, ()), name)
    return users
