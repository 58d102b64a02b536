"""QEMU's command line as a blob of the snapshot, for rebuilding the VM, with the secrets in it masked.

Masked are the values of options called `secret`, `password...`, `key...` and their like, wherever QEMU takes options:
`name=value` lists with doubled commas, JSON, `json:` file names, URLs with a password, the guest kernel's command
line. Ids that only point to a secret (`key-secret=sec0`, `keyid=`) stay, since the file is of little use without.
docs/hypervisor.md, "What goes along".
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from core.limits import in_io_thread
from hypervisor.unix_socket import Peer, process_start_time

#: The blob's name without `.blob`.
COMMAND_LINE_NAME: Final = "qemu-command.json"
#: What stands for a secret.
MASK: Final = "***"
#: Bytes of a command line; the kernel allows about 2 MiB.
_MAX_COMMAND_LINE: Final = 4 * 1024 * 1024

_SECRET_KEY: Final = re.compile(r"secret|pass(word|wd|phrase).*|key.*|data|token|.*cookie|.*credentials?")
#: Names that begin like a secret's but only point to one.
_POINTER_KEY: Final = re.compile(r".*-secret|keyid|passwordid")
#: Options whose whole value is text for the guest, not `name=value` of QEMU.
_GUEST_TEXT: Final = frozenset({"append"})

#: The scheme is bounded: without that a long argument of letters alone would take hours.
_URL_PASSWORD: Final = re.compile(r"(?P<head>[A-Za-z][A-Za-z0-9+.-]{0,30}://[^/@:%\s]*[:%])[^/\s]*(?=@)")
#: `rbd:pool/image:id=admin:key=...`; a colon of the value itself has a backslash in front.
_COLON_OPTION: Final = re.compile(r"(?P<head>:(?:key|password|secret)=)(?:\\.|[^:\\])*")
#: SMBIOS strings and kernel arguments by which systemd in the guest takes credentials.
_CREDENTIAL: Final = re.compile(
    r"(?P<head>(?:io\.systemd\.credential(?:\.binary)?:|systemd\.set_credential(?:_binary)?=)[^=:\s]*[=:]).*"
)
#: For JSON that is none: better too much masked than too little.
_QUOTED_SECRET: Final = re.compile(
    r"(?P<head>[\"'](?:secret|pass(?:word|wd|phrase)[^\"']*|key|data|token|cookie)[\"']\s*:\s*)(?:\"(?:\\.|[^\"\\])*\"?|'[^']*'?|[^,}\s]+)",
    re.IGNORECASE,
)


async def command_line(peer: Peer) -> bytes | None:
    """The command line of `peer` as a JSON list of texts, secrets masked; None if it may not be read."""
    raw = await in_io_thread(_read, peer)
    if not raw:
        return None
    arguments = [argument.decode(errors="backslashreplace") for argument in raw.removesuffix(b"\0").split(b"\0")]
    return (json.dumps(masked(arguments), indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


async def took_over(peer: Peer) -> bool:
    """Whether `peer` was started to take over a VM that ran in another QEMU (`-incoming`); False if nobody can tell."""
    raw = await in_io_thread(_read, peer)
    return raw is not None and not {b"-incoming", b"--incoming"}.isdisjoint(raw.split(b"\0"))


def _read(peer: Peer) -> bytes | None:
    try:
        with Path(f"/proc/{peer.pid}/cmdline").open("rb") as file:
            raw = file.read(_MAX_COMMAND_LINE + 1)
    except OSError:
        return None
    # The pid may have gone to another process meanwhile.
    if len(raw) > _MAX_COMMAND_LINE or process_start_time(peer.pid) != peer.start_time:
        return None
    return raw


def masked(arguments: Sequence[str]) -> list[str]:
    """`arguments` with every secret replaced by `MASK`; what holds none comes back as it was."""
    result = []
    option = ""
    for argument in arguments:
        # A value may begin with a dash, but only text for the guest has a reason to.
        if argument.startswith("-") and option not in _GUEST_TEXT and "=" not in argument:
            option = argument.lstrip("-")
            result.append(argument)
        else:
            result.append(_mask_value(option, argument))
            option = ""
    return result


def _mask_value(option: str, value: str) -> str:
    if option in _GUEST_TEXT:
        # The guest's programs split at blanks.
        return "".join(_mask_pair(part) for part in re.split(r"(\s+)", value))
    if value.lstrip().startswith(("{", "[")):
        return _mask_json(value)
    parts = _split(value)
    # The text for a guest's firmware may be a whole configuration with passwords, or a systemd credential.
    new = [
        f"string={MASK}" if option == "fw_cfg" and part.startswith("string=") else _mask_pair(part) for part in parts
    ]
    return value if new == parts else ",".join(part.replace(",", ",,") for part in new)


def _split(text: str) -> list[str]:
    """The parts between single commas; a doubled comma stands for one that belongs to the part."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def _mask_pair(pair: str) -> str:
    """`name=value` with a secret value masked; also a text without `=`."""
    name, equals, value = pair.partition("=")
    if equals and _is_secret(name):
        return f"{name}={MASK}"
    if value.startswith("json:"):
        return f"{name}=json:{_mask_json(value.removeprefix('json:'))}"
    if pair.startswith("json:"):
        return f"json:{_mask_json(pair.removeprefix('json:'))}"
    return _mask_text(pair)


def _mask_json(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _mask_text(_QUOTED_SECRET.sub(rf'\g<head>"{MASK}"', text))
    new = _mask_tree(value)
    return text if new == value else json.dumps(new, ensure_ascii=False)


def _mask_tree(value: Any, *, secret: bool = False) -> Any:
    if isinstance(value, dict):
        return {name: _mask_tree(inner, secret=_is_secret(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_mask_tree(inner, secret=secret) for inner in value]
    if secret and value is not None:
        return MASK
    if isinstance(value, str):
        return f"json:{_mask_json(value.removeprefix('json:'))}" if value.startswith("json:") else _mask_text(value)
    return value


def _is_secret(name: str) -> bool:
    last = name.strip().lower().rpartition(".")[2]
    return _SECRET_KEY.fullmatch(last) is not None and _POINTER_KEY.fullmatch(last) is None


def _mask_text(text: str) -> str:
    for pattern in (_URL_PASSWORD, _COLON_OPTION, _CREDENTIAL):
        text = pattern.sub(rf"\g<head>{MASK}", text)
    return text
