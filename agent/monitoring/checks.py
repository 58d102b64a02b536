"""What `fleece doctor` finds out about monitoring without sending anything: files and programs that are named."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from agent.errors import HookError
from agent.hooks import check_script
from agent.monitoring.mail import DEFAULT_SENDMAIL
from core.errors import FleeceError, os_reason

if TYPE_CHECKING:
    from agent.config import Config
    from agent.monitoring.sections import AnyNotify

#: What is wrong with a section: its name, in words, and what can be done.
Problem = tuple[str, str, str]


def find_faults(config: "Config") -> Iterator[Problem]:
    """Everything that would make a notification, the log, the metrics or the page fail as things are now."""
    for name, section in config.notify.items():
        for words, fix in _notification(section):
            yield f"notification {name}", words, fix
    if config.events is not None and config.events.file is not None:
        folder = config.events.file.parent  # it may be made, those above it are not
        yield from _folder("event log", folder if folder.exists() else folder.parent)
    if config.metrics is not None and config.metrics.textfile is not None:
        yield from _folder("metrics", config.metrics.textfile.parent)
    if config.status is not None:
        from agent.monitoring.web import check_files

        try:
            check_files(config.status)
        except FleeceError as error:
            yield "status page", str(error), error.hint
        else:
            for path in (config.status.token_file, config.status.key):
                for words, fix in _secret(path):
                    yield "status page", words, fix


def _notification(section: "AnyNotify") -> Iterator[tuple[str, str]]:
    if section.template is not None:
        from agent.monitoring.messages import read_template

        try:
            read_template(section.template)
        except FleeceError as error:
            yield str(error), error.hint
    if section.type == "command":
        yield from _program(Path(section.command[0]))
    elif section.type == "webhook":
        yield from _secret(section.secret_file)
    elif section.smtp is None:
        yield from _program(section.sendmail or Path(DEFAULT_SENDMAIL), "install a mail server, or write smtp")
    else:
        yield from _secret(section.password_file)
        if section.ca_file is not None and not os.access(section.ca_file, os.R_OK):
            yield f"{section.ca_file} cannot be read", ""


def _program(path: Path, fix: str = "") -> Iterator[tuple[str, str]]:
    try:
        check_script(path)
    except HookError as error:
        yield f"{path}: {error.why}", error.hint or fix


def _secret(path: Path | None) -> Iterator[tuple[str, str]]:
    """A file that should be there, and for nobody else."""
    if path is None:
        return
    try:
        found = path.stat()
    except OSError as error:
        yield f"{path}: {os_reason(error)}", ""
        return
    if not stat.S_ISREG(found.st_mode) or not os.access(path, os.R_OK):
        yield f"{path} cannot be read", ""
    elif found.st_mode & stat.S_IROTH:
        yield f"everybody can read {path}", f"chmod 600 {path}"


def _folder(name: str, path: Path) -> Iterator[Problem]:
    if not path.is_dir():
        yield name, f"there is no folder {path}", f"mkdir {path}"
    elif not os.access(path, os.W_OK | os.X_OK):
        yield name, f"{path} cannot be written by this user", ""
