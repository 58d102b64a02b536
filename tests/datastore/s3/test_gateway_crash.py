"""A real gateway that is killed while objects are being sent."""

import os

import pytest
import trio

from datastore.s3.client import S3Client
from datastore.s3.link import EndpointLink, RetryPolicy
from tests.support.rgw import RunningRgw


@pytest.mark.rgw
async def test_uploads_outlive_a_gateway_that_is_killed_and_comes_back(rgw: RunningRgw) -> None:
    bodies = {f"st1/{number:02}": os.urandom(4 << 20) for number in range(40)}
    rest = iter(bodies)
    started = trio.Event()
    policy = RetryPolicy(base_s=0.1, cap_s=0.5)
    async with EndpointLink.open(rgw.endpoint(), policy=policy) as link:
        client = S3Client(link, rgw.make_bucket())

        async def uploader() -> None:
            for number, key in enumerate(rest):
                await client.put(key, [bodies[key]], if_absent=True)
                if number == 3:
                    started.set()

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(uploader)
            await started.wait()
            await trio.to_thread.run_sync(rgw.kill_gateway)
            await trio.to_thread.run_sync(rgw.start_gateway)
        assert link.counters.pbs()["s3-put"] > len(bodies), "no upload was hit"
        for key, body in bodies.items():
            fetched = await client.get(key)
            assert fetched is not None
            assert fetched.data == body, key
