"""`fleece vzdump-hook`: the script that vzdump calls."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.invocation import Invocation, command
from core.errors import ExitCode, FleeceError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.vzdump_hook import VzdumpCall
    from core.progress import Progress


def add_to(application: typer.Typer) -> None:
    """Register the verb."""
    command(
        application,
        "vzdump-hook",
        repository=False,
        examples="""
echo 'script: /usr/bin/fleece-vzdump-hook' >> /etc/vzdump.conf
fleece vzdump-hook job-start                             as vzdump calls it
TARGET=/dump/vzdump-qemu-100.vma.zst VMTYPE=qemu fleece vzdump-hook backup-end snapshot 100
""",
    )(vzdump_hook)


def vzdump_hook(
    invocation: Invocation,
    arguments: Annotated[list[str], typer.Argument(metavar="PHASE [MODE VMID]", help="As vzdump gives them.")],
) -> None:
    """Do what [vzdump-hook] of the configuration says when vzdump calls. Exit code 0 lets vzdump go on.

    vzdump's 'script' takes a path without arguments: name fleece-vzdump-hook there.
    """
    from agent.vzdump_hook import Doing, VzdumpCall, handle

    call = VzdumpCall.parse(arguments, os.environ)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        invocation.say(text)

    doing = Doing(
        lambda path, call: _script(invocation, path, call, say),
        lambda name: _job(invocation, name),
        lambda call, path: _store(invocation, call, path),
    )
    fine = handle(call, invocation.config, doing, say)
    # To vzdump a warning would be a failure.
    for warning in invocation.warnings:
        say(f"warning: {warning}")
    invocation.warnings.clear()
    document = {"phase": call.phase, "mode": call.mode, "vmid": call.vmid, "ok": fine, "messages": said}
    invocation.emit(document, lambda: [])
    if not fine:
        raise typer.Exit(ExitCode.FAILED)


def _script(invocation: Invocation, path: Path, call: "VzdumpCall", say: "Callable[[str], None]") -> None:
    from agent.cli_verify import parse_duration
    from agent.hooks import Hook

    hook = Hook(path, parse_duration(invocation.config.vzdump_hook.timeout), "timeout in [vzdump-hook]")

    async def work(progress: "Progress") -> None:
        await hook.call(call.arguments, dict(call.variables), say)

    invocation.run(work, what="run the script", where=str(path))


def _job(invocation: Invocation, name: str) -> None:
    from agent.job_store import JobStore
    from agent.jobs import run_job
    from agent.places import state_dir

    section = invocation.config.job.get(name)
    if section is None:
        raise NotFoundError("find the job", repr(name), f"the configuration has no [job.{name}]")

    async def work(progress: "Progress") -> None:
        await run_job(
            name,
            section,
            invocation.config,
            invocation.registry,
            JobStore(state_dir(), name),
            progress,
            endpoints=invocation.endpoints,
        )

    invocation.run(work, what="run the job", where=name)


def _store(invocation: Invocation, call: "VzdumpCall", path: Path) -> None:
    from agent.backup_runs import SnapshotOptions, archives_into
    from agent.file_archives import FileArchiveOptions
    from agent.keys import KeyOptions, backup_keys
    from agent.sessions import until_listed
    from agent.specifications import Specification, SpecificationKind
    from agent.vzdump_hook import group_of, only
    from datastore.names import Group, Namespace
    from pxar.create import CreateOptions
    from pxar.patterns import MatchPattern

    section, config = invocation.config.vzdump_hook, invocation.config
    spec = section.repository or config.default_repository
    if spec is None:
        raise FleeceError("store the archive", str(path), "no repository is named", "write one into [vzdump-hook]")
    configured = config.repository.get(spec)
    levels = [level for level in (configured, config) if level is not None]
    keys = backup_keys(
        KeyOptions(
            default_keyfile=next((level.keyfile for level in levels if level.keyfile), None),
            default_master=next((level.master_pubkey_file for level in levels if level.master_pubkey_file), None),
            default_mode=next((level.crypt_mode for level in levels if level.crypt_mode), None),
        ),
        invocation.say,
        attended=False,
    )
    ns = section.ns if section.ns is not None else configured.ns if configured is not None else ""
    group = Group.parse(group_of(call), Namespace.parse(ns))
    owner = section.owner or next((level.owner for level in levels if level.owner), None) or "root@pam"
    patterns = tuple(MatchPattern.parse(os.fsencode(text)) for text in only(path.name))
    folders = FileArchiveOptions(create=CreateOptions(exclude=patterns))
    folder = Specification("vzdump.pxar", SpecificationKind.ARCHIVE, str(path.parent))
    options = SnapshotOptions(group, owner, keys, notes=f"{path.name} of vzdump", lock_wait_s=600.0)

    async def work(progress: "Progress") -> str:
        from agent.repositories import repository_at

        with until_listed(progress) as listed:
            async with repository_at(spec, config, invocation.registry, lambda: invocation.s3) as repository:
                report = await archives_into(repository, [folder], folders, options, progress, on_listed=listed)
                return str(report.snapshot)

    snapshot = invocation.run(work, what="store", where=str(path))
    invocation.say(f"{path.name} is stored as {snapshot} in {spec}")


def main() -> None:
    """The script `fleece-vzdump-hook`, whose path vzdump is told."""
    sys.argv[1:1] = ["vzdump-hook"]
    from agent.main import main as fleece

    fleece()
