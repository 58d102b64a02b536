"""One call of the command: the options every verb has, its configuration, its output, its end.

`command` registers a verb and gives it these options. A verb is a plain function of an `Invocation` and its own
options; it calls `Invocation.run` for the work and `Invocation.emit` for the result.
"""

import inspect
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import typer

from agent.general_options import BACKUP_KEY, GENERAL, READING_KEY, REPOSITORY, parameters
from agent.general_options import Output as Output
from core.errors import ExitCode, FleeceError, TargetError, UsageError, os_reason

if TYPE_CHECKING:
    from agent.config import Config, KeySettings
    from agent.keys import BackupKeys, KeyOptions, ReadingKey
    from agent.registry import Registry
    from agent.remote_hosts import RemoteRegistry
    from agent.s3_endpoints import EndpointRegistry
    from agent.s3_use import S3Use
    from core.progress import Progress
    from datastore.codec import ChunkCodec
    from datastore.names import Namespace
    from repository.interface import Repository

T = TypeVar("T")

#: Owner of new groups where nobody says otherwise.
DEFAULT_OWNER: Final = "root@pam"


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except OSError:  # somebody has removed it
        return Path("/")


@dataclass
class Invocation:
    """What the general options say, and the way out for results, warnings and log lines."""

    output: Output = Output.TEXT
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    config_path: Path | None = None
    repo: str | None = None
    ns: str | None = None
    s3_budget: str | None = None
    key_values: dict[str, Any] = field(default_factory=dict)  #: the options of keys, by name
    warnings: list[str] = field(default_factory=list)
    #: Where the command was given, which relative paths begin with; a process in the background has left it.
    folder: Path = field(default_factory=_current_folder)
    _cost_told: bool = False

    @property
    def is_json(self) -> bool:
        """True if standard output is one JSON document."""
        return self.output is not Output.TEXT

    @cached_property
    def config(self) -> "Config":
        """The configuration file, read at the first use.

        Raises:
            UsageError: it is not valid.
        """
        from agent.config import load_config

        path, must_exist = self.config_place()
        return load_config(path, must_exist=must_exist)

    def config_place(self) -> tuple[Path, bool]:
        """Where the configuration file is, and whether it must be there."""
        from agent.places import config_file

        if self.config_path is not None:
            return self.config_path, True
        if named := os.environ.get("FLEECE_CONFIG"):
            return Path(named), True
        return config_file(), False

    @cached_property
    def registry(self) -> "Registry":
        """The datastores that commands made."""
        from agent.places import datastores_file
        from agent.registry import Registry

        return Registry(datastores_file())

    @cached_property
    def endpoints(self) -> "EndpointRegistry":
        """The S3 endpoints that commands made."""
        from agent.places import s3_endpoints_file, secrets_dir
        from agent.s3_endpoints import EndpointRegistry

        return EndpointRegistry(s3_endpoints_file(), secrets_dir())

    @cached_property
    def remotes(self) -> "RemoteRegistry":
        """The servers that syncs use."""
        from agent.places import remotes_file, secrets_dir
        from agent.remote_hosts import RemoteRegistry

        return RemoteRegistry(remotes_file(), secrets_dir())

    @cached_property
    def s3(self) -> "S3Use":
        """What datastores in buckets are used with, and what that cost so far.

        Raises:
            UsageError: `--s3-budget` has another form.
        """
        from agent.s3_budget import Budget
        from agent.s3_use import S3Use

        budget = None if self.s3_budget is None else Budget.parse(self.s3_budget)
        return S3Use(self.endpoints, self.config.s3, budget=budget, warn=self.warnings.append)

    def repository_spec(self, configured: str | None = None) -> str:
        """The repository that is meant: `--repo`, else the environment, else `configured`, else the default.

        Raises:
            UsageError: nothing names one.
        """
        for spec in (
            self.repo,
            os.environ.get("FLEECE_REPOSITORY"),
            os.environ.get("PBS_REPOSITORY"),
            configured,
            self.config.default_repository,
        ):
            if spec:
                return str(self.folder / Path(spec).expanduser()) if "/" in spec else spec
        raise UsageError(
            "find", "the repository", "none is named",
            "give --repo, set FLEECE_REPOSITORY, or write default-repository into the configuration",
        )  # fmt: skip

    def namespace(self, configured: str | None = None, *, repository: str | None = None) -> "Namespace":
        """The namespace that is meant: `--ns`, else PBS_NAMESPACE, else `configured`, else the repository's own.

        Args:
            configured: what a VM's section says.
            repository: the repository that the VM's section names.

        Raises:
            UsageError: not a namespace.
        """
        from datastore.names import Namespace

        for text in (self.ns, os.environ.get("PBS_NAMESPACE"), configured):
            if text is not None:
                return Namespace.parse(text)
        section = self.config.repository.get(self.repository_spec(repository))
        return Namespace.parse(section.ns if section else "")

    @asynccontextmanager
    async def repository(self, configured: str | None = None) -> "AsyncIterator[Repository]":
        """The repository that is meant, open while the block runs.

        Raises:
            UsageError, NotFoundError: nothing or nothing known is named.
            FleeceError: it cannot be opened.
        """
        from agent.repositories import repository_at

        spec = self.repository_spec(configured)
        async with repository_at(spec, self.config, self.registry, lambda: self.s3) as repository:
            yield repository

    def owner(self, named: str | None, configured: str | None = None, *, repository: str | None = None) -> str:
        """Who shall own a new group: `named` (`--owner`), else `configured`, the repository's, the file's, root@pam.

        Raises:
            UsageError: no owner's form.
        """
        from agent.config_types import check_owner

        section = self.config.repository.get(self.repository_spec(repository))
        for text in (named, configured, section.owner if section else None, self.config.owner):
            if text:
                return check_owner(text)
        return DEFAULT_OWNER

    def key_options(self, section: "KeySettings | None" = None, *, repository: str | None = None) -> "KeyOptions":
        """What the command line says about keys, and behind it the configuration.

        Args:
            section: the VM's.
            repository: the repository that the VM's section names.
        """
        from agent.keys import KeyOptions

        try:
            of_repository = self.config.repository.get(self.repository_spec(repository))
        except UsageError:
            of_repository = None  # `vm show` needs none
        levels = [level for level in (section, of_repository, self.config) if level is not None]
        return KeyOptions(
            **self.key_values,
            default_keyfile=next((level.keyfile for level in levels if level.keyfile), None),
            default_master=next((level.master_pubkey_file for level in levels if level.master_pubkey_file), None),
            default_mode=next((level.crypt_mode for level in levels if level.crypt_mode), None),
        )

    def backup_keys(self, section: "KeySettings | None" = None, *, repository: str | None = None) -> "BackupKeys":
        """How a backup is written: mode, key, and the key under the master key. May ask for a passphrase.

        To be called before the work starts, which keeps the terminal busy. Arguments as `key_options`.

        Raises:
            UsageError, FleeceError: as `agent.keys.backup_keys`.
        """
        from agent.keys import backup_keys

        return backup_keys(self.key_options(section, repository=repository), self.say)

    def reading_key(self) -> "ReadingKey":
        """The key to read snapshots with, if there is one. May ask for a passphrase, so before the work starts.

        Raises:
            UsageError, FleeceError: as `agent.keys.reading_key`.
        """
        from agent.keys import reading_key

        return self._told(reading_key(self.key_options()))

    def _told(self, found: "ReadingKey") -> "ReadingKey":
        if found.note and not found.unchecked:
            self.say(found.note)
        return found

    def codec(self) -> "ChunkCodec":
        """What reads snapshots of any key as far as the key at hand goes; asks for no default key's passphrase.

        Raises:
            UsageError, FleeceError: as `agent.keys.reading_key`.
        """
        from agent.keys import reading_key

        return self._told(reading_key(self.key_options(), may_ask=False)).codec()

    def say(self, text: str) -> None:
        """One line for people, on standard error, unless quiet or JSON is asked for."""
        if not self.quiet and not self.is_json:
            to_stderr(text)

    def run(self, work: "Callable[[Progress], Awaitable[T]]", *, what: str, where: str = "") -> T:
        """Run the work of a verb under trio, with progress on standard error; keeps its warnings.

        Raises:
            InterruptedBySignalError, FleeceError: as `agent.running.run`.
        """
        from agent.running import run
        from core.render import rendered

        quiet = self.quiet or (self.is_json and not self.verbose)
        with rendered(sys.stderr, quiet=quiet, verbose=self.verbose) as progress:
            try:
                return run(lambda: work(progress), what=what, where=where, say=self.say)
            finally:
                self.warnings += [text for text in progress.warnings if text not in self.warnings]

    def emit(self, document: Any, text: Callable[[], str | Iterable[str]], *, cost: bool = True) -> None:
        """Write the result to standard output: `document` as JSON, or what `text` returns, for people.

        Args:
            document: the result.
            text: gives it as lines.
            cost: with what talking to a bucket cost: as the key `s3` of a document that is an object.

        Raises:
            TargetError, BrokenPipeError: it cannot be written. What the caller closed (`>&-`) takes everything.
        """
        if cost and self.uses_bucket and isinstance(document, dict):
            document = {**document, "s3": self.s3.to_json()}
            self._cost_told = self.is_json
        if self.is_json:
            indent = 2 if self.output is Output.JSON_PRETTY else None
            lines: str | Iterable[str] = _as_json(document, indent)
        else:
            lines = text()
        for line in [lines] if isinstance(lines, str) else lines:
            with _stdout_errors():
                print(line)
        flush_stdout()

    @property
    def uses_bucket(self) -> bool:
        """True if a datastore in a bucket, or an endpoint, was used."""
        return "s3" in self.__dict__ and self.s3.endpoint is not None

    def tell_cost(self) -> None:
        """Say what talking to a bucket cost, on standard error, if anything and if the document did not."""
        if not self._cost_told and self.uses_bucket and self.s3.requests:
            self._cost_told = True
            if self.is_json:
                to_stderr(json.dumps({"s3": self.s3.to_json()}, ensure_ascii=False))
            else:
                self.say(self.s3.line())

    def show_warnings(self) -> None:
        """List the warnings on standard error: as lines, or as one JSON document."""
        if self.warnings and self.is_json:
            to_stderr(json.dumps({"warnings": self.warnings}, ensure_ascii=False))
        elif self.warnings:
            to_stderr("Warnings:" if len(self.warnings) > 1 else "Warning:")
            for warning in self.warnings:
                to_stderr(f"  {warning}")

    def end(self) -> None:
        """The end of a verb that did its work: exit code 3 if there were warnings.

        Raises:
            typer.Exit: with the exit code, if it is not 0.
        """
        if self.warnings:
            self.show_warnings()
            raise typer.Exit(ExitCode.WARNINGS)


