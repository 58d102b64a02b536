"""What the sections of the configuration are made of: the base class and checked values."""

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from core.errors import FleeceError, UsageError
from core.units import parse_size
from datastore.names import BackupType, Group, Namespace, check_store_name

_AUTH_ID: Final = re.compile(r"[^\s:/\x00-\x1f\x7f]+@[A-Za-z0-9_][A-Za-z0-9._\-]*(![A-Za-z0-9_][A-Za-z0-9._\-]*)?")


def check_owner(text: str) -> str:
    """Return `text` if it is an auth id such as `root@pam` or `backup@pbs!host1`.

    Raises:
        UsageError: another form.
    """
    if _AUTH_ID.fullmatch(text) is None or not 3 <= len(text) <= 64:
        raise UsageError("use the owner", repr(text), "it is not of the form user@realm or user@realm!token")
    return text


def checked(check: Any) -> AfterValidator:
    """A validator from one of our own parsers, whose errors are FleeceErrors."""

    def validate(value: Any) -> Any:
        try:
            check(value)
        except FleeceError as error:
            raise ValueError(error.why) from error
        return value

    return AfterValidator(validate)


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("a path in the configuration begins with a /")
    return path


def _check_fingerprint(text: str) -> None:
    from core.dial import parse_fingerprint

    parse_fingerprint(text)


def _check_server(text: str) -> None:
    from repository.remote.address import RemoteAddress

    RemoteAddress.parse(text)


def _uuid(text: str) -> str:
    import uuid

    try:
        return str(uuid.UUID(text))
    except ValueError as error:
        raise ValueError("a UUID is needed, 01234567-89ab-cdef-0123-456789abcdef") from error


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Owner = Annotated[str, checked(check_owner)]
Size = Annotated[str, checked(parse_size)]
NamespaceText = Annotated[str, checked(Namespace.parse)]
Uuid = Annotated[str, AfterValidator(_uuid)]  #: in its usual form, small letters
BackupId = Annotated[str, checked(lambda text: Group.parse(f"{BackupType.VM.value}/{text}"))]
Fingerprint = Annotated[str, checked(_check_fingerprint)]
ServerText = Annotated[str, checked(_check_server)]
RepositoryName = Annotated[str, checked(check_store_name)]
SyncLevel = Literal["filesystem", "file", "none"]
BitmapPolicy = Literal["persistent", "transient", "none"]


class Section(BaseModel):
    """One table of the file: no unknown options, and names with hyphens."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=lambda name: name.replace("_", "-"), populate_by_name=False
    )
