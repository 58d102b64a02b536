"""Finding in a repository as the command does, in the test's process; with the index and without."""

import os
from pathlib import Path

from agent.archive_listing import Found
from agent.find_index.answering import update_index
from agent.find_index.files import IndexFile, repository_key
from agent.find_index.updating import Updated
from agent.finding import NO_BOUNDS, Bounds, Query, find_in_selection
from agent.snapshot_archives import select_snapshots
from core.progress import Progress
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.names import ROOT, Namespace
from pxar.patterns import MatchPattern
from repository.archive import open_cache
from repository.interface import Repository
from repository.local import LocalRepository
from repository.stored_bytes import CACHE_SIZE

PATTERNS = [
    "**", "*.docx", "hosts", "etc/**", "etc/**/*.conf", "/etc/hosts", "*", "s*/", "?osts", "[^x]osts", "*o*s*",
    "/srv/*", "nothing", "*\xff", "deep/*/[a-c]*", "**/", "/**/etc/",
]  # fmt: skip


class Finder:
    """Finds in a repository as the command does."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository

    @property
    def folder(self) -> Path:
        """Where a local one lies."""
        assert isinstance(self.repository, LocalRepository)
        return self.repository.store.base

    async def find(
        self, pattern: str, *named: str, index: bool = True, key: CryptKey | None = None, ns: Namespace = ROOT,
        recursive: bool = False, archive: str | None = None, letters: str = "dflhbcps", everything: bool = True,
        images: bool = False, bounds: Bounds = NO_BOUNDS,
    ) -> tuple[list[Found], list[str]]:  # fmt: skip
        """What is found, and the warnings."""
        found: list[Found] = []
        progress = Progress()
        parsed = MatchPattern.parse(os.fsencode(pattern))
        async with open_cache(CACHE_SIZE) as cache:
            selection = await select_snapshots(
                self.repository, named, ns, everything=everything and not named, recursive=recursive
            )
            await find_in_selection(
                self.repository, selection, Query(parsed, frozenset(letters), archive, images, bounds),
                ChunkCodec(key, CryptMode.ENCRYPT if key else CryptMode.NONE), cache, progress, found.append,
                index=index, recursive=recursive,
            )  # fmt: skip
        return found, progress.warnings

    async def agrees(self, key: CryptKey | None = None, patterns: list[str] = PATTERNS[:5]) -> int:
        """Compare with and without the index, everywhere; returns how much there is."""
        for pattern in patterns:
            direct = await self.find(pattern, index=False, key=key, recursive=True)
            assert await self.find(pattern, key=key, recursive=True) == direct, pattern
        some = [{"archive": "etc"}, {"letters": "d"}, {"ns": Namespace.parse("a")}, {"bounds": Bounds(6, 11, 1, 15)}]
        if patterns != PATTERNS:
            some.clear()
        for more in some:
            direct = await self.find("*o*", index=False, key=key, recursive=True, **more)  # type: ignore[arg-type]
            assert await self.find("*o*", key=key, recursive=True, **more) == direct  # type: ignore[arg-type]
        return len((await self.find("**", key=key, recursive=True))[0])

    async def file(self) -> IndexFile:
        return IndexFile(await repository_key(self.repository))

    async def update(self, key: CryptKey | None = None, **more: bool | None) -> Updated:
        codec = ChunkCodec(key, CryptMode.ENCRYPT if key else CryptMode.NONE)
        namespaces = await self.repository.namespaces()
        infos = [info for ns in namespaces for info in await self.repository.snapshots(ns)]
        done = await update_index(
            await self.file(), self.repository, infos, namespaces, codec, Progress(), recursive=True,
            **more,  # type: ignore[arg-type]
        )  # fmt: skip
        assert done is not None
        return done
