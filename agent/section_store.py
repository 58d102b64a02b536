"""Named sections of a file that only commands write, each with a secret that lies elsewhere: remotes, S3 endpoints.

The file in the state folder has everything but secrets; a secret is a file of its own in `secrets/`, or a credential of
systemd. Both are read anew for each use.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from agent.config_types import Section
from agent.secrets import SecretStore, Source
from agent.state_files import StateFile
from core.errors import NotFoundError, UsageError

S = TypeVar("S", bound=Section)


@dataclass(frozen=True, slots=True)
class Kind:
    """What the sections of a file are, in words."""

    table: str  #: of the file: `endpoint`
    noun: str  #: `S3 endpoint`
    short: str  #: where there are no others: `endpoint`
    command: str  #: what writes the file: `fleece s3 endpoint`
    about: str  #: the file's first line
    secret: str  #: how names of secrets begin: `s3`
    secret_option: str  #: of the command: `--secret-file`


class SectionStore(Generic[S]):
    """The sections in the file `path`, their secrets in the folder `secrets`."""

    def __init__(self, path: Path, secrets: Path, kind: Kind, check: Callable[[str, Mapping[str, Any]], S]) -> None:
        """As the class.

        Args:
            path: of the file.
            secrets: a folder.
            kind: for messages and names.
            check: makes a section of an id and values by their names in the file; raises UsageError.
        """
        self.path = path
        self.secrets = SecretStore(secrets)
        self._kind, self._check = kind, check
        self._file = StateFile(
            path,
            kind.table,
            f"the list of {kind.noun}s",
            f"{kind.about} Written by '{kind.command}'; secrets lie elsewhere.",
            f"repair or remove the file, then '{kind.command} add' for each of them",
        )

    def sections(self) -> dict[str, S]:
        """All by id; none if the file is not there.

        Raises:
            FleeceError: the file cannot be read, or somebody else wrote it.
        """
        return {id: self._parse(id, table) for id, table in sorted(self._file.read().items())}

    def _parse(self, id: str, table: dict[str, Any]) -> S:
        try:
            return self._check(id, table)
        except UsageError as error:
            raise self._file.wrong(f"{self._kind.table}.{id}: {error.why}") from error

    def section(self, id: str) -> S:
        """One of them.

        Raises:
            NotFoundError: there is none of that id.
            FleeceError: as `sections`.
        """
        sections, kind = self.sections(), self._kind
        if id not in sections:
            known = ", ".join(sections)
            hint = f"known {kind.short}s: {known}" if known else f"'{kind.command} add' makes one known"
            raise NotFoundError(f"find the {kind.noun}", repr(id), f"no {kind.short} has that name", hint)
        return sections[id]

    def secret_name(self, id: str) -> str:
        """The name of its secret: of a file in `secrets/`, and of a credential of systemd."""
        return f"{self._kind.secret}-{id}"

    def secret(self, id: str) -> str:
        """Its secret.

        Raises:
            NotFoundError: there is none.
            FleeceError: others may read it.
        """
        name, kind = self.secret_name(id), self._kind
        hint = f"'{kind.command} update {id} {kind.secret_option} FILE' stores it, or a systemd credential {name}"
        return self.secrets.read(name, hint=hint)

    def source(self, id: str) -> Source:
        """Where its secret comes from."""
        return self.secrets.source(self.secret_name(id))

    def add(self, id: str, section: S, secret: str | None) -> None:
        """Make one known; without a secret that is a credential of systemd.

        Raises:
            UsageError: there is one of that id, or a value cannot be right.
            FleeceError: the files cannot be written.
        """
        kind = self._kind
        self._check(id, _values(section))
        with self._changing() as sections:
            if id in sections:
                hint = f"'{kind.command} update {id}' changes it"
                raise UsageError(f"add the {kind.noun}", repr(id), "there is one of that name already", hint)
            if secret is not None:
                self.secrets.write(self.secret_name(id), secret)
            sections[id] = section

    def update(self, id: str, changes: Mapping[str, Any], secret: str | None) -> S:
        """Change values by their names in the file; None takes one back to its default.

        Raises:
            NotFoundError: there is none of that id.
            UsageError: a value cannot be right.
            FleeceError: the files cannot be written.
        """
        self.section(id)
        with self._changing() as sections:
            after = {**_values(sections[id]), **changes}
            sections[id] = self._check(id, {name: value for name, value in after.items() if value is not None})
            if secret is not None:
                self.secrets.write(self.secret_name(id), secret)
            return sections[id]

    def forget(self, id: str, keep: Callable[[], None] = lambda: None) -> None:
        """Forget one and its secret, unless `keep`, called when nobody else can change the file, raises.

        Raises:
            NotFoundError: there is none of that id.
            FleeceError: the files cannot be written.
        """
        self.section(id)
        with self._changing() as sections:
            keep()
            sections.pop(id, None)
        self.secrets.remove(self.secret_name(id))

    @contextmanager
    def _changing(self) -> Iterator[dict[str, S]]:
        with self._file.changing():
            sections = self.sections()
            yield sections
            self._file.write({id: _values(section) for id, section in sections.items()})


def validated(section: type[S], values: Mapping[str, Any], noun: str) -> S:
    """A section of values by their names in the file.

    Raises:
        UsageError: an unknown name, or a value of another kind or form.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in fault["loc"])
        raise UsageError(f"use the {noun}", name, f"{name}: {fault['msg']}") from None


def _values(section: Section) -> dict[str, Any]:
    return section.model_dump(by_alias=True, exclude_defaults=True, mode="json")
