"""`fleece datastore`: making, listing, looking at and forgetting datastores."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agent import cli_import
from agent.invocation import Invocation, command
from core.errors import FleeceError, NotFoundError, UsageError

if TYPE_CHECKING:
    from agent.bucket_stores import BucketStatus
    from agent.store_status import StoreStatus
    from core.progress import Progress
    from datastore.s3.reconcile import ReconcileReport
    from datastore.s3.refresh import RefreshReport


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
fleece datastore create cloud --s3 aws --bucket backups --cache /var/cache/fleece/cloud --max-cache-size 64GiB
fleece datastore create cloud --s3 aws --bucket backups --cache /mnt/new --reuse       take over what is in the bucket
fleece datastore create cloud --s3 ... --reuse --overwrite-in-use        from a host that does not use it any more
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
        "refresh",
        repository=False,
        examples="""
fleece datastore refresh cloud                          fetch the metadata anew
fleece datastore refresh cloud --chunks                 and find out which chunks are there
""",
    )(refresh)
    cli_import.add_to(group)
    command(
        group,
        "remove",
        repository=False,
        examples="""
fleece datastore remove offsite                         forget the name, keep the data
fleece datastore remove offsite --destroy-data          delete every backup in it, also in its bucket
""",
    )(remove)


def create(
    invocation: Invocation,
    place: Annotated[
        str,
        typer.Argument(
            metavar="PATH|NAME",
            help="A folder (with a / in it), or a repository of the configuration; with --s3 the name.",
        ),
    ],
    name: Annotated[str | None, typer.Option("--name", help="Name to register; else the folder's.")] = None,
    reuse: Annotated[
        bool,
        typer.Option("--reuse", help="The datastore is there already: check, or with --s3 fetch, and register it."),
    ] = False,
    sync_level: Annotated[
        Literal["filesystem", "file", "none"] | None,
        typer.Option("--sync-level", help="How backups reach the disk (a new datastore's default: filesystem)."),
    ] = None,
    s3: Annotated[
        str | None,
        typer.Option("--s3", metavar="ENDPOINT", help="In a bucket of this endpoint ('fleece s3 endpoint list')."),
    ] = None,
    bucket: Annotated[
        str | None, typer.Option("--bucket", metavar="BUCKET", help="A bucket that exists; it may hold several stores.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache", metavar="PATH", help="A new folder for all metadata and as many chunks as it may hold."
        ),
    ] = None,
    max_cache_size: Annotated[
        str | None,
        typer.Option("--max-cache-size", metavar="SIZE", help="Of cached chunks (default 4/5 of the free space)."),
    ] = None,
    overwrite_in_use: Annotated[
        bool,
        typer.Option("--overwrite-in-use", help="Take it from the host that uses it; that one must have stopped."),
    ] = False,
) -> None:
    """Make a datastore in a folder or in an S3 bucket and register its name.

    The folder, or the cache of a bucket, must be empty or not there. It gets 65536 folders for chunks, exactly as PBS
    makes them. In a bucket all objects begin with the datastore's name; one that is there already is taken over with
    --reuse, whether Fleece or PBS wrote it.
    """
    from datastore.names import check_store_name

    if s3 is not None:
        if name is not None or bucket is None or cache is None:
            why = (
                "--bucket and --cache are needed, and the name is the argument" if name is None else "it has two names"
            )
            raise UsageError(
                "create the datastore", place, why, "create NAME --s3 ENDPOINT --bucket BUCKET --cache PATH"
            )
        _create_in_bucket(
            invocation, place, s3, bucket, cache.expanduser().absolute(), max_cache_size, sync_level,
            reuse=reuse, overwrite_in_use=overwrite_in_use,
        )  # fmt: skip
        return
    for option, given in (
        ("--bucket", bucket is not None),
        ("--cache", cache is not None),
        ("--max-cache-size", max_cache_size is not None),
        ("--overwrite-in-use", overwrite_in_use),
    ):
        if given:
            raise UsageError("use", option, "it belongs to a datastore in a bucket", "give --s3 ENDPOINT as well")
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


def _create_in_bucket(
    invocation: Invocation,
    name: str,
    endpoint: str,
    bucket: str,
    cache: Path,
    max_cache_size: str | None,
    sync_level: str | None,
    *,
    reuse: bool,
    overwrite_in_use: bool,
) -> None:
    from agent import bucket_stores
    from agent.registry import Datastore, S3Place

    place = S3Place(endpoint, bucket, bucket_stores.parse_cache_size(max_cache_size))
    if name in invocation.config.repository:
        why = "a repository of the configuration has that name, and would be found in its place"
        raise UsageError("create the datastore", repr(name), why, "choose another name")
    invocation.registry.check(name, cache, s3=place)
    if name in invocation.registry.datastores() and not reuse:
        hint = "with --reuse its cache is made anew, after it was lost"
        raise UsageError("create the datastore", repr(name), "it is registered already", hint)
    datastore = Datastore(name, cache, sync_level, place)
    invocation.s3.settings(datastore)  # a wrong name is told before anything is asked of the bucket

    async def work(progress: "Progress") -> None:
        await bucket_stores.create(invocation, datastore, progress, reuse=reuse, overwrite_in_use=overwrite_in_use)

    invocation.run(work, what="create the datastore", where=name)
    invocation.registry.add(name, cache, sync_level, s3=place)
    document = {
        "name": name,
        "path": str(cache),
        "created": not reuse,
        "backend": bucket_stores.backend_document(place),
    }
    verb = "took over" if reuse else "created"
    invocation.emit(
        document,
        lambda: (
            f"{verb} datastore {name!r} in bucket {bucket!r} of {endpoint}, cache {cache}\nuse it with --repo {name}"
        ),
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
    if section.path is None:
        raise UsageError("create the datastore", repr(place), "the configuration says that it is on a server")
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

    registered = invocation.registry.datastores()
    buckets = {datastore.path: datastore for datastore in registered.values() if datastore.s3 is not None}
    configured = sorted(invocation.config.repository.items())
    places = [(name, section.path, "configuration") for name, section in configured if section.path is not None]
    names = {name for name, _, _ in places}
    places += [(one.name, one.path, "created") for one in registered.values() if one.name not in names]
    found: list[dict[str, Any]] = []
    rows = []
    for name, path, source in places:
        entry: dict[str, Any] = {"name": name, "path": str(path), "source": source}
        row = (name, str(path), source, "", "")
        if path in buckets and (s3 := buckets[path].s3) is not None:
            from agent import bucket_stores

            mode = bucket_stores.listed_maintenance(path)
            entry |= {"backend": bucket_stores.backend_document(s3), "maintenance": mode}
            row = (name, str(path), source, f"{s3.endpoint}:{s3.bucket}", bucket_stores.maintenance_words(mode, name))
        found.append(entry)
        rows.append(row)

    def lines() -> list[str]:
        width = 5 if buckets else 3
        header = ("name", "path", "known from", "bucket", "")
        return list(table(header[:width], [row[:width] for row in rows])) if rows else ["No datastores."]

    invocation.emit(found, lines)


def status(
    invocation: Invocation,
    place: Annotated[
        str | None, typer.Argument(metavar="[NAME|PATH]", help="Else that of --repo, the environment, ...")
    ] = None,
) -> None:
    """Show how full a datastore is, and how it is deduplicated, verified, collected and growing."""
    from agent.bucket_stores import bucket_status
    from agent.store_status import look, status_document, status_lines

    if place is not None and invocation.repo is not None:
        raise UsageError("show the status", place, "the datastore is named twice", "leave out --repo")
    invocation.repo = place or invocation.repo

    async def work(progress: "Progress") -> "tuple[StoreStatus, BucketStatus | None]":
        async with invocation.repository() as repository:
            return await look(repository), await bucket_status(repository)

    found, in_bucket = invocation.run(work, what="show the status", where=invocation.repository_spec())
    document = status_document(found)
    if in_bucket is not None:
        document |= in_bucket.to_json()

    more = in_bucket.rows() if in_bucket is not None else []
    invocation.emit(document, lambda: status_lines(found, more), cost=False)


def refresh(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A datastore in a bucket.")],
    chunks: Annotated[
        bool, typer.Option("--chunks", help="Also find out which chunks are in the bucket, as 'fleece s3 reconcile'.")
    ] = False,
    lock_wait: Annotated[
        str | None,
        typer.Option("--lock-wait", metavar="TIME", help="Wait so long for running backups and gc (default 1h)."),
    ] = None,
) -> None:
    """Fetch the metadata of a datastore in a bucket anew: after its cache was lost, or others wrote to the bucket.

    Listing, restore and mount go on meanwhile, with the old state group by group; backups and all other changes are
    refused until it has ended. What has not changed is not fetched again. An interrupted refresh can be repeated.
    """
    from agent.bucket_stores import named_bucket
    from agent.cli_verify import parse_duration

    datastore = named_bucket(invocation, name, "refresh")
    wait_s = 3600.0 if lock_wait is None else parse_duration(lock_wait)

    async def work(progress: "Progress") -> "tuple[RefreshReport, ReconcileReport | None]":
        from datastore.s3.reconcile import reconcile
        from datastore.s3.refresh import refresh as refresh_metadata

        async with invocation.s3.open(datastore) as store:
            fetched = await refresh_metadata(store, progress, wait_s=wait_s)
            return fetched, await reconcile(store, progress, wait_s=wait_s) if chunks else None

    fetched, compared = invocation.run(work, what="refresh", where=name)
    document: dict[str, Any] = {
        "name": name,
        "objects": fetched.objects,
        "fetched": fetched.fetched,
        "unchanged": fetched.linked,
        "groups-changed": fetched.groups_changed,
        "unfinished": fetched.unfinished,
        "strange": fetched.strange,
        "chunks": None,
    }
    if compared is not None:
        document["chunks"] = {
            "objects": compared.objects,
            "marked": compared.marked,
            "repaired": [digest.hex() for digest in compared.repaired],
            "lost": [digest.hex() for digest in compared.lost],
        }

    def lines() -> list[str]:
        text = [
            f"{name}: {fetched.objects} objects of metadata, {fetched.fetched} fetched, {fetched.linked} unchanged, "
            f"{fetched.groups_changed} groups changed"
        ]
        if compared is not None:
            text.append(
                f"{compared.objects} chunks, {compared.marked} newly known, {len(compared.repaired)} stored again, "
                f"{len(compared.lost)} gone"
            )
        return text

    invocation.emit(document, lines)


def remove(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As 'fleece datastore list' shows it.")],
    destroy_data: Annotated[bool, typer.Option("--destroy-data", help="Delete every backup in it as well.")] = False,
    overwrite_in_use: Annotated[
        bool,
        typer.Option("--overwrite-in-use", help="Of a bucket: also if another host has marked it as its own."),
    ] = False,
) -> None:
    """Forget a datastore. Its data stays unless --destroy-data is given.

    Of one in a bucket the cache stays as well, and the mark of this host is taken off the bucket; 'fleece datastore
    create --reuse' takes it up again, here or elsewhere.
    """
    registered = invocation.registry.datastores().get(name)
    if registered is None:
        hint = "'fleece datastore list' shows what is known"
        if name in invocation.config.repository:
            hint = "it stands in the configuration, which only people change"
        raise NotFoundError("remove the datastore", repr(name), "no registered datastore has that name", hint)

    if overwrite_in_use and registered.s3 is None:
        raise UsageError("use", "--overwrite-in-use", "it is for a datastore in a bucket", "leave it out")

    async def work(progress: "Progress") -> None:
        if registered.s3 is not None:
            from agent.bucket_stores import give_up

            await give_up(invocation, registered, progress, destroy=destroy_data, overwrite_in_use=overwrite_in_use)
        elif destroy_data:
            from datastore.store import Datastore

            await Datastore.destroy(registered.path)

    invocation.run(work, what="remove the datastore", where=name)
    invocation.registry.remove(name)
    where = str(registered.path)
    if registered.s3 is not None:
        where = f"bucket {registered.s3.bucket!r} of {registered.s3.endpoint}"
    invocation.emit(
        {"name": name, "path": str(registered.path), "destroyed": destroy_data},
        lambda: f"forgot {name!r}; the data in {where} is {'deleted' if destroy_data else 'still there'}",
    )
