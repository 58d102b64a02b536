"""A storage of Proxmox VE that is a repository: what its plugin lists, prunes and removes."""

import pytest

from tests.provider.plugin import Died, Worker


async def test_an_empty_storage(worker: Worker) -> None:
    async with worker.started() as plugin:
        assert await plugin.storage("type") == "fleece"
        assert await plugin.storage("api") == 15
        total, available, used, active = await plugin.storage("status", "fleece", "@scfg", {})
        assert total >= available > 0
        assert (used > 0, active) == (True, 1)
        assert await plugin.storage("list_volumes", "fleece", "@scfg", None, ["backup"]) == []
        assert await plugin("provider_name") == "Fleece"
        await plugin("job_init", 1)
        assert plugin.log == [("info", f"Fleece backs up to {worker.scfg['fleece-repository']}")]
        with pytest.raises(Died, match="100"):
            await plugin("archive_get_guest_config", "backup/vm/100/2026-01-02T03:04:05Z")
