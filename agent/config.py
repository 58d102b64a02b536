"""The configuration: one TOML file that only people write, checked against a schema.

Reference for people: docs/configuration.md. An error names the file and the line.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from agent.config_types import (
    AbsolutePath,
    BackupId,
    BitmapPolicy,
    Fingerprint,
    NamespaceText,
    Owner,
    RepositoryName,
    Section,
    ServerText,
    Size,
    SyncLevel,
    Uuid,
    checked,
)
from agent.job_sections import JOB_MODELS, Duration, JobName, JobSection
from agent.monitoring.sections import (
    NOTIFY_MODELS,
    EventsSection,
    MetricsSection,
    NotifySection,
    StatusSection,
    TargetName,
)
from agent.s3_budget import Budget
from agent.toml_lines import find_line
from agent.vzdump_hook import VzdumpHookSection
from core.errors import FleeceError, UsageError, os_reason
from datastore.names import BackupType, Group

#: Bytes; a configuration is read whole.
MAX_CONFIG_SIZE: Final = 1 << 20


_SERVER_OPTIONS: Final = frozenset(
    ("fingerprint", "fingerprint_only", "password_file", "rate_in", "burst_in", "rate_out", "burst_out", "uploads")
)


class KeySettings(Section):
    """What a section may say about keys; the command line comes first."""

    keyfile: AbsolutePath | None = None  #: key in place of the default one
    master_pubkey_file: AbsolutePath | None = None  #: public master key in place of the default one
    crypt_mode: Literal["encrypt", "sign-only", "none"] | None = None  #: of backups


class RepositorySection(KeySettings):
    """`[repository.NAME]`: a datastore with a name of its own, in a folder or on a server."""

    path: AbsolutePath | None = None  #: the datastore's folder
    server: ServerText | None = None  #: `[[user@realm[!token]@]host[:port]:]store`
    fingerprint: Fingerprint | None = None  #: of the server's certificate
    fingerprint_only: bool = False  #: it must match even if the certificate is valid
    password_file: AbsolutePath | None = None  #: the user's password or the token's secret, its first line
    rate_in: Size | None = None  #: bytes a second from the server
    burst_in: Size | None = None
    rate_out: Size | None = None  #: bytes a second to the server
    burst_out: Size | None = None
    uploads: Annotated[int, Field(ge=1, le=64)] | None = None  #: chunks on their way to the server at a time
    ns: NamespaceText = ""  #: namespace that is used when the command names none
    owner: Owner | None = None  #: of groups that this host creates there
    sync_level: SyncLevel | None = None  #: how chunks reach the disk; None leaves it to the datastore

    @model_validator(mode="after")
    def _folder_or_server(self) -> Self:
        if (self.path is None) == (self.server is None):
            raise ValueError("path is missing (or server, for a datastore on one)" if self.path is None else
                             "it has both path and server")  # fmt: skip
        others = {"sync_level"} if self.path is None else _SERVER_OPTIONS
        given = sorted(name.replace("_", "-") for name in others & self.model_fields_set)
        if given:
            where = "a server" if self.path is None else "this host"
            raise ValueError(f"{given[0]} means nothing for a datastore on {where}")
        if self.fingerprint_only and self.fingerprint is None:
            raise ValueError("fingerprint-only needs a fingerprint")
        return self


class VmSection(KeySettings):
    """`[vm.NAME]`: one virtual machine."""

    id: BackupId | None = None  #: backup id, NAME if not given
    tags: list[str] = Field(default_factory=list)  #: words by which jobs choose VMs
    qmp: AbsolutePath | None = None  #: QMP socket
    uuid: Uuid | None = None  #: of the VM behind `qmp`; another one there is refused
    libvirt: str | None = None  #: name or UUID of a domain of libvirt, instead of `qmp`
    connect: str | None = None  #: which libvirt; None: that of the host for root, else the user's own
    guest_agent: AbsolutePath | None = None  #: socket of the guest agent
    freeze: bool = True  #: freeze the guest's file systems if there is an agent
    freeze_mounts: list[str] = Field(default_factory=list)  #: only what is mounted there in the guest; empty: all
    pause: Literal["never", "without-agent", "always"] = "never"  #: pause the guest for the instant
    scratch: AbsolutePath | None = None  #: folder of the fleecing images
    scratch_beside_disks: bool = False  #: allow a scratch folder on a file system that holds a disk of this VM
    bitmap: BitmapPolicy = "persistent"
    flavour: Literal["auto", "stock", "proxmox"] = "auto"  #: who makes the frozen view; auto: what QEMU offers
    tpm_state: AbsolutePath | None = None  #: folder or file (flavour proxmox: file or device) with its TPM's state
    efi_vars: AbsolutePath | None = None  #: image of its EFI variables, for when QEMU does not run
    include: list[str] = Field(default_factory=list)  #: disks to back up; empty: all
    exclude: list[str] = Field(default_factory=list)
    names: dict[str, str] = Field(default_factory=dict)  #: device, node or file name -> name of the disk
    files: list[str] = Field(default_factory=list)  #: NAME.conf:FILE, stored as blobs beside the disks
    disks: dict[str, AbsolutePath] = Field(
        default_factory=dict
    )  #: name of the disk -> file or device, for when QEMU does not run
    repository: str | None = None
    ns: NamespaceText | None = None
    owner: Owner | None = None
    bwlimit: Size | None = None


class PriceSection(Section):
    """`[s3.prices.ENDPOINT]`: what requests and bytes cost there; the defaults are list prices of AWS."""

    currency: str = "USD"
    per_1000_writes: Annotated[float, Field(ge=0)] = 0.005  #: PUT, COPY, POST and LIST
    per_1000_reads: Annotated[float, Field(ge=0)] = 0.0004  #: GET and HEAD
    per_gib_out: Annotated[float, Field(ge=0)] = 0.09  #: bytes downloaded


class S3Section(Section):
    """`[s3]`: datastores in buckets."""

    budget: Annotated[str, checked(Budget.parse)] | None = None  #: of each command and job; `--s3-budget` comes first
    patience: Duration | None = None  #: how long requests are tried; None: 15 minutes
    prices: dict[str, PriceSection] = Field(default_factory=dict)  #: by endpoint; `default`: of all others


class LimitsSection(Section):
    """`[limits]`: how many backups and other jobs run at the same time, all processes of this host together."""

    host: Annotated[int, Field(ge=1, le=256)] = 4
    store: Annotated[int, Field(ge=1, le=256)] = 4  #: with one repository


class NbdSection(Section):
    """`[nbd]`: block devices /dev/nbdX."""

    reservations: AbsolutePath | None = None  #: file that programs of this host reserve devices in
    lock: AbsolutePath | None = None  #: that they lock meanwhile; None: `reservations` with `.lock`


class Config(KeySettings):
    """The whole file."""

    default_repository: str | None = None
    owner: Owner | None = None
    scratch: AbsolutePath | None = None
    bwlimit: Size | None = None
    change_detection_mode: Literal["legacy", "data", "metadata"] | None = None  #: of folders; None is legacy
    repository: dict[RepositoryName, RepositorySection] = Field(default_factory=dict)
    vm: dict[str, VmSection] = Field(default_factory=dict)
    job: dict[JobName, JobSection] = Field(default_factory=dict)
    s3: S3Section | None = None
    limits: LimitsSection = Field(default_factory=LimitsSection)
    nbd: NbdSection = Field(default_factory=NbdSection)
    vzdump_hook: VzdumpHookSection = Field(default_factory=VzdumpHookSection)
    hook: AbsolutePath | None = None  #: script that jobs call
    hook_timeout: Duration = "10m"
    events: EventsSection | None = None  #: None: no event log
    metrics: MetricsSection | None = None  #: None: repositories are not looked at
    notify: dict[TargetName, NotifySection] = Field(default_factory=dict)
    status: StatusSection | None = None  #: None: no page


def _location(error: Any) -> tuple[str | int, ...]:
    """The path of keys in the file: pydantic puts the type behind the name of a job or notification."""
    location = tuple(part for part in error["loc"] if part != "[key]")
    if location[:1] in (("job",), ("notify",)) and len(location) > 2:
        return location[:2] + location[3:]
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return (*location, "type")
    return location


def _known_keys(error: Any) -> list[str]:
    """The keys that may stand beside the one at fault."""
    location = tuple(error["loc"])
    sections: dict[str, type[BaseModel]] = {
        "repository": RepositorySection,
        "vm": VmSection,
        "s3": S3Section,
        "limits": LimitsSection,
        "nbd": NbdSection,
        "vzdump-hook": VzdumpHookSection,
        "events": EventsSection,
        "metrics": MetricsSection,
        "status": StatusSection,
    }
    model = Config if len(location) == 1 else sections.get(str(location[0]), Config)
    if location[:1] == ("job",) and len(location) > 2:
        model = JOB_MODELS.get(str(location[2]), Config)
    if location[:1] == ("notify",) and len(location) > 2:
        model = NOTIFY_MODELS.get(str(location[2]), Config)
    if location[:2] == ("s3", "prices"):
        model = PriceSection
    return [field.alias or name for name, field in model.model_fields.items()]


def _words(error: Any) -> str:
    """One of pydantic's error records in our words."""
    location = _location(error)
    name = ".".join(map(str, location))
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        key = str(location[-1])
        near = difflib.get_close_matches(key, _known_keys(error), n=1)
        return f"{name} is no known option" + (f" (did you mean {near[0]!r}?)" if near else "")
    if kind in ("missing", "union_tag_not_found"):
        return f"{name} is missing"
    if kind == "union_tag_invalid":
        return f"{name} must be one of {context['expected_tags']}"
    if kind == "literal_error":
        return f"{name} must be {context['expected']}"
    if kind == "value_error":
        return f"{name}: {context['error']}"
    message = str(error["msg"])
    return f"{name}: {message[0].lower()}{message[1:]}"


