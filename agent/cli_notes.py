"""`fleece protect`, `unprotect`, `notes`, `owner`, `namespace`: small changes of what is in a repository."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.invocation import Invocation, command
from core.errors import FleeceError, UsageError

if TYPE_CHECKING:
    from core.progress import Progress
    from datastore.changes import NamespaceMove, NamespaceRemoval
    from datastore.names import Group, Namespace
    from repository.interface import GroupInfo, Repository

Snapshots = Annotated[list[str], typer.Argument(metavar="SNAPSHOT...", help="type/id/time or type/id/latest.")]
NamespaceName = Annotated[str, typer.Argument(metavar="NAMESPACE", help="a/b/c")]


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    command(
        application, "protect", examples="fleece protect vm/100/latest\nfleece protect vm/100/2026-01-02T03:04:05Z"
    )(protect)
    command(application, "unprotect", examples="fleece unprotect vm/100/2026-01-02T03:04:05Z")(unprotect)
    command(
        application,
        "notes",
        examples="""
fleece notes vm/100/latest                             show them
fleece notes vm/100/latest 'before the upgrade'
fleece notes vm/100 'the web server'                   of the group
fleece notes vm/100/latest - < notes.txt               from standard input
fleece notes vm/100/latest --clear
""",
    )(notes)
    command(
        application,
        "owner",
        examples="""
fleece owner vm/100                                    show it
fleece owner vm/100 backup@pbs!host1                   change it
""",
    )(owner)
    command(application, "change-owner", examples="fleece change-owner vm/100 backup@pbs", hidden=True)(change_owner)
    group = typer.Typer(no_args_is_help=True, help="Make, list, move and delete namespaces.", rich_markup_mode=None)
    application.add_typer(group, name="namespace")
    command(group, "create", examples="fleece namespace create customers/anna")(create_namespace)
    command(group, "list", examples="fleece namespace list\nfleece namespace list --ns customers --max-depth 1")(
        list_namespaces
    )
    command(
        group,
        "delete",
        examples="""
