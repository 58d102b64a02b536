"""`fleece restore`: one archive to a file, folder, device, NBD server or pipe; a whole snapshot to a folder."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISBLK, S_ISDIR, S_ISREG
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agent.invocation import Invocation, command, to_stderr
from agent.restore_options import (
    ExistingOption,
    IgnoreAclsOption,
    IgnoreOwnershipOption,
    IgnorePermissionsOption,
    IgnoreXattrsOption,
    NoDevicesOption,
    NoFifosOption,
    NoSetuidOption,
    NoSocketsOption,
    OverwriteFilesOption,
    OverwriteHardlinksOption,
    OverwriteOption,
    OverwriteSymlinksOption,
    PatternOption,
    RestoreOptions,
)
from core.errors import ExitCode, TargetError, UsageError, os_reason

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Awaitable, Callable

    from agent.archive_restore import FilesRestored, FilesWanted
    from agent.keys import ReadingKey
    from core.buffers import Buffer
    from core.progress import Progress
    from datastore.codec import ChunkCodec
    from datastore.manifest import Manifest, ManifestFile
    from repository.interface import Reader

#: In a machine's folder, as long as its disks are not whole and it runs all the same. docs/vm-restore.md, "Live".
LIVE_STATE_NAME = "live-restore.json"


def add_to(application: typer.Typer) -> None:
    """Register the verb."""
    command(
        application,
        "restore",
        examples="""
fleece restore vm/100/latest drive-scsi0.img /var/lib/vm/new.raw
fleece restore vm/100/latest drive-scsi0.img /dev/vg/web --force
fleece restore vm/100/latest drive-scsi0.img nbd://storage/web
fleece restore vm/100/latest drive-scsi0.img - | ssh other 'dd of=/dev/vg/web bs=4M'
fleece restore vm/100/latest qemu-command.json -
fleece restore vm/100/latest client.log -
fleece restore host/db1/latest root.pxar /mnt/new
fleece restore host/db1/latest root.pxar /tmp/some --pattern /etc --pattern '*.conf' --pattern '!*.bak'
fleece restore host/db1/latest root.pxar/etc/fstab -
fleece restore host/db1/latest root.pxar/home - | tar -x -C /srv --xattrs --acls
fleece restore host/db1/latest root.pxar/home - --format zip > home.zip
fleece restore vm/100/latest drive-scsi0.img/part1/etc/fstab -
fleece restore vm/100/latest drive-scsi0.img/vg0/home/alice /tmp/alice --pattern '*.pdf'
fleece restore vm/100/2026-01-02T03:04:05Z --all /tmp/everything
fleece restore vm/100/latest drive-scsi0.img new.raw --keyfile /etc/fleece/backup.key
fleece restore vm/100/latest rsa-encrypted.key rsa-encrypted.key    for 'fleece key import-with-master-key'
""",
        keys="read",
    )(restore)


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of one archive."""

    name: str  #: without type extension
    target: str
    size: int  #: bytes

    def to_json(self) -> dict[str, Any]:
        """Its part of the document."""
        return {"name": self.name, "target": self.target, "size": self.size}

    def line(self) -> str:
        """The same for people."""
        from core.units import format_size

        return f"{self.name} -> {self.target}: {format_size(self.size)}"


