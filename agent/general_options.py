"""The options that every verb has, and those of verbs with a repository or a key.

They may stand before the verb too; what stands behind it wins.
"""

import inspect
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer


class Output(Enum):
    """What standard output is for."""

    TEXT = "text"
    JSON = "json"
    JSON_PRETTY = "json-pretty"


#: Of every verb.
GENERAL: Final[dict[str, tuple[Any, Any]]] = {
    "output": (
        Output | None,
        typer.Option("--output", "--output-format", help="What goes to standard output.", show_default=False),
    ),
    "quiet": (bool, typer.Option("--quiet", "-q", help="No progress, only results and errors.")),
    "verbose": (bool, typer.Option("--verbose", "-v", help="Also say what is done and why.")),
    "debug": (bool, typer.Option("--debug", help="Show where in the program an error arose.", hidden=True)),
    "config": (
        Path | None,
        typer.Option("--config", metavar="FILE", help="Configuration file (else FLEECE_CONFIG).", show_default=False),
    ),
}  # fmt: skip
#: Of verbs that use a repository.
REPOSITORY: Final[dict[str, tuple[Any, Any]]] = {
    "repo": (
        str | None,
        typer.Option("--repo", "--repository", metavar="REPO", show_default=False,
                     help="Folder with a / in it, name of a datastore, or user@realm@host:store on a server (else"
                          " FLEECE_REPOSITORY, PBS_REPOSITORY, default-repository)."),
    ),
    "ns": (
        str | None,
        typer.Option("--ns", metavar="NS", help="Namespace a/b/c (else PBS_NAMESPACE).", show_default=False),
    ),
    "s3_budget": (
        str | None,
        typer.Option("--s3-budget", metavar="LIMITS", show_default=False,
                     help="Of a datastore in a bucket: warn beyond get=10000,put=5000,download=50GiB,...; with"
                          " hard-limit verify stops there."),
    ),
}  # fmt: skip
#: Of verbs that read snapshots.
READING_KEY: Final[dict[str, tuple[Any, Any]]] = {
    "keyfile": (
        Path | None,
        typer.Option("--keyfile", metavar="FILE", show_default=False,
                     help="Encryption key, made by 'fleece key create' (else the default one)."),
    ),
    "keyfd": (
        int | None,
        typer.Option("--keyfd", metavar="N", min=0, show_default=False,
                     help="Read the encryption key from this file descriptor."),
    ),
    "crypt_mode": (
        Literal["encrypt", "sign-only", "none"] | None,
        typer.Option("--crypt-mode", show_default=False, help="none: use no key, not even a default one."),
    ),
}  # fmt: skip
#: Of verbs that write snapshots.
BACKUP_KEY: Final[dict[str, tuple[Any, Any]]] = {
    **READING_KEY,
    "crypt_mode": (
        Literal["encrypt", "sign-only", "none"] | None,
        typer.Option("--crypt-mode", show_default=False,
                     help="With a key data is encrypted, unless this says otherwise."),
    ),
    "master_pubkey_file": (
        Path | None,
        typer.Option("--master-pubkey-file", metavar="FILE", show_default=False,
                     help="Store the key, encrypted for this master key, in the snapshot (else the default one)."),
    ),
    "master_pubkey_fd": (
        int | None,
        typer.Option("--master-pubkey-fd", metavar="N", min=0, show_default=False,
                     help="Read the public master key from this file descriptor."),
    ),
}  # fmt: skip


def parameters(options: dict[str, tuple[Any, Any]]) -> list[inspect.Parameter]:
    """What typer is to see of `options`: a parameter each, False or None unless it is given."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if kind is bool else None,
            annotation=Annotated[kind, option],
        )
        for name, (kind, option) in options.items()
    ]
