"""A notification as a program of this host, which gets it as JSON on standard input and in its environment."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agent.errors import HookError
from agent.hooks import Hook
from agent.monitoring.errors import DeliveryError

if TYPE_CHECKING:
    from agent.monitoring.messages import Message
    from agent.monitoring.sections import CommandSection

#: Variables of the message that become variables of the environment.
_VARIABLES: Final = (
    "kind", "words", "host", "job", "type", "comment", "repository", "state", "run", "start", "end", "duration",
    "error", "hint", "left_out",
)  # fmt: skip
#: Characters of one of them: what is longer is in the document.
_MAX_VALUE: Final = 4096
#: sysexits.h: the program asks to be tried again.
_TEMPFAIL: Final = "exit code 75"


def environment(section: "CommandSection", message: "Message") -> dict[str, str]:
    """The program's variables, `PATH` not counted.

    Raises:
        FleeceError: the template cannot be used.
    """
    values = message.values()
    found = {f"FLEECE_{name.upper()}": values[name][:_MAX_VALUE].replace("\0", "?") for name in _VARIABLES}
    found["FLEECE_SUBJECT"] = message.subject(section)
    return {name: text.encode("utf-8", "replace").decode() for name, text in found.items()}


async def run_command(
    section: "CommandSection", message: "Message", timeout_s: float, log: Callable[[str], None]
) -> None:
    """Run the program to its end; exit code 0 means that it has taken the message. What it prints is logged.

    Cancelled, or if it takes too long, it is ended with all that it started.

    Raises:
        DeliveryError: it cannot be run, or failed.
        FleeceError: the template cannot be used.
    """
    document = message.document
    if section.body is not None or section.template is not None:
        document["body"] = message.body(section)
    document["subject"] = message.subject(section)
    program, *arguments = section.command
    data = json.dumps(document).encode() + b"\n"
    try:
        await Hook(Path(program), timeout_s).call(tuple(arguments), environment(section, message), log, data)
    except HookError as error:
        temporary = _TEMPFAIL in error.why
        hint = "" if error.hint.startswith("hook-timeout") else error.hint
        raise DeliveryError("run the command", program, error.why, hint, temporary=temporary) from error