def _plain(value: object) -> object:
    """What JSON cannot write by itself."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Enum):
        return value.value
    return str(value)


@contextmanager
def _stdout_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        silence_stdout()
        if isinstance(error, BrokenPipeError):
            raise
        raise TargetError("write to", "standard output", os_reason(error)) from error


def flush_stdout() -> None:
    """Write what was printed.

    Raises:
        BrokenPipeError: whoever read it went away.
        TargetError: it cannot be written.
    """
    with _stdout_errors():
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()


def silence_stdout() -> None:
    """Standard output cannot be written; nothing may complain about it once more when Python ends."""
    with suppress(OSError, AttributeError):  # None if the caller closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_json(document: Any, indent: int | None) -> str:
    text = json.dumps(document, indent=indent, ensure_ascii=False, default=_plain)
    try:
        text.encode()
    except UnicodeEncodeError:
        # A path that is no UTF-8: JSON must be, and can say `\\udcff`.
        return json.dumps(document, indent=indent, default=_plain)
    return text


def to_stderr(text: str) -> None:
    """Print `text` to standard error; a stream that is gone does not matter."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return


def _invocation(context: typer.Context, values: dict[str, Any], key_values: dict[str, Any]) -> Invocation:
    """Merge the options behind the verb with those before it."""
    before = context.obj if isinstance(context.obj, dict) else {}
    merged = {name: value or before.get(name) for name, value in values.items()}
    # An empty namespace is the root, and so says something.
    ns = values.get("ns") if values.get("ns") is not None else before.get("ns")
    invocation = Invocation(
        output=merged.get("output") or Output.TEXT,
        quiet=bool(merged["quiet"]),
        verbose=bool(merged["verbose"]) or bool(merged["debug"]),
        debug=bool(merged["debug"]),
        config_path=merged["config"],
        repo=merged.get("repo"),
        ns=ns,
        s3_budget=merged.get("s3_budget"),
        key_values=key_values,
    )
    level = logging.DEBUG if invocation.debug else logging.INFO if invocation.verbose else logging.WARNING
    if invocation.is_json and not invocation.verbose:
        level = logging.CRITICAL
    logging.basicConfig(stream=sys.stderr, level=level, format="%(message)s", force=True)
    return invocation


