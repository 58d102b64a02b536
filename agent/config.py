"""The configuration: one TOML file that only people write, checked against a schema.

Reference for people: docs/configuration.md. An error names the file and the line.
"""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from agent.toml_lines import find_line
from core.errors import FleeceError, UsageError, os_reason
from core.units import parse_size
from datastore.names import BackupType, Group, Namespace, check_store_name

#: Bytes; a configuration is read whole.
MAX_CONFIG_SIZE: Final = 1 << 20

_AUTH_ID: Final = re.compile(r"[^\s:/\x00-\x1f\x7f]+@[A-Za-z0-9_][A-Za-z0-9._\-]*(![A-Za-z0-9_][A-Za-z0-9._\-]*)?")


def check_owner(text: str) -> str:
    """Return `text` if it is an auth id such as `root@pam` or `backup@pbs!host1`.

    Raises:
        UsageError: another form.
    """
    if _AUTH_ID.fullmatch(text) is None or not 3 <= len(text) <= 64:
        raise UsageError("use the owner", repr(text), "it is not of the form user@realm or user@realm!token")
    return text


def _checked(check: Any) -> AfterValidator:
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


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Owner = Annotated[str, _checked(check_owner)]
Size = Annotated[str, _checked(parse_size)]
NamespaceText = Annotated[str, _checked(Namespace.parse)]
BackupId = Annotated[str, _checked(lambda text: Group.parse(f"{BackupType.VM.value}/{text}"))]
RepositoryName = Annotated[str, _checked(check_store_name)]
SyncLevel = Literal["filesystem", "file", "none"]
BitmapPolicy = Literal["persistent", "transient", "none"]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=lambda name: name.replace("_", "-"), populate_by_name=False
    )


class KeySettings(_Section):
    """What a section may say about keys; the command line comes first."""

    keyfile: AbsolutePath | None = None  #: key in place of the default one
    master_pubkey_file: AbsolutePath | None = None  #: public master key in place of the default one
    crypt_mode: Literal["encrypt", "sign-only", "none"] | None = None  #: of backups


class RepositorySection(KeySettings):
    """`[repository.NAME]`: a datastore with a name of its own."""

    path: AbsolutePath  #: the datastore's folder
    ns: NamespaceText = ""  #: namespace that is used when the command names none
    owner: Owner | None = None  #: of groups that this host creates there
    sync_level: SyncLevel | None = None  #: how chunks reach the disk; None leaves it to the datastore


class VmSection(KeySettings):
    """`[vm.NAME]`: one virtual machine."""

    id: BackupId | None = None  #: backup id, NAME if not given
    qmp: AbsolutePath | None = None  #: QMP socket
    guest_agent: AbsolutePath | None = None  #: socket of the guest agent
    freeze: bool = True  #: freeze the guest's file systems if there is an agent
    scratch: AbsolutePath | None = None  #: folder of the fleecing images
    scratch_beside_disks: bool = False  #: allow a scratch folder on a file system that holds a disk of this VM
    bitmap: BitmapPolicy = "persistent"
    include: list[str] = []  #: disks to back up; empty: all
    exclude: list[str] = []
    names: dict[str, str] = {}  #: device, node or file name -> name of the disk
    files: list[str] = []  #: NAME.conf:FILE, stored as blobs beside the disks
    disks: dict[str, AbsolutePath] = {}  #: name of the disk -> file or device, for when QEMU does not run
    repository: str | None = None
    ns: NamespaceText | None = None
    owner: Owner | None = None
    bwlimit: Size | None = None


class JobSection(BaseModel):
    """`[job.NAME]`: work by schedule. Its options are those of the command, checked when the job runs."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["backup", "prune", "verify", "gc", "sync", "test-boot"]
    schedule: str | None = None


class Config(KeySettings):
    """The whole file."""

    default_repository: str | None = None
    owner: Owner | None = None
    scratch: AbsolutePath | None = None
    bwlimit: Size | None = None
    repository: dict[RepositoryName, RepositorySection] = {}
    vm: dict[str, VmSection] = {}
    job: dict[str, JobSection] = Field(default={})


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    """The keys that may stand beside the last one of `location`."""
    sections: dict[str, type[BaseModel]] = {"repository": RepositorySection, "vm": VmSection, "job": JobSection}
    model = Config if len(location) == 1 else sections.get(str(location[0]), Config)
    return [field.alias or name for name, field in model.model_fields.items()]


def _words(error: Any) -> str:
    """One of pydantic's error records in our words."""
    location = tuple(error["loc"])
    name = ".".join(str(part) for part in location if part != "[key]")
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        key = str(location[-1])
        near = difflib.get_close_matches(key, _known_keys(location), n=1)
        return f"{name} is no known option" + (f" (did you mean {near[0]!r}?)" if near else "")
    if kind == "missing":
        return f"{name} is missing"
    if kind == "literal_error":
        return f"{name} must be {context['expected']}"
    if kind == "value_error":
        return f"{name}: {context['error']}"
    message = str(error["msg"])
    return f"{name}: {message[0].lower()}{message[1:]}"


def parse_config(text: str, where: str) -> Config:
    """The configuration that `text` says; `where` is its file, for errors.

    Raises:
        UsageError: no TOML, an unknown or missing option, a value that makes no sense.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        position = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)", str(error))
        why = str(error).replace(position[0], "") if position else str(error)
        line = position[1] if position and position[1] else str(text.count("\n") + 1)
        raise UsageError("read the configuration", f"{where}:{line}", f"no valid TOML: {why}") from None
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        faults = sorted(
            (find_line(text, [part for part in fault["loc"] if part != "[key]"]) or 1, _words(fault))
            for fault in error.errors()
        )
    (line, why), *more = faults
    why += "".join(f"; line {number}: {words}" for number, words in more)
    raise UsageError("use the configuration", f"{where}:{line}", why, "docs/configuration.md has all options")


def load_config(path: Path, *, must_exist: bool) -> Config:
    """The configuration in the file `path`; an empty one if the file is not there and need not be.

    Raises:
        UsageError: unreadable, too large, or as `parse_config`.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_SIZE + 1)
    except FileNotFoundError:
        if not must_exist:
            return Config()
        raise UsageError("read the configuration", str(path), "there is no such file") from None
    except OSError as error:
        raise UsageError("read the configuration", str(path), os_reason(error)) from error
    if len(raw) > MAX_CONFIG_SIZE:
        raise UsageError("read the configuration", str(path), f"larger than {MAX_CONFIG_SIZE} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError("read the configuration", f"{path}:{line}", "it is not UTF-8") from None
    return parse_config(text, str(path))
