"""`[events]`, `[metrics]`, `[notify.NAME]`, `[status]`: what the configuration says of monitoring.

Reference for people: docs/monitoring.md.
"""

import ipaddress
import re
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from agent.cli_verify import parse_duration
from agent.config_types import AbsolutePath, Fingerprint, Section, checked
from agent.monitoring.templates import check_json_template, check_template
from core.errors import UsageError
from datastore.names import is_safe_id

Duration = Annotated[str, checked(parse_duration)]
Kind = Literal["success", "warning", "failure", "interrupted", "always"]
#: Where the agent's page is, unless the configuration says otherwise.
DEFAULT_LISTEN: Final = "127.0.0.1:8017"
#: The word in URLs and headers that stands for what is in `secret-file`.
SECRET: Final = "$secret"
_ADDRESS: Final = re.compile(
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.][A-Za-z0-9!#$%&'*+/=?^_`{|}~.\-]{0,63}@[A-Za-z0-9.\-]{1,253}"
)
_LOCAL_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}")
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~\-]{1,64}")
#: Headers that the request has anyway, or that would make it another one.
_OWN_HEADERS: Final = frozenset(
    ("host", "content-length", "transfer-encoding", "connection", "content-type", "expect", "upgrade", "te", "trailer")
)


def check_mail_address(text: str) -> None:
    """Refuse what is no plain mail address: `root`, or `admin@example.org`; nothing that a header or option could be.

    Raises:
        UsageError: another form.
    """
    if _ADDRESS.fullmatch(text) is None and _LOCAL_NAME.fullmatch(text) is None:
        raise UsageError("use the address", repr(text), "it is not of the form name or name@host")


def check_host_port(text: str) -> None:
    """Refuse what is not `HOST:PORT`.

    Raises:
        UsageError: another form.
    """
    split_host_port(text)


def split_host_port(text: str) -> tuple[str, int]:
    """Host (without brackets) and port of `127.0.0.1:8017`, `[::1]:8017` or `localhost:25`.

    Raises:
        UsageError: another form.
    """
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    rest = f"{parts.path}{parts.query}{parts.fragment}"
    if not host or port is None or rest or parts.username is not None or not re.fullmatch(r"[A-Za-z0-9.:\-_%]+", host):
        raise UsageError("use the address", repr(text), "it is not of the form HOST:PORT", "write 127.0.0.1:8017")
    return host, port


def is_loopback(host: str) -> bool:
    """Whether only this host can be meant or can connect."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_target_name(name: str) -> None:
    if not is_safe_id(name) or len(name) > 64:
        raise UsageError("use the name", repr(name), "1 to 64 letters, digits, '.', '_' or '-' are allowed")


def _check_url(text: str) -> None:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise UsageError("use the URL", "", "it does not begin with https://HOST or http://HOST")
    if parts.username is not None or parts.password is not None:
        raise UsageError("use the URL", "", "it holds a user or password; write a header with $secret instead")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise UsageError("use the URL", "", "it has characters that no URL has")
    if SECRET in parts.netloc or "$" in text.replace(SECRET, ""):
        raise UsageError("use the URL", "", "of variables only $secret can stand in it, behind the host")


def _check_headers(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if _HEADER_NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no name of a header")
        if name.lower() in _OWN_HEADERS:
            raise ValueError(f"{name} is not free to choose")
        if not value.isascii() or not value.isprintable():
            raise ValueError(f"the value of {name} is not one line of ASCII")
    return headers


class EventsSection(Section):
    """`[events]`: the event log."""

    file: AbsolutePath | None = None  #: JSON lines are added to it
    journal: bool = False  #: also, or only, to systemd's journal

    @model_validator(mode="after")
    def _goes_somewhere(self) -> "EventsSection":
        if self.file is None and not self.journal:
            raise ValueError('it goes nowhere: write file = "/var/log/fleece/events.jsonl", or journal = true')
        return self


class MetricsSection(Section):
    """`[metrics]`: what is measured, and where it is written."""

    textfile: Annotated[AbsolutePath | None, AfterValidator(lambda path: _check_textfile(path))] = None
    survey: Duration = "1h"  #: so often the agent looks at repositories


def _check_textfile(path: Any) -> Any:
    if path is not None and path.suffix != ".prom":
        raise ValueError("node_exporter reads files that end in .prom only")
    return path


class StatusSection(Section):
    """`[status]`: the agent's page."""

    listen: Annotated[str, checked(check_host_port)] = DEFAULT_LISTEN
    token_file: AbsolutePath | None = None  #: its first line must be shown by whoever asks
    certificate: AbsolutePath | None = None  #: PEM, with its chain; with `key` the page is served over TLS only
    key: AbsolutePath | None = None

    @model_validator(mode="after")
    def _is_safe(self) -> "StatusSection":
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        if not is_loopback(split_host_port(self.listen)[0]) and self.token_file is None:
            raise ValueError("listen is not this host alone: that needs a token-file, and should have a certificate")
        return self