def _take_over(
    function: Callable[..., None], wrapper: Callable[..., None], parameters: list[inspect.Parameter]
) -> None:
    """Make typer see `parameters` as those of `wrapper`."""
    wrapper.__name__, wrapper.__doc__ = function.__name__, function.__doc__
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    everything = [context, *parameters]
    # Keyword-only parameters may not stand before others; typer passes everything by name.
    everything = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in everything]
    wrapper.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in everything}


def command(
    group: typer.Typer,
    name: str,
    *,
    examples: str = "",
    repository: bool = True,
    keys: Literal["read", "write"] | None = None,
    output: bool = True,
    hidden: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function `(Invocation, own options...)` as the verb `name` of `group`.

    Args:
        group: where the verb belongs.
        name: as typed.
        examples: lines shown at the end of `--help`.
        repository: False for a verb that needs no repository: `--repo` and `--ns` are left out.
        keys: `read` adds the options of the key to read snapshots with, `write` those of the key for backups.
        output: False for a verb with an `--output-format` of its own.
        hidden: not listed.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        general = {**REPOSITORY, **GENERAL} if repository else dict(GENERAL)
        if not output:
            del general["output"]
        key_options = {"read": READING_KEY, "write": BACKUP_KEY, None: {}}[keys]

        def wrapper(*, context: typer.Context, **values: Any) -> None:
            key_values = {option: values.pop(option) for option in key_options}
            invocation = _invocation(context, {option: values.pop(option) for option in general}, key_values)
            try:
                function(invocation, **values)
            except FleeceError:
                # What was a warning may be why it failed.
                if not invocation.is_json:
                    invocation.show_warnings()
                raise
            finally:
                invocation.tell_cost()
            invocation.end()

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        _take_over(function, wrapper, own + parameters({**key_options, **general}))
        epilog = (
            "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines()) if examples else None
        )
        group.command(name, epilog=epilog, hidden=hidden)(wrapper)
        return function

    return register


def general_options(application: typer.Typer) -> None:
    """Accept the general options before the verb too."""

    def callback(*, context: typer.Context, **values: Any) -> None:
        context.obj = values

    _take_over(callback, callback, parameters({**REPOSITORY, **GENERAL}))
    callback.__doc__ = None
    application.callback()(callback)