def restore(
    invocation: Invocation,
    snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="type/id/time or type/id/latest.")],
    archive: Annotated[
        str | None,
        typer.Argument(
            metavar="ARCHIVE",
            help="As 'fleece show' lists it, with or without type; root.pxar/PATH or disk.img/part1/PATH for a part, "
            "client.log for the log of the backup, index.json for the manifest.",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Argument(metavar="TARGET", help="A file, folder, block device, NBD URI, or - for a pipe.")
    ] = None,
    everything: Annotated[
        Path | None, typer.Option("--all", metavar="FOLDER", help="Every archive of the snapshot, into this folder.")
    ] = None,
    image_format: Annotated[
        Literal["raw", "qcow2", "tar", "zip"] | None,
        typer.Option(
            "--format",
            help="raw, qcow2: of a new image file; else .qcow2 files are qcow2, all others raw. tar, zip: of a folder "
            "that goes to standard output; else tar.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    pattern: PatternOption = None,
    allow_existing_dirs: ExistingOption = False,
    overwrite: OverwriteOption = False,
    overwrite_files: OverwriteFilesOption = False,
    overwrite_symlinks: OverwriteSymlinksOption = False,
    overwrite_hardlinks: OverwriteHardlinksOption = False,
    ignore_ownership: IgnoreOwnershipOption = False,
    ignore_permissions: IgnorePermissionsOption = False,
    ignore_acls: IgnoreAclsOption = False,
    ignore_xattrs: IgnoreXattrsOption = False,
    no_device_nodes: NoDevicesOption = False,
    no_fifos: NoFifosOption = False,
    no_sockets: NoSocketsOption = False,
    no_setuid: NoSetuidOption = False,
) -> None:
    """Restore disk images, folders and files. Every chunk is checked on the way.

    Too small a target, and one that is mounted or in use, is always refused. A file with content, a folder with entries
    and a device or NBD export whose first or last MiB is not zero need --force.

    Of a folder, what cannot be restored is a warning (exit code 3), and the rest is restored all the same. A full or
    read-only target ends it.
    """
    options = RestoreOptions(
        patterns=tuple(pattern or ()),
        force=force,
        allow_existing_dirs=allow_existing_dirs,
        overwrite=overwrite,
        overwrite_files=overwrite_files,
        overwrite_symlinks=overwrite_symlinks,
        overwrite_hardlinks=overwrite_hardlinks,
        ignore_ownership=ignore_ownership,
        ignore_permissions=ignore_permissions,
        ignore_acls=ignore_acls,
        ignore_xattrs=ignore_xattrs,
        no_device_nodes=no_device_nodes,
        no_fifos=no_fifos,
        no_sockets=no_sockets,
        no_setuid=no_setuid,
    )
    options.to_folder()  # a wrong pattern is told before the work starts
    if everything is None and (archive is None or target is None):
        raise UsageError("restore", snapshot, "ARCHIVE and TARGET are needed, or --all FOLDER", "see --help")
    if everything is not None and archive is not None:
        raise UsageError("restore", snapshot, "--all takes every archive: leave out ARCHIVE and TARGET")
    if target == "-" and sys.stdout is None:
        raise TargetError("write to", "standard output", "it is closed")
    if everything is not None and (pattern or image_format in ("tar", "zip")):
        option = "--pattern" if pattern else f"--format {image_format}"
        raise UsageError("use", option, "it is for one folder, not for --all")
    if target == "-" and invocation.is_json:
        raise UsageError(
            "restore", snapshot, "standard output cannot take both the archive and a JSON document",
            "leave out --output, or restore to a file",
        )  # fmt: skip
    ns = invocation.namespace()
    # Whoever needs the wrapped key has lost the other, its file or its passphrase.
    reading_key = None if _is_wrapped_key(archive) else invocation.reading_key()
    started = time.monotonic()

    async def work(progress: "Progress") -> "tuple[str, list[Restored | FilesRestored]]":
        from agent.documents import find_snapshot

        async with invocation.repository() as repository:
            found = await find_snapshot(repository, snapshot, ns)
            async with repository.reader(found) as reader:
                codec, manifest = await _opened(reader, reading_key, progress)
                job = _Job(reader, codec, manifest, options, image_format, progress)
                if everything is not None:
                    return str(found), await job.all_to_folder(everything)
                return str(found), [await job.one(archive or "", target or "")]

    named, restored = invocation.run(work, what="restore", where=snapshot)
    duration = time.monotonic() - started

    def lines() -> list[str]:
        from core.units import format_duration

        return [
            *(one.line() for one in restored),
            f"{named}: restored in {format_duration(duration)}",
        ]

    if target == "-":
        if not invocation.quiet:
            to_stderr("\n".join(lines()))
        return
    document = {
        "snapshot": named,
        "restored": [one.to_json() for one in restored],
        "duration-s": round(duration, 3),
        "warnings": invocation.warnings,
    }
    invocation.emit(document, lines)
    if invocation.is_json and invocation.warnings:
        raise typer.Exit(ExitCode.WARNINGS)  # they are in the document


def _is_wrapped_key(archive: str | None) -> bool:
    from datastore.names import MASTER_KEY_NAME, strip_archive_type

    return archive is not None and strip_archive_type(archive) == strip_archive_type(MASTER_KEY_NAME)


async def _opened(
    reader: "Reader", reading_key: "ReadingKey | None", progress: "Progress"
) -> "tuple[ChunkCodec, Manifest]":
    """The manifest of the snapshot, its signature checked if it has one, and what reads its archives.

    Without a reading key that is only the wrapped key, which is what leads to the key and never encrypted with it.

    Raises:
        KeyNeededError: it was made with another key than the one at hand.
        FormatError: it is broken or altered.
    """
    from datastore.codec import ChunkCodec
    from repository.restore import load_manifest

    manifest = await load_manifest(reader, ChunkCodec())
    if reading_key is None:
        return ChunkCodec(), manifest
    codec = reading_key.codec_for(manifest, str(reader.snapshot))
    if codec.key is not None:
        manifest = await load_manifest(reader, codec)
        if manifest.lost_signature:
            progress.warn(f"{reader.snapshot} has no signature, although it was made with a key: it may be altered")
    elif manifest.fingerprint is not None:
        progress.warn(f"the signature of {reader.snapshot} was not checked")
    return codec, manifest


class _Job:
    """The restore of archives of one snapshot."""

    def __init__(
        self,
        reader: "Reader",
        codec: "ChunkCodec",
        manifest: "Manifest",
        options: RestoreOptions,
        image_format: str | None,
        progress: "Progress",
    ) -> None:
        self._reader, self._codec, self._manifest = reader, codec, manifest
        self._options, self._force = options, options.force
        self._format, self._progress = image_format, progress

    async def one(self, archive: str, target: str) -> "Restored | FilesRestored":
        """Restore the archive to the target a person named."""
        from agent.archive_restore import wanted_files
        from core.limits import in_io_thread
        from datastore.names import ArchiveKind, archive_kind, strip_archive_type

        wanted = wanted_files(self._manifest, archive)
        if wanted is not None:
            return await self._files(wanted, target)
        beside = await self._beside_manifest(archive)
        if beside is not None:
            name = strip_archive_type(archive)
            self._refuse_options_of_folders(name)
            target = await in_io_thread(_inside_folder, target, name)
            return Restored(name, target, await self._small_file(beside, target))
        entry = self._entry(archive)
        name = strip_archive_type(entry.filename)
        kind = archive_kind(entry.filename)
        if kind is ArchiveKind.DYNAMIC:
            raise UsageError(
                "restore", f"{self._reader.snapshot} {name}", "it is no archive of files",
                "'fleece catalog dump' shows what is in a catalog",
            )  # fmt: skip
        self._refuse_options_of_folders(name)
        target = await in_io_thread(_inside_folder, target, name)
        if kind is ArchiveKind.FIXED:
            await self._image(entry, target)
            return Restored(name, target, entry.size)
        return Restored(name, target, await self._blob(entry, target))

    def _refuse_options_of_folders(self, name: str) -> None:
        if self._options.patterns or self._format in ("tar", "zip"):
            option = "--pattern" if self._options.patterns else f"--format {self._format}"
            raise UsageError("use", option, f"{name} is no folder")

    async def _beside_manifest(self, archive: str) -> bytes | None:
        """The content of the client's log or of the manifest itself, if they are meant: no manifest lists them."""
        from datastore.names import CLIENT_LOG_NAME, MANIFEST_NAME, strip_archive_type
        from repository.restore import restore_log, restore_manifest

        if archive in (CLIENT_LOG_NAME, strip_archive_type(CLIENT_LOG_NAME)):
            return await restore_log(self._reader, self._codec)
        if archive in (MANIFEST_NAME, strip_archive_type(MANIFEST_NAME)):
            return await restore_manifest(self._reader)
        return None

    def _entry(self, archive: str) -> "ManifestFile":
        """The archive that a person named with or without its type extension."""
        from core.errors import NotFoundError
        from datastore.names import strip_archive_type

        files = self._manifest.files
        for entry in files:
            if archive in (entry.filename, strip_archive_type(entry.filename)):
                return entry
        raise NotFoundError(
            "restore", f"{self._reader.snapshot} {archive}", "the snapshot has no such archive",
            f"it has {', '.join(strip_archive_type(entry.filename) for entry in files)}",
        )  # fmt: skip

    async def all_to_folder(self, folder: Path) -> "list[Restored | FilesRestored]":
        """Restore every archive into `folder`, those of files into folders named without type."""
        from agent.archive_restore import file_archives
        from core.limits import in_io_thread
        from datastore.names import ArchiveKind, archive_kind, strip_archive_type

        await in_io_thread(_prepare_folder, folder, self._force or self._options.allow_existing_dirs)
        restored = []
        for entry in self._manifest.files:
            if archive_kind(entry.filename) is not ArchiveKind.DYNAMIC:
                name = strip_archive_type(entry.filename)
                restored.append(await self.one(entry.filename, str(folder / name)))
        for wanted in file_archives(self._manifest):
            restored.append(await self._files(wanted, str(folder / wanted.name)))
        return restored

    async def _files(self, wanted: "FilesWanted", target: str) -> "FilesRestored":
        from agent.archive_restore import restore_to_folder, restore_to_stream

        reader, codec, manifest, options = self._reader, self._codec, self._manifest, self._options
        format: Literal["tar", "zip"] | None = None
        if self._format in ("raw", "qcow2"):
            raise UsageError("use", f"--format {self._format}", f"{wanted.shown} is no disk image")
        if self._format is not None:
            format = "zip" if self._format == "zip" else "tar"
        if target != "-" and format is not None:
            raise UsageError(
                "use", f"--format {format}", "it is for folders that go to standard output", "use - and redirect it"
            )
        if target != "-":
            return await restore_to_folder(reader, codec, manifest, wanted, target, options, self._progress)
        if sys.stdout.isatty() and wanted.path and format is None:
            return await restore_to_stream(
                reader, codec, manifest, wanted, _show, options, self._progress, terminal=True
            )  # fmt: skip
        async with _standard_output() as write:
            return await restore_to_stream(
                reader, codec, manifest, wanted, write, options, self._progress, format=format
            )  # fmt: skip

    async def _image(self, entry: "ManifestFile", target: str) -> None:
        from repository.restore import restore_disk, restore_stream

        if target == "-":
            async with _standard_output() as write:
                await restore_stream(self._reader, self._codec, self._manifest, entry.filename, write, self._progress)
            return
        from core.limits import in_io_thread
        from hypervisor.nbd_address import is_nbd_uri
        from hypervisor.targets import open_target

        stays = is_nbd_uri(target) or await in_io_thread(_has_content, Path(target))
        async with open_target(target, entry.size, force=self._force, format=self._format) as disk:
            with partly_written([target] if stays else [], self._progress):
                await restore_disk(self._reader, self._codec, self._manifest, entry.filename, disk, self._progress)

    async def _blob(self, entry: "ManifestFile", target: str) -> int:
        from repository.restore import restore_blob

        data = await restore_blob(self._reader, self._codec, self._manifest, entry.filename)
        return await self._small_file(data, target)

    async def _small_file(self, data: bytes, target: str) -> int:
        from core.limits import in_io_thread

        if target == "-" and sys.stdout.isatty():
            await in_io_thread(_to_terminal, data)
        elif target == "-":
            async with _standard_output() as write:
                await write(data)
        else:
            await in_io_thread(write_small_file, Path(target), data, self._force)
        return len(data)


def _has_content(path: Path) -> bool:
    status = status_of(path)
    return status is not None and (S_ISBLK(status.st_mode) or (S_ISREG(status.st_mode) and status.st_size > 0))


def status_of(path: Path) -> "os.stat_result | None":
    """What `path` is; None if nobody can tell, of which who opens it says why."""
    try:
        return path.stat()
    except OSError:
        return None


@contextmanager
def partly_written(targets: Sequence[str], progress: "Progress") -> Iterator[None]:
    """Say that `targets`, which may grow meanwhile, hold a part of an image if the block fails or is cancelled."""
    try:
        yield
    except BaseException as error:
        if targets:
            words = f"{', '.join(targets)} may hold a part of the image only"
            if isinstance(error, Exception):
                error.add_note(words)
            else:
                progress.warn(words)
        raise


def _inside_folder(target: str, name: str) -> str:
    """`target`, or the file `name` in it if it is a folder."""
    status = None if "://" in target or target == "-" else status_of(Path(target))
    is_folder = status is not None and S_ISDIR(status.st_mode)
    return str(Path(target) / name) if is_folder else target


@asynccontextmanager
async def _standard_output() -> "AsyncIterator[Callable[[Buffer], Awaitable[None]]]":
    """What writes to standard output, which is no terminal; a pipe that nobody empties can be given up.

    Raises:
        TargetError: it is a terminal, whoever reads it went away, or it cannot be written.
    """
    from hypervisor.targets import StreamTarget

    stream = StreamTarget(sys.stdout.fileno(), "standard output")
    try:
        yield stream.write
        await stream.flush()
    finally:
        stream.close()


async def _show(data: "Buffer") -> None:
    from core.limits import in_io_thread

    await in_io_thread(_to_terminal, data)


def _to_terminal(data: "Buffer") -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except OSError as error:
        raise TargetError("write to", "standard output", os_reason(error)) from error


def _prepare_folder(folder: Path, force: bool) -> None:
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise TargetError("restore to", str(folder), os_reason(error)) from error
    if occupied and not force:
        raise TargetError("restore to", str(folder), "the folder is not empty", "use another one, or --force")


def write_small_file(path: Path, data: bytes, force: bool) -> None:
    """Write `data` to the file `path`, whole or not at all.

    Raises:
        TargetError: the file has content and `force` is not given, it is no regular file, it would be taken for one of
            Fleece's own, or it cannot be written.
    """
    import os
    import tempfile

    if path.name == LIVE_STATE_NAME:  # `vm restore --resume` would run the command line in it
        raise TargetError("restore to", str(path), "that is a name of Fleece's own", "choose another one, or -")
    try:
        if path.exists() and not path.is_file():
            raise TargetError("restore to", str(path), "it is no regular file")
        if path.exists() and path.stat().st_size > 0 and not force:
            raise TargetError("restore to", str(path), "the file has content", "use another one, or --force")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise TargetError("write", str(path), os_reason(error)) from error