class _Notify(Section):
    """What every `[notify.NAME]` has."""

    on: Annotated[list[Kind], BeforeValidator(_as_list), Field(min_length=1)] = Field(
        default_factory=lambda: list[Kind](("failure", "warning"))
    )
    jobs: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)  #: patterns; empty: all
    exclude_jobs: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)
    recovery: bool = True  #: also when a job works again of whose failure it told
    repeat: Duration = "6h"  #: the same of a job is told again after this time at the earliest
    at_most: Annotated[int, Field(ge=1, le=1000)] = 20  #: messages in an hour
    timeout: Duration = "30s"  #: of one attempt
    subject: Annotated[str, checked(check_template)] | None = None
    body: Annotated[str, checked(check_template)] | None = None
    template: AbsolutePath | None = None  #: file with the body

    @model_validator(mode="after")
    def _one_body(self) -> "_Notify":
        if self.body is not None and self.template is not None:
            raise ValueError("body and template are two ways to say the same")
        if not 1 <= parse_duration(self.timeout) <= 300:
            raise ValueError("timeout: 1s to 5m are possible")
        return self


class MailSection(_Notify):
    """A mail."""

    type: Literal["mail"]
    to: Annotated[
        list[Annotated[str, checked(check_mail_address)]], BeforeValidator(_as_list), Field(min_length=1, max_length=50)
    ]
    sender: Annotated[str, checked(check_mail_address)] | None = Field(default=None, alias="from")  #: None: root
    sendmail: AbsolutePath | None = None  #: program; None: /usr/sbin/sendmail, unless `smtp` is given
    smtp: Annotated[str, checked(check_host_port)] | None = None
    tls: Literal["starttls", "tls", "none"] | None = None  #: None: `none` to this host, else `starttls`
    ca_file: AbsolutePath | None = None  #: authorities of the server's certificate in place of the system's
    user: str | None = None
    password_file: AbsolutePath | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> "MailSection":
        if self.smtp is None:
            given = [name for name in ("tls", "ca_file", "user", "password_file") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{given[0].replace('_', '-')} needs smtp")
        elif self.sendmail is not None:
            raise ValueError("sendmail and smtp are two ways to do the same")
        if (self.user is None) != (self.password_file is None):
            raise ValueError("user and password-file belong together")
        if self.user is not None and self.encryption == "none" and not self.is_local:
            raise ValueError("a password goes over TLS only: tls is none")
        return self

    @property
    def is_local(self) -> bool:
        """Whether the SMTP server is this host."""
        return self.smtp is not None and is_loopback(split_host_port(self.smtp)[0])

    @property
    def encryption(self) -> str:
        """`starttls`, `tls` or `none`."""
        return self.tls or ("none" if self.is_local else "starttls")


class WebhookSection(_Notify):
    """A request to a web server."""

    type: Literal["webhook"]
    url: Annotated[str, checked(_check_url)]
    method: Literal["POST", "PUT"] = "POST"
    headers: Annotated[dict[str, str], AfterValidator(_check_headers)] = Field(default_factory=dict)
    content_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$&^_.+/; =-]{3,100}$")] = "application/json"
    secret_file: AbsolutePath | None = None  #: its first line replaces `$secret` in URL and headers
    fingerprint: Fingerprint | None = None  #: of the server's certificate
    insecure_secret: bool = False  #: the secret may go over plain HTTP to another host

    @model_validator(mode="after")
    def _makes_sense(self) -> "WebhookSection":
        used = SECRET in self.url or any(SECRET in value for value in self.headers.values())
        if used != (self.secret_file is not None):
            raise ValueError("$secret needs secret-file" if used else "secret-file needs $secret in url or headers")
        parts = urlsplit(self.url)
        plain = parts.scheme == "http" and not is_loopback(parts.hostname or "")
        if used and plain and not self.insecure_secret:
            raise ValueError("the secret would go over plain http: write https, or insecure-secret = true")
        if self.fingerprint is not None and parts.scheme == "http":
            raise ValueError("fingerprint needs https")
        if self.body is not None and self.is_json:
            try:
                check_json_template(self.body)
            except UsageError as error:
                raise ValueError(f"body: {error.why}") from error
        return self

    @property
    def is_json(self) -> bool:
        """Whether the body is a JSON document."""
        kind = self.content_type.partition(";")[0].strip().lower()
        return kind == "application/json" or kind.endswith("+json")


class CommandSection(_Notify):
    """A program of this host."""

    type: Literal["command"]
    command: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]  #: absolute path, and arguments

    @model_validator(mode="after")
    def _is_absolute(self) -> "CommandSection":
        if not self.command[0].startswith("/") or any("\0" in word for word in self.command):
            raise ValueError("the path of a command begins with a /")
        return self


NotifySection = Annotated[MailSection | WebhookSection | CommandSection, Field(discriminator="type")]
AnyNotify = MailSection | WebhookSection | CommandSection
TargetName = Annotated[str, checked(_check_target_name)]
#: By type, for suggestions.
NOTIFY_MODELS: Final[dict[str, type[BaseModel]]] = {
    "mail": MailSection,
    "webhook": WebhookSection,
    "command": CommandSection,
}
