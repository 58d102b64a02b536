"""The words of a notification: templates with `$name` in them, which can do nothing but be filled in.

`string.Template` of the standard library: no attributes, no calls, no loops. Whoever needs more writes a program
(type `command`), which gets everything as JSON. What is filled in comes from guests and stores and may be anything.
"""

import json
import string
from collections.abc import Mapping
from typing import Any, Final

from core.errors import UsageError

#: What may stand in a template, and what it says; docs/monitoring.md has the same list.
VARIABLES: Final[Mapping[str, str]] = {
    "kind": "failure, warning, success, interrupted, recovery or test",
    "words": "the same in words",
    "host": "name of this host",
    "job": "name of the job",
    "type": "type of the job",
    "comment": "comment of the job",
    "repository": "repository of the job",
    "state": "how the run ended",
    "run": "the run, as 'fleece job history' has it",
    "start": "when it began, local time",
    "end": "when it ended, local time",
    "duration": "how long it took",
    "error": "why it failed",
    "hint": "what can be done",
    "warnings": "all warnings, a line each",
    "figures": "what was done, a line each",
    "guests": "what became of each guest, a line each",
    "log": "the last lines of the run's log",
    "facts": "error, warnings, figures, guests and the end of the log, each with a heading, as far as there are any",
    "left_out": "how many messages were left out since the last one",
    "subject": "the subject (not in the subject)",
    "document": "everything as JSON; in JSON without quotes around it",
}
DEFAULT_SUBJECT: Final = "[fleece] $host: job $job $words"
DEFAULT_BODY: Final = """\
Job $job ($type) on $host $words.

Run       $run
Begun     $start
Ended     $end ($duration)
State     $state
$facts"""
#: Characters of a subject.
MAX_SUBJECT: Final = 200
#: Bytes of a template.
MAX_TEMPLATE: Final = 64 << 10
#: Characters of a body.
MAX_BODY: Final = 512 << 10


def check_template(text: str) -> None:
    """Refuse what cannot be filled in, when the configuration is read and not in the night.

    Raises:
        UsageError: a `$` that means nothing, or a name that nobody knows.
    """
    template = string.Template(text)
    if not template.is_valid():
        raise UsageError("use the template", "", "a $ in it is followed by no name; a $ itself is written $$")
    unknown = sorted({*template.get_identifiers()} - VARIABLES.keys())
    if unknown:
        why = f"${unknown[0]} is no variable"
        raise UsageError("use the template", "", f"{why}; there are {', '.join(VARIABLES)}")


def fill(text: str, values: Mapping[str, Any], *, as_json: bool = False) -> str:
    """`text` with its variables replaced.

    Args:
        text: a template that `check_template` accepts.
        values: by name.
        as_json: the result is JSON: values are escaped to stand between its quotes, and `$document` without.
    """
    shown = {name: _json_inner(name, value) if as_json else str(value) for name, value in values.items()}
    return string.Template(text).safe_substitute(shown)[:MAX_BODY]


def check_json_template(text: str) -> None:
    """Refuse a template of a JSON document that gives none.

    Raises:
        UsageError: what it gives cannot be read.
    """
    check_template(text)
    try:
        json.loads(fill(text, {**dict.fromkeys(VARIABLES, '"\n'), "left_out": "0", "document": "{}"}, as_json=True))
    except (ValueError, RecursionError) as error:
        raise UsageError("use the template", "", f"it does not give JSON: {error}") from None


def _json_inner(name: str, value: Any) -> str:
    if name == "document":
        return str(value)
    return json.dumps(str(value))[1:-1]


def one_line(text: str, limit: int = MAX_SUBJECT) -> str:
    """`text` as a header may have it: printable, one line, not too long."""
    line = "".join(char if char.isprintable() else " " for char in text[: 4 * limit])
    line = " ".join(line.encode("utf-8", "replace").decode().split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
