"""Fixtures of the S3 client's tests."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from datastore.s3.client import S3Client
from datastore.s3.endpoint import Endpoint
from datastore.s3.link import EndpointLink, RetryPolicy, UnknownOutcome
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_service import BUCKET

#: Attempts as always, but without the waits that a real endpoint needs.
IMPATIENT = RetryPolicy(base_s=0.01, cap_s=0.02)


@dataclass(frozen=True)
class Place:
    """An endpoint with an empty bucket."""

    endpoint: Endpoint
    bucket: str


@pytest.fixture(params=["emulator", pytest.param("rgw", marks=pytest.mark.rgw)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """An empty bucket on the emulator, then one on a real gateway."""
    if request.param == "rgw":
        gateway = request.getfixturevalue("rgw")
        yield Place(gateway.endpoint(), gateway.make_bucket())
    else:
        emulator = request.getfixturevalue("s3_emulator")
        yield Place(emulator.endpoint(), BUCKET)


@pytest.fixture
async def client(place: Place) -> AsyncIterator[S3Client]:
    """A client of `place`."""
    async with S3Client.open(place.endpoint, place.bucket, policy=IMPATIENT) as opened:
        yield opened


class Told(list[UnknownOutcome]):
    """The unknown outcomes that a link told of."""


@pytest.fixture
def told() -> Told:
    """Outcomes that `emulated` does not know."""
    return Told()


@pytest.fixture
async def emulated(s3_emulator: S3Emulator, told: Told) -> AsyncIterator[S3Client]:
    """A client of the emulator, for faults."""
    async with EndpointLink.open(s3_emulator.endpoint(), policy=IMPATIENT, unknown=told.append) as link:
        yield S3Client(link, BUCKET)


def endpoint(**changes: Any) -> Endpoint:
    """An endpoint that nothing connects to."""
    values: dict[str, Any] = {"id": "aws", "endpoint": "s3.example.org", "access_key": "AK", "secret": "SK"}
    return Endpoint(**{**values, **changes})
