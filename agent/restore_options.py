"""The options of `fleece restore` that concern files and folders."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from core.errors import UsageError

if TYPE_CHECKING:
    from pxar.extract_report import ExtractOptions
    from pxar.features import Features

PatternOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pattern", metavar="PATTERN",
        help="Restore of a folder only what matches; repeatable, the last match decides, !PATTERN leaves out. A "
        "leading / means the archive's root, a trailing / folders only.",
    ),
]  # fmt: skip
ExistingOption = Annotated[
    bool, typer.Option("--allow-existing-dirs", help="Into a folder that has entries; what is there stays.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace whatever is there, except folders.")]
OverwriteFilesOption = Annotated[bool, typer.Option("--overwrite-files", help="Replace what has the name of a file.")]
OverwriteSymlinksOption = Annotated[
    bool, typer.Option("--overwrite-symlinks", help="Replace what has the name of a symbolic link.")
]
OverwriteHardlinksOption = Annotated[
    bool, typer.Option("--overwrite-hardlinks", help="Replace what has the name of a hard link.")
]
IgnoreOwnershipOption = Annotated[
    bool, typer.Option("--ignore-ownership", help="Files belong to whoever restores them, without setuid bits.")
]
IgnorePermissionsOption = Annotated[bool, typer.Option("--ignore-permissions", help="Leave permissions out.")]
IgnoreAclsOption = Annotated[bool, typer.Option("--ignore-acls", help="Leave ACLs out.")]
IgnoreXattrsOption = Annotated[
    bool, typer.Option("--ignore-xattrs", help="Leave extended attributes and file capabilities out.")
]
NoDevicesOption = Annotated[bool, typer.Option("--no-device-nodes", help="Leave devices out.")]
NoFifosOption = Annotated[bool, typer.Option("--no-fifos", help="Leave named pipes out.")]
NoSocketsOption = Annotated[bool, typer.Option("--no-sockets", help="Leave sockets out.")]
NoSetuidOption = Annotated[
    bool, typer.Option("--no-setuid", help="Leave setuid and setgid bits and file capabilities out.")
]


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """As they stand on the command line."""

    patterns: tuple[str, ...] = ()
    force: bool = False
    allow_existing_dirs: bool = False
    overwrite: bool = False
    overwrite_files: bool = False
    overwrite_symlinks: bool = False
    overwrite_hardlinks: bool = False
    ignore_ownership: bool = False
    ignore_permissions: bool = False
    ignore_acls: bool = False
    ignore_xattrs: bool = False
    no_device_nodes: bool = False
    no_fifos: bool = False
    no_sockets: bool = False
    no_setuid: bool = False

    def to_folder(self) -> "ExtractOptions":
        """What they mean for a folder.

        Raises:
            UsageError: a pattern is wrong.
        """
        import os

        from pxar.extract_report import ExtractOptions
        from pxar.patterns import MatchPattern

        all_kinds = self.overwrite or self.force
        return ExtractOptions(
            patterns=tuple(MatchPattern.parse(os.fsencode(text)) for text in self.patterns),
            features=self._features(),
            allow_existing=self.allow_existing_dirs or self.force,
            overwrite_files=self.overwrite_files or all_kinds,
            overwrite_symlinks=self.overwrite_symlinks or all_kinds,
            overwrite_hardlinks=self.overwrite_hardlinks or all_kinds,
            overwrite_others=all_kinds,
            drop_setuid=self.no_setuid,
        )

    def to_stream(self) -> "ExtractOptions":
        """What they mean for a tar or zip archive.

        Raises:
            UsageError: a pattern is wrong, or an option is for whoever unpacks it.
        """
        for name, given in (("ownership", self.ignore_ownership), ("permissions", self.ignore_permissions)):
            if given:
                raise UsageError("use", f"--ignore-{name}", "whatever unpacks the tar or zip archive decides on that")
        return self.to_folder()

    def _features(self) -> "Features":
        from pxar.features import DEFAULT, Features

        left_out = Features(0)
        for given, features in (
            (self.ignore_ownership, Features.OWNER),
            (self.ignore_permissions, Features.PERMISSIONS),
            (self.ignore_acls, Features.ACL),
            (self.ignore_xattrs, Features.XATTRS | Features.FCAPS),
            (self.no_device_nodes, Features.DEVICE_NODES),
            (self.no_fifos, Features.FIFOS),
            (self.no_sockets, Features.SOCKETS),
        ):
            if given:
                left_out |= features
        return DEFAULT & ~left_out
