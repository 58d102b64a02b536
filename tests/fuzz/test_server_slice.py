"""A slice of the fuzzing of the server with every test run: seeds, and what is near them."""

from pathlib import Path
from random import Random

import pytest

from tests.fuzz.fuzz_server import KINDS, one_changed, seeds
from tests.fuzz.server_targets import Targets


@pytest.mark.parametrize("kind", KINDS)
def test_what_clients_send_and_what_is_near_it_is_answered_or_refused(kind: str, tmp_path: Path) -> None:
    run = getattr(Targets(tmp_path), kind)
    random = Random(kind)
    inputs = seeds(kind)
    ends = {run(data) for data in inputs}
    for _ in range(150):
        data = one_changed(kind, inputs, random)
        end = run(data)
        if end not in ends:
            ends.add(end)
            inputs.append(data)
    assert len(ends) >= {"http1": 5, "http2": 10}[kind]