fleece namespace delete customers/anna                  one that holds no group
fleece namespace delete customers/anna --delete-groups  with all its snapshots
""",
    )(delete_namespace)
    command(group, "move", examples="fleece namespace move customers/anna archive/anna")(move_namespace)


def protect(invocation: Invocation, snapshots: Snapshots) -> None:
    """Keep snapshots from being removed by forget, prune, or the removal of their group."""
    _set_protected(invocation, snapshots, protected=True)


def unprotect(invocation: Invocation, snapshots: Snapshots) -> None:
    """Allow that protected snapshots are removed again."""
    _set_protected(invocation, snapshots, protected=False)


def _set_protected(invocation: Invocation, texts: list[str], *, protected: bool) -> None:
    from agent.documents import find_snapshot, in_namespace

    ns = invocation.namespace()
    word = "protected" if protected else "unprotected"

    async def work(progress: "Progress") -> "list[tuple[Any, bool]]":
        async with invocation.repository() as repository:
            # All names first: a wrong one changes nothing.
            found = [await find_snapshot(repository, text, ns) for text in texts]
            return [(one, await repository.set_protected(one, protected=protected)) for one in found]

    done = invocation.run(work, what="protect" if protected else "unprotect", where=", ".join(texts))
    invocation.emit(
        [
            {"snapshot": str(one), "ns": str(one.group.ns), "protected": protected, "changed": changed}
            for one, changed in done
        ],
        lambda: [f"{in_namespace(one)} is {word}{'' if changed else ' already'}" for one, changed in done],
    )


async def _group_info(repository: "Repository", group: "Group", what: str) -> "GroupInfo":
    from datastore.errors import SnapshotNotFoundError

    for info in await repository.groups(group.ns):
        if info.group == group:
            return info
    raise SnapshotNotFoundError(what, str(group), "there is no such group", "'fleece list' shows what there is")


def notes(
    invocation: Invocation,
    target: Annotated[str, typer.Argument(metavar="SNAPSHOT|GROUP", help="type/id/time, type/id/latest or type/id.")],
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT|-]", help="New notes; - reads them from standard input.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove the notes.")] = False,
) -> None:
    """Show the notes of a snapshot or group, or change them. The first line is what listings show."""
    from agent.documents import find_snapshot, parse_selection
    from datastore.changes import MAX_NOTES

    if clear and text is not None:
        raise UsageError("change the notes", target, "either TEXT or --clear can be given")
    ns = invocation.namespace()
    wanted = parse_selection(target, ns)
    if wanted is None:
        raise UsageError("change the notes", "", "a snapshot or a group is needed")
    if text == "-":
        text = _stdin(MAX_NOTES)
    new = "" if clear else text

    async def work(progress: "Progress") -> "tuple[str, str, str]":
        async with invocation.repository() as repository:
            if isinstance(wanted, str):
                snapshot = await find_snapshot(repository, wanted, ns)
                if new is not None:
                    await repository.set_notes(snapshot, new)
                return "snapshot", str(snapshot), (await repository.snapshot(snapshot)).comment
            if new is not None:
                await repository.set_notes(wanted, new)
            return "group", str(wanted), (await _group_info(repository, wanted, "read the notes of")).comment

    kind, name, now = invocation.run(work, what="change the notes of", where=target)
    invocation.emit({kind: name, "ns": str(ns), "notes": now}, lambda: now if new is None else f"notes of {name} set")


def _stdin(limit: int) -> str:
    raw = sys.stdin.buffer.read(limit + 1)
    if len(raw) > limit:
        raise UsageError("read the notes", "standard input", f"more than {limit} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise UsageError("read the notes", "standard input", "it is not UTF-8") from None


def owner(
    invocation: Invocation,
    group: Annotated[str, typer.Argument(metavar="GROUP", help="For example vm/100.")],
    new: Annotated[str | None, typer.Argument(metavar="[AUTHID]", help="user@realm or user@realm!token.")] = None,
) -> None:
    """Show who may write a group, or give it to somebody else."""
    from agent.config_types import check_owner
    from datastore.names import Group

    ns = invocation.namespace()
    wanted = Group.parse(group, ns)
    if new is not None:
        check_owner(new)

    async def work(progress: "Progress") -> str | None:
        async with invocation.repository() as repository:
            if new is not None:
                await repository.set_owner(wanted, new)
            return (await _group_info(repository, wanted, "find the owner of")).owner

    now = invocation.run(work, what="change the owner of", where=group)
    invocation.emit({"group": group, "ns": str(ns), "owner": now}, lambda: now or "no owner")


def change_owner(
    invocation: Invocation,
    group: Annotated[str, typer.Argument(metavar="GROUP", help="For example vm/100.")],
    new: Annotated[str, typer.Argument(metavar="AUTHID", help="user@realm or user@realm!token.")],
) -> None:
    """Give a group to somebody else; the name this has in proxmox-backup-client."""
    owner(invocation, group, new)


def _named(invocation: Invocation, text: str) -> "Namespace":
    """The namespace that a verb of `fleece namespace` names; --ns would say it twice."""
    from datastore.names import Namespace

    if invocation.ns is not None:
        raise UsageError("use the namespace", repr(text), "it is named twice", "leave out --ns")
    return Namespace.parse(text)


def create_namespace(invocation: Invocation, name: NamespaceName) -> None:
    """Make a namespace, and those above it that are missing."""
    ns = _named(invocation, name)

    async def work(progress: "Progress") -> bool:
        async with invocation.repository() as repository:
            return await repository.create_namespace(ns)

    created = invocation.run(work, what="create the namespace", where=name)
    invocation.emit(
        {"ns": str(ns), "created": created}, lambda: f"{'created' if created else 'there already:'} namespace {ns}"
    )


def list_namespaces(
    invocation: Invocation,
    max_depth: Annotated[
        int | None, typer.Option("--max-depth", min=0, max=7, help="So many levels below.", show_default=False)
    ] = None,
) -> None:
    """List the namespaces below the root, or below --ns."""
    parent = invocation.namespace()

    async def work(progress: "Progress") -> "list[Namespace]":
        async with invocation.repository() as repository:
            return await repository.namespaces(parent, depth=max_depth)

    found = invocation.run(work, what="list the namespaces", where=str(parent))
    shown = [str(ns) for ns in found if ns.components]
    invocation.emit([{"ns": str(ns)} for ns in found], lambda: shown or ["No namespaces."])


def delete_namespace(
    invocation: Invocation,
    name: NamespaceName,
    delete_groups: Annotated[
        bool, typer.Option("--delete-groups", help="Also remove the groups in it, with all their snapshots.")
    ] = False,
) -> None:
    """Delete a namespace and those below it. One that holds groups is refused unless --delete-groups is given.

    Protected snapshots stay, and with them their namespace.
    """
    from agent.documents import in_namespace

    ns = _named(invocation, name)

    async def work(progress: "Progress") -> "NamespaceRemoval":
        async with invocation.repository() as repository:
            return await repository.delete_namespace(ns, groups=delete_groups)

    removal = invocation.run(work, what="delete the namespace", where=name)
    if removal.protected:
        names = ", ".join(in_namespace(one) for one in removal.protected[:5])
        more = len(removal.protected) - 5
        invocation.warnings.append(f"kept, because protected: {names}{f' and {more} more' if more > 0 else ''}")
    elif removal.kept:
        invocation.warnings.append(f"not empty, and kept: {', '.join(map(str, removal.kept))}")
    invocation.emit(
        {
            "removed": [str(one) for one in removal.removed],
            "kept": [str(one) for one in removal.kept],
            "protected": [{"ns": str(one.group.ns), "snapshot": str(one)} for one in removal.protected],
        },
        lambda: [f"deleted namespace {one}" for one in removal.removed],
    )


def move_namespace(
    invocation: Invocation,
    source: Annotated[str, typer.Argument(metavar="NAMESPACE", help="Which one.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="What it shall be called: the whole name.")],
) -> None:
    """Give a namespace another name or place, with all it holds. Only in a datastore in a local folder.

    Groups move one by one; one that is in use stays where it is, and the same command takes it along later. Refused
    while a garbage collection runs. The next backup of a virtual machine that was moved reads everything.
    """
    from agent.documents import in_namespace

    old, new = _named(invocation, source), _named(invocation, target)

    async def work(progress: "Progress") -> "NamespaceMove":
        async with invocation.repository() as repository:
            return await repository.move_namespace(old, new)

    done = invocation.run(work, what="move the namespace", where=source)
    if done.failed and not done.moved:
        group, why = next(iter(done.failed.items()))
        raise FleeceError("move the namespace", source, f"{in_namespace(group)}: {why}", "try again later")
    invocation.warnings += [f"{in_namespace(group)} stays: {why}" for group, why in done.failed.items()]
    invocation.emit(
        {
            "moved": [{"ns": str(group.ns), "group": str(group)} for group in done.moved],
            "failed": [{"ns": str(group.ns), "group": str(group), "error": why} for group, why in done.failed.items()],
        },
        lambda: f"moved {source} to {target}: {len(done.moved)} groups",
    )
