"""The S3 endpoints of this host: what `fleece s3 endpoint` wrote, and their secrets, which lie elsewhere.

`s3-endpoints.toml` in the state folder has everything but secrets. These are read anew for each use, and looked at
again while a store is open, so that a changed one counts without a restart.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from agent.config_types import Section, Size
from agent.registry import Registry
from agent.secrets import SecretStore, Source, Stamp
from agent.state_files import Plain, StateFile
from core.errors import FleeceError, NotFoundError, UsageError
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


class EndpointRegistry:
    """The endpoints in the file `path`, their secrets in the folder `secrets`."""

    def __init__(self, path: Path, secrets: Path) -> None:
        self.path = path
        self.secrets = SecretStore(secrets)
        self._file = StateFile(
            path,
            "endpoint",
            "the list of S3 endpoints",
            "S3 endpoints of this host. Written by 'fleece s3 endpoint'; secrets lie elsewhere.",
            "repair or remove the file, then 'fleece s3 endpoint add' for each endpoint",
        )

    def sections(self) -> dict[str, EndpointSection]:
        """All endpoints by id; none if the file is not there.

        Raises:
            FleeceError: the file cannot be read, or somebody else wrote it.
        """
        return {id: self._parse(id, table) for id, table in sorted(self._file.read().items())}

    def _parse(self, id: str, table: dict[str, Any]) -> EndpointSection:
        try:
            section = section_of(table)
            section.resolve(id)
        except UsageError as error:
            raise self._file.wrong(f"endpoint.{id}: {error.why}") from error
        return section

    def section(self, id: str) -> EndpointSection:
        """One endpoint.

        Raises:
            NotFoundError: there is none of that id.
            FleeceError: as `sections`.
        """
        sections = self.sections()
        if id not in sections:
            known = ", ".join(sections)
            hint = f"known endpoints: {known}" if known else "'fleece s3 endpoint add' makes one known"
            raise NotFoundError("find the S3 endpoint", repr(id), "no endpoint has that name", hint)
        return sections[id]

    def endpoint(self, id: str) -> Endpoint:
        """One endpoint with its secret.

        Raises:
            NotFoundError: there is none of that id, or it has no secret.
            FleeceError: others may read the secret, or the files cannot be read.
        """
        section = self.section(id)
        hint = (
            f"'fleece s3 endpoint update {id} --secret-file FILE' stores it, or a systemd credential {secret_name(id)}"
        )
        return section.resolve(id, self.secrets.read(secret_name(id), hint=hint))

    def stamp(self, id: str) -> tuple[Stamp | None, int]:
        """What changes whenever an endpoint's keys may have changed."""
        try:
            written = self.path.stat().st_mtime_ns
        except OSError:
            written = 0
        return self.secrets.stamp(secret_name(id)), written

    def listed(self, registry: Registry) -> list[Listed]:
        """All endpoints, with the datastores that use them."""
        users = used_by(registry)
        return [
            Listed(id, section, self.secrets.source(secret_name(id)), users.get(id, ()))
            for id, section in self.sections().items()
        ]

    def add(self, id: str, section: EndpointSection, secret: str | None) -> None:
        """Make an endpoint known; without a secret that is a credential of systemd.

        Raises:
            UsageError: there is one of that id, or a value cannot be right.
            FleeceError: the files cannot be written.
        """
        section.resolve(id)
        with self._changing() as sections:
            if id in sections:
                hint = f"'fleece s3 endpoint update {id}' changes it"
                raise UsageError("add the S3 endpoint", repr(id), "there is one of that name already", hint)
            if secret is not None:
                self.secrets.write(secret_name(id), secret)
            sections[id] = section

    def update(self, id: str, changes: Mapping[str, Any], secret: str | None) -> EndpointSection:
        """Change values of an endpoint, by their names in the file; None takes one back to its default.

        Raises:
            NotFoundError: there is none of that id.
            UsageError: a value cannot be right.
            FleeceError: the files cannot be written.
        """
        self.section(id)
        with self._changing() as sections:
            before = sections[id].model_dump(by_alias=True, exclude_defaults=True, mode="json")
            after = {name: value for name, value in {**before, **changes}.items() if value is not None}
            sections[id] = section_of(after)
            sections[id].resolve(id)
            if secret is not None:
                self.secrets.write(secret_name(id), secret)
            return sections[id]

    def remove(self, id: str, registry: Registry) -> None:
        """Forget an endpoint and its secret.

        Raises:
            NotFoundError: there is none of that id.
            FleeceError: a datastore uses it, or the files cannot be written.
        """
        self.section(id)
        with self._changing() as sections:
            if users := used_by(registry).get(id):
                why = f"the datastore{'s' * (len(users) > 1)} {', '.join(users)} use{'s' * (len(users) == 1)} it"
                hint = f"'fleece datastore remove {users[0]}' comes first"
                raise FleeceError("remove the S3 endpoint", repr(id), why, hint)
            sections.pop(id, None)
        self.secrets.remove(secret_name(id))

    @contextmanager
    def _changing(self) -> Iterator[dict[str, EndpointSection]]:
        with self._file.changing():
            sections = self.sections()
            yield sections
            self._file.write({id: _table(section) for id, section in sections.items()})


def section_of(values: Mapping[str, Any]) -> EndpointSection:
    """Check values by their names in the file.

    Raises:
        UsageError: an unknown name, or a value of another kind.
    """
    try:
        return EndpointSection.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in fault["loc"])
        raise UsageError("use the S3 endpoint", name, f"{name}: {fault['msg']}") from None


def secret_name(id: str) -> str:
    """The name of an endpoint's secret: of a file in `secrets/`, and of a credential of systemd."""
    return f"s3-{id}"


def used_by(registry: Registry) -> dict[str, tuple[str, ...]]:
    """The datastores of each endpoint."""
    users: dict[str, tuple[str, ...]] = {}
    for name, datastore in sorted(registry.datastores().items()):
        if datastore.s3 is not None:
            users[datastore.s3.endpoint] = (*users.get(datastore.s3.endpoint, ()), name)
    return users


def _table(section: EndpointSection) -> dict[str, Plain | None]:
    return section.model_dump(by_alias=True, exclude_defaults=True, mode="json")