def _cross_faults(config: Config) -> Iterator[tuple[Sequence[str], str]]:
    """What sections say of each other that is not so: path of keys, and the fault in words."""
    for phase, names in config.vzdump_hook.jobs.items():
        for name in names:
            if name not in config.job:
                keys = ("vzdump-hook", "jobs", phase)
                yield keys, f"{'.'.join(keys)} names the job {name!r}, but there is no [job.{name}]"
    for name, section in config.vm.items():
        if section.id is None:
            try:
                Group.parse(f"{BackupType.VM.value}/{name}")
            except FleeceError:
                yield ("vm", name), f"vm.{name}: its name is no backup id; give it one with id"


def parse_config(text: str, where: str) -> Config:
    """The configuration that `text` says; `where` is its file, for errors.

    Raises:
        UsageError: no TOML, an unknown or missing option, a value that makes no sense.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of numbers of thousands of digits it is no TOMLDecodeError
        position = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)", str(error))
        why = str(error).replace(position[0], "") if position else str(error)
        line = position[1] if position and position[1] else str(text.count("\n") + 1)
        raise UsageError("read the configuration", f"{where}:{line}", f"no valid TOML: {why}") from None
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        faults = sorted((find_line(text, _location(fault)) or 1, _words(fault)) for fault in error.errors())
    else:
        faults = sorted((find_line(text, keys) or 1, words) for keys, words in _cross_faults(config))
        if not faults:
            return config
    (line, why), *more = faults
    why += "".join(f"; line {number}: {words}" for number, words in more)
    raise UsageError("use the configuration", f"{where}:{line}", why, "docs/configuration.md has all options")


def load_config(path: Path, *, must_exist: bool) -> Config:
    """The configuration in the file `path`; an empty one if the file is not there and need not be.

    Raises:
        UsageError: as `read_config` and `parse_config`.
    """
    return parse_config(read_config(path, must_exist=must_exist), str(path))


def read_config(path: Path, *, must_exist: bool) -> str:
    """The text of the file `path`, for `parse_config`; an empty one if it is not there and need not be.

    Raises:
        UsageError: unreadable, too large, or no UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_SIZE + 1)
    except FileNotFoundError:
        if not must_exist:
            return ""
        raise UsageError("read the configuration", str(path), "there is no such file") from None
    except OSError as error:
        raise UsageError("read the configuration", str(path), os_reason(error)) from error
    if len(raw) > MAX_CONFIG_SIZE:
        raise UsageError("read the configuration", str(path), f"larger than {MAX_CONFIG_SIZE} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError("read the configuration", f"{path}:{line}", "it is not UTF-8") from None
