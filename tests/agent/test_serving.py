"""The datastores of this host as the server sees them."""

from pathlib import Path

import pytest

from agent.invocation import Invocation
from agent.serving import RegisteredStores
from server.errors import ApiError
from server.state import StorePool


async def test_a_name_means_what_it_means_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEECE_STATE_DIR", str(tmp_path))
    (tmp_path / "config.toml").touch()
    monkeypatch.setenv("FLEECE_CONFIG", str(tmp_path / "config.toml"))
    invocation = Invocation()
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        for name in ("0000", "7fff", "ffff"):
            (folder / ".chunks" / name).mkdir(parents=True)
        (folder / ".lock").touch()
    invocation.registry.add("main", first)
    pool = StorePool(RegisteredStores(invocation))
    async with pool.running():
        old = await pool.get("main")
        assert old.store.base == first
        assert await pool.get("main") is old
        invocation.registry.remove("main")
        with pytest.raises(ApiError, match="no such datastore"):
            await pool.get("main")
        invocation.registry.add("main", second)
        new = await pool.get("main")
        assert new.store.base == second
        # Destroyed and made again at the same place: locks of the old one keep nobody out.
        again = second / ".lock.new"
        again.touch()
        again.replace(second / ".lock")
        newest = await pool.get("main")
        assert newest is not new
        assert await pool.get("main") is newest
        assert await old.groups() == []  # whoever uses it can go on
