"""What a Proxmox Backup Server's `s3.cfg` and `datastore.cfg` say, read only (R1).

Sections begin with `type: id`, options are indented `name value`. What else stands in the files is passed over; a
value that makes no sense leaves its section out and says why. The secret is in no error and no text.
"""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from agent.registry import SYNC_LEVELS
from agent.s3_budget import parse_thresholds
from agent.s3_endpoints import EndpointSection, section_of
from agent.schedules import check_schedule
from agent.secrets import check_secret
from core.errors import FleeceError, NotFoundError, UsageError, os_reason
from core.units import parse_size
from datastore.names import check_store_name
from datastore.s3.endpoint import check_bucket

#: Where PBS has its files.
PBS_FOLDER: Final = Path("/etc/proxmox-backup")
_MAX_SIZE: Final = 4 << 20
#: The widest mode of a file with secrets: PBS's own.
_SECRET_MODE: Final = 0o640
_HEADER: Final = re.compile(r"(?P<kind>[A-Za-z0-9_-]+):\s*(?P<id>\S+)\s*")
_OPTION: Final = re.compile(r"\s+(?P<name>[A-Za-z0-9_-]+)(?:\s(?P<value>.*))?")
_TRUE: Final = frozenset({"1", "on", "yes", "true"})
_FALSE: Final = frozenset({"0", "off", "no", "false"})
_TEXTS: Final = ("endpoint", "region", "access-key", "fingerprint", "rate-in", "burst-in", "rate-out", "burst-out")


@dataclass(frozen=True, slots=True)
class PbsEndpoint:
    """One section of `s3.cfg`."""

    id: str
    section: EndpointSection | None  #: None: it cannot be used
    secret: str = field(repr=False, default="")
    why: str = ""  #: why not
    ignored: Sequence[str] = ()  #: options that Fleece does not know


@dataclass(frozen=True, slots=True)
class PbsDatastore:
    """One section of `datastore.cfg`."""

    name: str
    path: Path | None  #: None: it cannot be used
    sync_level: str | None = None
    client: str | None = None  #: endpoint, of one in a bucket
    bucket: str | None = None
    max_cache_size: int | None = None
    thresholds: Mapping[str, int] = field(default_factory=dict)  #: of counters of requests and bytes, by PBS's names
    reset_schedule: str | None = None  #: when those are set back
    why: str = ""
    ignored: Sequence[str] = ()  #: options whose values Fleece does not understand


def read_endpoints(folder: Path) -> list[PbsEndpoint]:
    """The endpoints of `s3.cfg` in `folder`; none if there is no such file.

    Raises:
        FleeceError: it cannot be read, or others may read it.
    """
    try:
        text = _read(folder / "s3.cfg", secret=True)
    except NotFoundError:
        return []
    return [_endpoint(id, options) for kind, id, options in sections(text) if kind == "s3-endpoint"]


def read_datastores(folder: Path) -> list[PbsDatastore]:
    """The datastores of `datastore.cfg` in `folder`.

    Raises:
        FleeceError: it cannot be read.
    """
    text = _read(folder / "datastore.cfg")
    return [_datastore(name, options) for kind, name, options in sections(text) if kind == "datastore"]


def sections(text: str) -> list[tuple[str, str, dict[str, str]]]:
    """Type, id and options of each section; of an option that stands twice the first counts."""
    found: list[tuple[str, str, dict[str, str]]] = []
    for line in text.splitlines():
        if header := _HEADER.fullmatch(line):
            found.append((header["kind"], header["id"], {}))
        elif found and (option := _OPTION.fullmatch(line)):
            found[-1][2].setdefault(option["name"], (option["value"] or "").strip())
    return found


def properties(text: str) -> dict[str, str]:
    """The parts of a property string `name=value,...`."""
    parts = (part.partition("=") for part in text.split(","))
    return {name.strip(): value.strip() for name, _, value in parts}


def _read(path: Path, *, secret: bool = False) -> str:
    what = "read the configuration of PBS"
    try:
        # Not blocking: nobody may ever write into a pipe in its place.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise FleeceError(what, str(path), "it is no file")
            mode = stat.S_IMODE(found.st_mode)
            if secret and mode & ~_SECRET_MODE:
                why = f"its mode is {mode:04o}, and there are secrets in it"
                raise FleeceError(what, str(path), why, f"chmod 640 {path}, and think of making new keys")
            data = file.read(_MAX_SIZE + 1)
    except FileNotFoundError:
        raise NotFoundError(what, str(path), "there is no such file", "name the folder that holds it") from None
    except OSError as error:
        raise FleeceError(what, str(path), os_reason(error)) from error
    if len(data) > _MAX_SIZE:
        raise FleeceError(what, str(path), f"it has more than {_MAX_SIZE} bytes")
    return data.decode(errors="replace")


def _endpoint(id: str, options: Mapping[str, str]) -> PbsEndpoint:
    values: dict[str, Any] = {name: options[name] for name in _TEXTS if name in options}
    known = {*_TEXTS, "secret-key", "port", "path-style", "put-rate-limit", "provider-quirks"}
    try:
        if "port" in options:
            values["port"] = int(options["port"])
        if "put-rate-limit" in options:
            values["put-rate-limit"] = float(options["put-rate-limit"])
        if "path-style" in options:
            values["path-style"] = _bool(options["path-style"])
        if "provider-quirks" in options:
            values["provider-quirks"] = [quirk for quirk in re.split(r"[,;\s]+", options["provider-quirks"]) if quirk]
        section = section_of(values)
        section.resolve(id)
        secret = check_secret(options.get("secret-key", ""))
    except UsageError as error:
        return PbsEndpoint(id, None, why=error.why)
    except ValueError as error:
        return PbsEndpoint(id, None, why=str(error))
    return PbsEndpoint(id, section, secret, ignored=sorted(set(options) - known))


def _bool(text: str) -> bool:
    lower = text.lower()
    if lower not in _TRUE | _FALSE:
        raise ValueError(f"{text!r} is neither true nor false")
    return lower in _TRUE


def _datastore(name: str, options: Mapping[str, str]) -> PbsDatastore:
    level = properties(options.get("tuning", "")).get("sync-level")
    level = level if level in SYNC_LEVELS else None
    backend = properties(options.get("backend", ""))
    path = options.get("path", "")
    try:
        check_store_name(name)
        if "backing-device" in options:
            raise UsageError("import", name, "it lies on a removable device; register its folder while it is mounted")
        if not path.startswith("/"):
            raise UsageError("import", name, f"its path {path!r} is not absolute")
        if backend.get("type") != "s3":
            return PbsDatastore(name, Path(path), level)
        client, bucket = backend.get("client", ""), check_bucket(backend.get("bucket", ""))
        if not client:
            raise UsageError("import", name, "it names no S3 endpoint")
        size = backend.get("max-cache-size")
        limit = None if size is None else parse_size(size)
    except UsageError as error:
        return PbsDatastore(name, None, why=error.why)
    ignored = []
    thresholds: Mapping[str, int] = {}
    schedule = options.get("counter-reset-schedule")
    try:
        if text := options.get("notification-thresholds"):
            thresholds = parse_thresholds(",".join(part.strip().removeprefix("s3-") for part in text.split(",")))
    except UsageError:
        ignored.append("notification-thresholds")
    try:
        schedule = None if schedule is None else check_schedule(schedule)
    except UsageError:  # PBS knows a few forms that systemd does not
        schedule = None
        ignored.append("counter-reset-schedule")
    return PbsDatastore(name, Path(path), level, client, bucket, limit, thresholds, schedule, ignored=ignored)
