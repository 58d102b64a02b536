"""An S3 endpoint as configured: where it is, who we are there, and its peculiarities.

The template of the host name is PBS's: `{{bucket}}.` may stand at its start, `{{region}}` for any label but the last.
"""

import ipaddress
import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from core.dial import Proxy
from core.errors import UsageError

#: What PBS puts into signatures when no region is configured.
DEFAULT_REGION: Final = "us-west-1"
_ID: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{2,31}")
_REGION: Final = re.compile(r"[_a-z0-9][-_a-z0-9]{1,31}")
_LABEL: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_BAD_BUCKET_STARTS: Final = ("xn--", "sthree-", "amzn-s3-demo-")
_BAD_BUCKET_ENDS: Final = ("--ol-s3", ".mrap", "--x-s3")
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){31}")
_THROTTLE: Final = re.compile(r"(?P<status>[1-5][0-9]{2})?(?:/?(?P<code>[A-Za-z][A-Za-z0-9.]*))?")
_BUCKET_PART: Final = "{{bucket}}."
_REGION_PART: Final = "{{region}}"


class Quirk(Enum):
    """What a provider does not understand."""

    SKIP_IF_NONE_MATCH = "skip-if-none-match-header"  #: a plain PUT instead of put-if-absent
    DELETE_ONE_BY_ONE = "delete-objects-via-delete-object"  #: no multi-object delete


class ContentMd5(Enum):
    """When a PUT carries the header `content-md5` (R10)."""

    AUTO = "auto"  #: on http, and in buckets with object lock
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint. Making one checks everything.

    Raises:
        UsageError: a value that cannot be right.
    """

    id: str  #: 3 to 32 characters
    endpoint: str  #: host name or template, without scheme, port and path
    access_key: str
    secret: str = field(repr=False)
    port: int | None = None
    region: str = DEFAULT_REGION
    fingerprint: str | None = None  #: SHA-256 of the leaf certificate, `xx:xx:...`
    fingerprint_only: bool = False  #: a valid chain is not enough, the fingerprint must match too
    path_style: bool = False  #: `/<bucket>/<key>` instead of the bucket in the host name
    allow_http: bool = False  #: talk plain http; for tests and gateways on this machine
    put_rate_limit: float | None = None  #: PUT requests per second
    request_rate_limit: float | None = None  #: requests of all methods per second
    rate_in: int | None = None  #: bytes per second, as the next three
    burst_in: int | None = None
    rate_out: int | None = None
    burst_out: int | None = None
    quirks: frozenset[Quirk] = frozenset()
    throttle_codes: tuple[str, ...] = ()  #: more answers that mean "slower": `403`, `403/AccessDenied`, `TooBusy`
    content_md5: ContentMd5 = ContentMd5.AUTO
    proxy: str | None = None  #: `http://host[:port]`; makes tunnels, so it sees no more of https than the host name

    def __post_init__(self) -> None:
        self._require(_ID.fullmatch(self.id), "3 to 32 letters, digits, '.', '_' or '-' are allowed")
        self._require(_is_template(self.endpoint), f"{self.endpoint!r} is no host name, address or template of one")
        self._require(_REGION.fullmatch(self.region), f"{self.region!r} is no region")
        self._require(self.port is None or 0 < self.port < 65536, f"{self.port} is no port")
        self._require(self.access_key, "the access key is empty")
        self._require(self.secret, "the secret key is empty")
        if self.fingerprint is not None:
            lower = self.fingerprint.lower()
            self._require(_FINGERPRINT.fullmatch(lower), "a fingerprint has 32 bytes as xx:xx:...")
            object.__setattr__(self, "fingerprint", lower)
        self._require(not self.fingerprint_only or self.fingerprint, "fingerprint-only needs a fingerprint")
        for name in ("put_rate_limit", "request_rate_limit", "rate_in", "burst_in", "rate_out", "burst_out"):
            value = getattr(self, name)
            possible = value is None or (value > 0 and math.isfinite(value))
            self._require(possible, f"{name.replace('_', '-')} must be more than 0")
        for text in self.throttle_codes:
            self._require(text and _THROTTLE.fullmatch(text), f"{text!r} is no status, code or STATUS/CODE")
        self._require(self.proxy is None or _is_proxy(self.proxy), "the proxy is not of the form http://host[:port]")

    def _require(self, holds: object, why: str) -> None:
        if not holds:
            raise UsageError("use the S3 endpoint", repr(self.id), why)

    @property
    def scheme(self) -> str:
        """`https`, or `http` where that is allowed."""
        return "http" if self.allow_http else "https"

    def host(self, bucket: str | None) -> str:
        """The host name for requests to `bucket`; without one, for the list of buckets.

        Raises:
            UsageError: neither path nor host name would contain the bucket.
        """
        host = self.endpoint.replace(_REGION_PART, self.region)
        if bucket is None:
            return host.replace(_BUCKET_PART, "")
        if not self.path_style and _BUCKET_PART not in host and bucket not in host.split("."):
            why = "the bucket is neither in the host name nor in the path"
            raise UsageError("use the S3 endpoint", repr(self.id), why, "set path-style or begin it with {{bucket}}.")
        return host.replace("{{bucket}}", bucket)

    def authority(self, bucket: str | None) -> str:
        """The `host` header for requests to `bucket`, with the port if one is configured."""
        return self.host(bucket) + (f":{self.port}" if self.port is not None else "")

    def path(self, bucket: str | None, key: str = "") -> str:
        """The path of the object `key`, or of the bucket, not encoded."""
        return f"/{bucket}/{key}" if self.path_style and bucket is not None else f"/{key}"

    def is_throttle(self, status: int, code: str) -> bool:
        """True if the configuration says that this answer asks for fewer requests."""
        for text in self.throttle_codes:
            match = _THROTTLE.fullmatch(text)
            if match is not None and match["status"] in (None, str(status)) and match["code"] in (None, code):
                return True
        return False


def _is_proxy(text: str) -> bool:
    """Credentials would be shown with everything else of the endpoint."""
    try:
        return Proxy.parse(text).credentials == ""
    except UsageError:
        return False


def check_bucket(name: str) -> str:
    """Return `name` if PBS and S3 allow it for a bucket.

    Raises:
        UsageError: not 3 to 63 of `a-z`, `0-9` and `-`, or a reserved beginning or end.
    """
    allowed = _BUCKET.fullmatch(name) is not None
    if not allowed or name.startswith(_BAD_BUCKET_STARTS) or name.endswith(_BAD_BUCKET_ENDS):
        why = "3 to 63 of 'a-z', '0-9' and '-' are allowed, with no '-' at either end and no reserved prefix or suffix"
        raise UsageError("use the bucket", repr(name), why)
    return name


def _is_template(text: str) -> bool:
    host = text.removeprefix(_BUCKET_PART)
    if host == text and _is_address(host):
        return True
    *inner, last = host.split(".")
    if len(host) > 253 or _LABEL.fullmatch(last) is None:
        return False
    return all(label == _REGION_PART or _LABEL.fullmatch(label) for label in inner)


def _is_address(text: str) -> bool:
    bracketed = text.startswith("[") and text.endswith("]")
    try:
        address = ipaddress.ip_address(text[1:-1] if bracketed else text)
    except ValueError:
        return False
    return bracketed == (address.version == 6)
