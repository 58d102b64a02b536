"""`fleece datastore import`: what a Proxmox Backup Server has, made known here."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.invocation import Invocation, command
from core.errors import FleeceError

if TYPE_CHECKING:
    from agent.pbs_import import Step
    from core.progress import Progress


def add_to(group: typer.Typer) -> None:
    """Register the verb in the group `fleece datastore`."""
    command(
        group,
        "import",
        repository=False,
        examples="""
fleece datastore import --dry-run                          what the PBS of this host has, and what would be done
fleece datastore import                                    its endpoints, and its datastores in folders
fleece datastore import /root/pbs-config --cache /var/cache/fleece --overwrite-in-use
                                                           also those in buckets, from a PBS that is out of service
fleece datastore import --store main --store offsite
""",
    )(import_pbs)


def import_pbs(
    invocation: Invocation,
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="With PBS's datastore.cfg and s3.cfg.", show_default=True)
    ] = Path("/etc/proxmox-backup"),
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be done.")] = False,
    store: Annotated[
        list[str] | None, typer.Option("--store", metavar="NAME", help="Only this datastore; may be repeated.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="FOLDER", help="Make caches of buckets in it, a folder for each datastore."),
    ] = None,
    overwrite_in_use: Annotated[
        bool,
        typer.Option("--overwrite-in-use", help="Take buckets from the PBS that uses them; it must have stopped."),
    ] = False,
) -> None:
    """Make the S3 endpoints and datastores of a Proxmox Backup Server known here. Its files are only read.

    A datastore in a folder can be used by both at the same time: they take the same locks. One in a bucket cannot: PBS
    and Fleece would delete what the other one has just stored. So PBS must have stopped using it, then
    --overwrite-in-use takes it over, with a new cache below --cache. Secrets go into files of mode 0600 and are never
    shown.
    """
    from agent.pbs_import import PbsImport

    root = None if cache is None else cache.expanduser().absolute()
    job = PbsImport(invocation, folder, store or (), root, overwrite_in_use=overwrite_in_use)

    async def work(progress: "Progress") -> "list[Step]":
        return job.plan() if dry_run else await job.carry_out(progress)

    steps = invocation.run(work, what="import from", where=str(folder))
    document = {"dry-run": dry_run, "steps": [step.to_json() for step in steps]}
    invocation.emit(document, lambda: [step.line(dry_run=dry_run) for step in steps] or ["Nothing to import."])
    failed = [step for step in steps if step.action == "failed"]
    if failed:
        raise FleeceError("import", ", ".join(step.name for step in failed), failed[0].why)
    if not dry_run:
        left = [step for step in steps if step.action == "left-out" or (step.action == "present" and step.why)]
        invocation.warnings += [f"{step.kind} {step.name} was left out: {step.why}" for step in left]
