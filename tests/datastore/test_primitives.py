import json
import subprocess
import sys
from pathlib import Path

import pytest

from datastore import primitives, sha256

FRONT = Path(__file__).parents[2] / "bench/primitives.py"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "CHUNK_SIZE", 64 << 10)


def test_every_primitive_has_a_rate_and_the_used_hash_is_the_one_that_serves() -> None:
    results = primitives.measure(runs=1)
    assert len({result.name for result in results}) == len(results)
    assert all(result.rate > 1e6 for result in results)
    hashes = {result.name: result.used for result in results if result.name.startswith("sha256-")}
    assert set(hashes) == {f"sha256-{candidate.name}" for candidate in sha256.available()}
    assert [name for name, used in hashes.items() if used] == [f"sha256-{sha256.implementation()}"]


def test_a_rate_is_the_median_of_the_runs_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 29.0])  # 1, 2 and 9 seconds
    calls = []
    monkeypatch.setattr("datastore.primitives.time.thread_time", lambda: next(clock))
    assert primitives.median_rate(lambda: calls.append(1), 100, runs=3) == 50
    assert len(calls) == 4


def test_the_test_data_is_half_compressible() -> None:
    import zstandard

    data = primitives.half_random(1 << 20)
    assert len(data) == 1 << 20
    assert 0.45 < len(zstandard.compress(data, 1)) / len(data) < 0.55


def test_the_benchmark_prints_one_json_document() -> None:
    command = [sys.executable, str(FRONT), "--output", "json", "--runs", "1"]
    output = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert output["cores"] >= 1
    assert {"sha256-hashlib", "crc32-isal", "zstd-compress", "aes-256-gcm-encrypt", "zero-compare"} <= {
        primitive["name"] for primitive in output["primitives"]
    }
