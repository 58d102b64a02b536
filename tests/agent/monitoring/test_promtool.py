"""Metrics and the rules of the documentation before Prometheus' own checker."""

import re
import subprocess
from pathlib import Path

import pytest

from agent.monitoring.metrics import render
from tests.support.apt import AptRoot, codename
from tests.support.cache import ROOT, Unavailable, cached

from .conftest import HOSTILE, config
from .test_overview import TEXT, known


def _unpack(target: Path) -> None:
    AptRoot.open("apt-release", (codename(),)).unpack(["prometheus"], target)


# The package is 20 MB, of which one static program is used.
@pytest.mark.long
def test_prometheus_has_nothing_to_say_against_metrics_and_documented_alerts(tmp_path: Path) -> None:
    try:
        promtool = cached("prometheus-1", _unpack) / "usr/bin/promtool"
    except Unavailable as reason:
        pytest.skip(str(reason))  # it comes from the distribution, which may be out of reach
    document = known(tmp_path / "state", config(TEXT))
    for guest in document["guests"]:
        guest["guest"] = HOSTILE
    checked = subprocess.run([promtool, "check", "metrics"], input=render(document), capture_output=True, timeout=100)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
    rules = re.search(r"```yaml\n(groups:.*?)```", (ROOT / "docs/monitoring.md").read_text(), re.DOTALL)
    assert rules is not None
    (tmp_path / "rules.yml").write_text(rules[1])
    done = subprocess.run(
        [promtool, "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, "SUCCESS" in done.stdout) == (0, True), done
