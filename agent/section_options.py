"""What the commands that write remotes and S3 endpoints have in common: options, and values of their sections."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core.errors import UsageError

if TYPE_CHECKING:
    from agent.config_types import Section

FingerprintOption = Annotated[
    str | None,
    typer.Option("--fingerprint", metavar="XX:XX:...", help="SHA-256 of a certificate that no authority vouches for."),
]
FingerprintOnlyOption = Annotated[
    bool | None,
    typer.Option("--fingerprint-only/--no-fingerprint-only", help="Accept no other certificate, valid or not."),
]


def given(**values: Any) -> dict[str, Any]:
    """Values by their names in the file, without those that were not given."""
    return {name.replace("_", "-"): value for name, value in values.items() if value is not None}


def unset_too(changes: dict[str, Any], unset: Iterable[str], section: "type[Section]", owner: str) -> None:
    """Add what goes back to its default to `changes`, as None; `owner` has the values: `a remote`.

    Raises:
        UsageError: a name that is none, or that is changed as well.
    """
    known = [str(field.alias) for field in section.model_fields.values()]
    for name in unset:
        if name not in known:
            raise UsageError("unset", repr(name), f"{owner} has no such value", f"it has {', '.join(known)}")
        if name in changes:
            raise UsageError("unset", repr(name), "it is given as well")
        changes[name] = None


def check_credential(systemd_credential: bool, file: Path | None, descriptor: int | None) -> None:
    """Refuse to be given a secret that is not to be stored.

    Raises:
        UsageError: both are wanted.
    """
    if systemd_credential and (file is not None or descriptor is not None):
        raise UsageError("use", "--systemd-credential", "no secret is stored then", "leave the other options out")
