"""The quickstart in JupyterLab in a Chromium, where there is one; and that the script says so where there is none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import browser
import pytest

pytest.importorskip("jupyterlab")
pytest.importorskip("sklearn")


def run(screenshot: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, browser.__file__, str(screenshot)]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)


def looked(screenshot: Path, profile: str) -> subprocess.CompletedProcess[str]:
    result = run(screenshot, EMQ_PROFILE=profile)
    if result.returncode == browser.NOT_RUN:
        pytest.skip(result.stdout.strip())
    return result


def test_the_quickstart_in_jupyterlab(tmp_path: Path) -> None:
    result = looked(tmp_path / "seen.png", "smoke")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\b([1-9]\d*) of \1 code cells have run", result.stdout)
    for name in ("seen.png", "seen_running.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_cell_in_error_is_seen(tmp_path: Path) -> None:
    result = looked(tmp_path / "seen.png", "no such profile")
    assert result.returncode == 1 and (tmp_path / "seen.png").exists(), result.stderr
    for fault in ("no progress bar moved", "a cell is in error", "ValueError: profile='no such profile'", "no figure"):
        assert fault in result.stdout


@pytest.mark.parametrize("named", ["", "no-such-chromium"])
def test_without_a_chromium_it_says_so(named: str, tmp_path: Path) -> None:
    nowhere = {"PATH": "", "PLAYWRIGHT_BROWSERS_PATH": str(tmp_path), "EMQ_CHROMIUM": named}
    result = run(tmp_path / "seen.png", **nowhere)
    assert result.returncode == browser.NOT_RUN == 77
    assert result.stdout.startswith("not run: no Chromium here: ")
    assert (f"EMQ_CHROMIUM={named}" if named else "google-chrome") in result.stdout
    assert not list(tmp_path.iterdir()) and not result.stderr
