"""The page in a real browser: it is shown, its style applies, nothing of it is run, and nothing is loaded."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import trio

from agent.monitoring.page import render_page

from .conftest import HOSTILE, config
from .test_overview import TEXT, known
from .test_web import Served

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--window-size=1400,1000",
)  # fmt: skip
#: Seconds for a browser on a busy machine.
PATIENCE_S = 200


class HostilePage(Served):
    """A host whose every name is hostile."""

    def collect(self) -> dict[str, object]:
        document = known(self.folder, config(TEXT))
        for guest in document["guests"]:
            guest["guest"] = f"{HOSTILE}<img src=http://127.0.0.1:{self.port}/loaded onerror=\"document.title='run'\">"
        document["host"] = "</title><script>document.title='run'</script>"
        return document


async def browse(profile: Path, *arguments: str) -> tuple[str, str]:
    """What a browser prints, and what its console says."""
    assert CHROMIUM is not None
    line = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *arguments]
    done = await trio.to_thread.run_sync(
        lambda: subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
async def test_a_browser_shows_the_page_and_runs_and_loads_nothing(tmp_path: Path) -> None:
    served = HostilePage(tmp_path / "state")
    asked: list[str] = []
    answer = served.server._answer

    async def note(request: object, how: object) -> object:
        asked.append(request.target)  # type: ignore[attr-defined]
        return await answer(request, how)  # type: ignore[arg-type]

    served.server._answer = note  # type: ignore[method-assign,assignment]
    async with served.running():
        url = f"http://127.0.0.1:{served.port}/"
        dom, console = await browse(tmp_path / "one", "--dump-dom", url)
        picture = tmp_path / "page.png"
        await browse(tmp_path / "two", f"--screenshot={picture}", url)
    # A style that the policy forbids, a script that it stops: the console would say so.
    assert console == ""
    assert set(asked) == {"/"}
    assert "<title>Fleece: &lt;/title&gt;&lt;script&gt;" in dom
    assert "<script" not in dom
    assert "<img" not in dom
    assert len(re.findall("<tr>", dom)) == len(re.findall("<tr>", render_page(known(tmp_path / "s", config(TEXT)))))
    assert picture.stat().st_size > 20_000
