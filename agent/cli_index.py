"""`fleece index`: the index of `fleece find`, made, looked at and removed."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.invocation import Invocation, command
from core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.find_index.files import IndexFile
    from agent.find_index.updating import Updated
    from core.progress import Progress


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    group = typer.Typer(
        no_args_is_help=True, help="The index of 'fleece find --all-snapshots' on this host.", rich_markup_mode=None
    )
    application.add_typer(group, name="index")
    command(
        group,
        "build",
        examples="""
fleece index build                     index what is new, in all namespaces
fleece index build --rebuild           throw it away and make it anew
fleece index build --images            also the files on disk images, for 'fleece find --images'
fleece index build --encrypted         also encrypted archives, whose names then lie in clear on this host
""",
        keys="read",
    )(build)
    command(
        group,
        "status",
        examples="""
fleece index status
fleece index status --output json | jq '."not-indexed"'
""",
        keys="read",
    )(status)
    command(
        group,
        "remove",
        examples="""
fleece index remove                    of this repository
fleece index remove --all              of every repository that this user looked into
""",
    )(remove)


def build(
    invocation: Invocation,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Throw it away before.")] = False,
    images: Annotated[
        bool, typer.Option("--images", help="Also disk images: every directory of their file systems is read.")
    ] = False,
    encrypted: Annotated[
        bool | None,
        typer.Option(
            "--encrypted/--no-encrypted",
            help="Whether names of encrypted archives may be written into it, readable for this user and root.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Bring the index up to date: read new and changed snapshots, forget those that are gone.

    'fleece find --all-snapshots' does the same before it searches; done after backups, from a job's hook or a timer,
    nobody has to wait for it. It covers the namespace and all below it.

    Snapshots that cannot be read (encrypted, damaged) are left out, which is no failure: 'fleece find' reads them
    itself and says why it cannot.
    """
    from agent.documents import in_namespace

    ns = invocation.namespace()
    codec = invocation.reading_key().codec() if encrypted else invocation.codec()
    if encrypted and codec.key is None:
        raise UsageError(
            "index", "encrypted archives", "no key is given", "give it with --keyfile, 'fleece key' tells more"
        )

    async def work(progress: "Progress") -> tuple["IndexFile", "Updated"]:
        from agent.find_index.answering import update_index
        from agent.find_index.files import IndexFile, repository_key
        from core.errors import BusyError

        async with invocation.repository() as repository:
            namespaces = await repository.namespaces(ns)
            infos = [info for one in namespaces for info in await repository.snapshots(one)]
            file = IndexFile(await repository_key(repository))
            done = await update_index(
                file, repository, infos, namespaces, codec, progress, recursive=True, rebuild=rebuild,
                encrypted=encrypted, images=images,
            )  # fmt: skip
            if done is None:
                raise BusyError("update the index", str(file.path), "another process does", "it will be done soon")
            return file, done

    file, done = invocation.run(work, what="index", where=str(ns))
    document: dict[str, Any] = {
        "path": str(file.path),
        "size": file.size,
        "indexed": done.indexed,
        "removed": done.removed,
        "archives-read": done.archives,
        "entries-read": done.entries,
        "left-out": [
            {"ns": str(one.group.ns), "snapshot": str(one), "reason": why} for one, why in done.left_out.items()
        ],
    }

    def lines() -> "Iterator[str]":
        yield (
            f"{done.indexed} snapshots indexed, {done.removed} removed; "
            f"{done.archives} archives read, {done.entries} entries"
        )
        for one, why in done.left_out.items():
            yield f"left out: {in_namespace(one)}: {why}"

    invocation.emit(document, lines)


def status(invocation: Invocation) -> None:
    """Say where the index lies, what is in it, and how many snapshots 'fleece find' would have to read."""
    from core.units import format_size

    ns, codec = invocation.namespace(), invocation.codec()

    async def work(progress: "Progress") -> dict[str, Any]:
        from agent.find_index.answering import index_status

        async with invocation.repository() as repository:
            infos = [info for one in await repository.namespaces(ns) for info in await repository.snapshots(one)]
            return await index_status(repository, infos, codec)

    document = invocation.run(work, what="look at the index of", where=str(ns))

    def lines() -> "Iterator[str]":
        yield document["path"]
        if document["state"] != "ok":
            yield f"  {document['state']}"
        else:
            yield f"  size: {format_size(document['size'])}"
            yield f"  snapshots: {document['snapshots']}"
            yield f"  archives: {document['archives']}, in {document['states']} states"
            yield f"  entries: {document['entries']}"
            yield f"  names of encrypted archives: {'allowed' if document['encrypted'] else 'not written'}"
        yield f"  not indexed: {document['not-indexed']} snapshots"

    invocation.emit(document, lines)


def remove(
    invocation: Invocation,
    every: Annotated[bool, typer.Option("--all", help="Of every repository that this user has looked into.")] = False,
) -> None:
    """Delete the index of this repository. Nothing but speed is lost: the next one is made anew."""

    async def work(progress: "Progress") -> list[str]:
        from agent.find_index.answering import remove_index
        from agent.find_index.files import IndexFile, index_folder, repository_key

        if every:
            return [str(path) for path in await remove_index(index_folder())]
        async with invocation.repository() as repository:
            file = IndexFile(await repository_key(repository))
        return [str(path) for path in await remove_index(file.folder, file)]

    removed = invocation.run(work, what="remove the index")
    invocation.emit(
        {"removed": removed},
        lambda: [f"removed {path}" for path in removed] if removed else "there is none",
    )
