"""The repository behind a storage of Proxmox VE: what its section of `storage.cfg` and `fleece.toml` say together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Final

from agent.invocation import DEFAULT_OWNER, Invocation
from agent.provider.messages import Storage
from datastore.names import Namespace

if TYPE_CHECKING:
    from agent.config import Config, RepositorySection
    from agent.keys import BackupKeys, KeyOptions, ReadingKey
    from repository.interface import Repository


class UsedStorage:
    """One storage, resolved. Nobody is ever asked for a passphrase."""

    def __init__(self, storage: Storage, invocation: Invocation) -> None:
        self.id: Final = storage.id
        self.spec: Final = storage.repository  #: as `--repo` takes it
        self._ns, self._invocation = storage.ns, invocation

    @property
    def _config(self) -> "Config":
        return self._invocation.config

    @property
    def _section(self) -> "RepositorySection | None":
        return self._config.repository.get(self.spec)

    @property
    def ns(self) -> Namespace:
        """The namespace of its groups: its own, else the repository's."""
        section = self._section
        return Namespace.parse(self._ns if self._ns is not None else section.ns if section is not None else "")

    @property
    def owner(self) -> str:
        """Of new groups."""
        section = self._section
        return (section.owner if section is not None else None) or self._config.owner or DEFAULT_OWNER

    @property
    def _key_options(self) -> "KeyOptions":
        from agent.keys import KeyOptions

        levels = [level for level in (self._section, self._config) if level is not None]
        return KeyOptions(
            default_keyfile=next((level.keyfile for level in levels if level.keyfile), None),
            default_master=next((level.master_pubkey_file for level in levels if level.master_pubkey_file), None),
            default_mode=next((level.crypt_mode for level in levels if level.crypt_mode), None),
        )

    @cached_property
    def keys(self) -> "BackupKeys":
        """What backups are written with.

        Raises:
            FleeceError: a key cannot be read or unlocked.
        """
        from agent.keys import backup_keys

        return backup_keys(self._key_options, attended=False)

    @cached_property
    def reading_key(self) -> "ReadingKey":
        """What backups are read with.

        Raises:
            FleeceError: a key that is configured cannot be used.
        """
        from agent.keys import reading_key

        return reading_key(self._key_options, may_ask=False, attended=False)

    @asynccontextmanager
    async def open(self) -> "AsyncIterator[Repository]":
        """The repository, while the block runs.

        Raises:
            NotFoundError, UsageError: nothing known is named.
            FleeceError: it cannot be opened.
        """
        from agent.repositories import repository_at

        used = self._invocation
        async with repository_at(self.spec, used.config, used.registry, lambda: used.s3) as repository:
            yield repository
