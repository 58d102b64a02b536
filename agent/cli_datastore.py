"""`fleece datastore`: making, listing, looking at and forgetting datastores."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agent.invocation import Invocation, command
from core.errors import FleeceError, NotFoundError, UsageError

if TYPE_CHECKING:
    from agent.store_status import StoreStatus
    from core.progress import Progress


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    group = typer.Typer(no_args_is_help=True, help="Make, list, look at and forget datastores.", rich_markup_mode=None)
    application.add_typer(group, name="datastore")
    command(
        group,
        "create",
        repository=False,
        examples="""
fleece datastore create /backup/main                    registered as 'main'
fleece datastore create /mnt/usb/store --name offsite
fleece datastore create /backup/main --reuse            register one that is there, made by Fleece or PBS
""",
    )(create)
    command(group, "list", repository=False, examples="fleece datastore list --output json")(list_datastores)
    command(
        group,
        "status",
        examples="""
fleece datastore status                                 of the repository that --repo or the configuration names
fleece datastore status main
fleece datastore status main --output json | jq '."deduplication-factor"'
""",
    )(status)
    command(
        group,
        "remove",
        repository=False,
        examples="""
fleece datastore remove offsite                         forget the name, keep the data
fleece datastore remove offsite --destroy-data          delete every backup in it
""",
    )(remove)


def create(
    invocation: Invocation,
    place: Annotated[
        str,
        typer.Argument(metavar="PATH|NAME", help="A folder (with a / in it), or a repository of the configuration."),
    ],
    name: Annotated[str | None, typer.Option("--name", help="Name to register; else the folder's.")] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="The datastore is there already: check and register it.")
    ] = False,
    sync_level: Annotated[
        Literal["filesystem", "file", "none"] | None,
        typer.Option("--sync-level", help="How backups reach the disk (a new datastore's default: filesystem)."),
    ] = None,
) -> None:
    """Make a datastore in a folder and register its name.

    The folder must be empty or not there. It gets 65536 folders for chunks, exactly as PBS makes them.
    """
    from datastore.names import check_store_name

    path, known_as = _place(invocation, place, name)
    _check_sync_level(invocation, known_as or place, sync_level)
    if known_as is not None:
        check_store_name(known_as)
        taken = invocation.registry.datastores().get(known_as)
        if taken is not None and taken.path != path:
            raise FleeceError(
                "create the datastore", str(path), f"the name {known_as!r} belongs to {taken.path}",
                "choose another one with --name",
            )  # fmt: skip

    async def work(progress: "Progress") -> None:
        from datastore.store import Datastore

        store = await (Datastore.open(path) if reuse else Datastore.create(path))
        store.close()

    invocation.run(work, what="create the datastore", where=str(path))
    if known_as is not None:
        invocation.registry.add(known_as, path, sync_level)
    named = known_as or place
    invocation.emit(
        {"name": named, "path": str(path), "created": not reuse},
        lambda: f"{'registered' if reuse else 'created'} datastore {named!r} in {path}\nuse it with --repo {named}",
    )


def _place(invocation: Invocation, place: str, name: str | None) -> tuple[Path, str | None]:
    """Folder of a new datastore and the name to register; no name if the configuration has one."""
    if "/" in place:
        path = Path(place).expanduser().absolute()
        return path, name or path.name
    section = invocation.config.repository.get(place)
    if section is None:
        raise UsageError(
            "create the datastore", repr(place), "it is neither a folder nor a repository of the configuration",
            f"a folder has a / in it: ./{place}",
        )  # fmt: skip
    if name is not None:
        raise UsageError(
            "create the datastore", repr(place), "its name is in the configuration already", "leave out --name"
        )
    return section.path, None


def _check_sync_level(invocation: Invocation, name: str, sync_level: str | None) -> None:
    """Refuse a level that would not count, since the configuration says how the repository is used."""
    section = invocation.config.repository.get(name)
    if sync_level is not None and section is not None and section.sync_level != sync_level:
        raise UsageError(
            "create the datastore", repr(name), "its sync level stands in the configuration, which only people change",
            f'leave out --sync-level, and write sync-level = "{sync_level}" into [repository.{name}]',
        )  # fmt: skip


def list_datastores(invocation: Invocation) -> None:
    """List the datastores that this host knows, and where their names come from."""
    from agent.documents import table

    found = [
        {"name": name, "path": str(section.path), "source": "configuration"}
        for name, section in sorted(invocation.config.repository.items())
    ]
    names = {entry["name"] for entry in found}
    found += [
        {"name": datastore.name, "path": str(datastore.path), "source": "created"}
        for datastore in invocation.registry.datastores().values()
        if datastore.name not in names
    ]

    def lines() -> list[str]:
        rows = [(entry["name"], entry["path"], entry["source"]) for entry in found]
        return list(table(("name", "path", "known from"), rows)) if rows else ["No datastores."]

    invocation.emit(found, lines)


def status(
    invocation: Invocation,
    place: Annotated[
        str | None, typer.Argument(metavar="[NAME|PATH]", help="Else that of --repo, the environment, ...")
    ] = None,
) -> None:
    """Show how full a datastore is, and how it is deduplicated, verified, collected and growing."""
    from agent.store_status import look, status_document, status_lines

    if place is not None and invocation.repo is not None:
        raise UsageError("show the status", place, "the datastore is named twice", "leave out --repo")
    invocation.repo = place or invocation.repo

    async def work(progress: "Progress") -> "StoreStatus":
        async with invocation.repository() as repository:
            return await look(repository)

    found = invocation.run(work, what="show the status", where=invocation.repository_spec())
    invocation.emit(status_document(found), lambda: status_lines(found), cost=False)


def remove(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As 'fleece datastore list' shows it.")],
    destroy_data: Annotated[bool, typer.Option("--destroy-data", help="Delete every backup in it as well.")] = False,
) -> None:
    """Forget a datastore. Its data stays unless --destroy-data is given."""
    registered = invocation.registry.datastores().get(name)
    if registered is None:
        hint = "'fleece datastore list' shows what is known"
        if name in invocation.config.repository:
            hint = "it stands in the configuration, which only people change"
        raise NotFoundError("remove the datastore", repr(name), "no registered datastore has that name", hint)

    async def work(progress: "Progress") -> None:
        if destroy_data:
            from datastore.store import Datastore

            await Datastore.destroy(registered.path)

    invocation.run(work, what="remove the datastore", where=name)
    invocation.registry.remove(name)
    invocation.emit(
        {"name": name, "path": str(registered.path), "destroyed": destroy_data},
        lambda: f"forgot {name!r}; the data in {registered.path} is {'deleted' if destroy_data else 'still there'}",
    )
