"""The quickstart as its reader meets it: JupyterLab in a real browser, all cells run from the menu.

`python tests/browser.py [SCREENSHOT.png]` starts JupyterLab on a copy of the notebook without outputs and looks at what
a headless Chromium then shows: do progress bars move, do the table and the figure appear, is no cell in error? Nothing
is written outside of a temporary folder but the screenshot, build/browser.png unless told otherwise, and one taken
while the network trained beside it, browser_running.png. Exit status: 0 all was there, 1 something was not, 77 not
run, since there is no Chromium or no Playwright to drive it. $EMQ_CHROMIUM names a Chromium that is not on the PATH;
$EMQ_PROFILE is `small` unless set. `make browser` calls it.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import nbformat

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = "00_quickstart.ipynb"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NOT_RUN = 77  # as automake has it: neither passed nor failed
SECONDS = 160  # for all of it
ON_RED = "[data-mime-type='application/vnd.jupyter.stderr']"  # errors, and what is written on stderr
BAR = re.compile(r"(\d+/\d+) \[")  # tqdm's steps done, of how many


def checkout(folder: Path) -> int:
    """What the quickstart needs and no more: with no run stored it trains, and it writes in here; its code cells."""
    shutil.copytree(ROOT / "emqlib", folder / "emqlib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    notebook = nbformat.read(ROOT / "notebooks" / NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.update(outputs=[], execution_count=None)  # what is seen afterwards is of this run
    (folder / "notebooks").mkdir()
    nbformat.write(notebook, folder / "notebooks" / NOTEBOOK)
    return len(code)


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """The address of the notebook in a JupyterLab of its own, without the user's settings and kernels."""
    settings = folder / "jupyter/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # else it asks, over the notebook
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    token = secrets.token_hex()
    own = {"PYTHONPATH": str(folder), "EMQ_PROFILE": os.environ.get("EMQ_PROFILE") or "small", "JUPYTER_TOKEN": token}
    own |= {"JUPYTER_CONFIG_DIR": str(folder / "jupyter"), "JUPYTER_DATA_DIR": str(folder / "data")}
    own |= {"JUPYTER_PATH": f"{sys.prefix}/share/jupyter", "IPYTHONDIR": str(folder / "ipython")}
    options = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "allow_root": True, "open_browser": False}
    options["root_dir"] = folder / "notebooks"
    command = [sys.executable, "-m", "jupyterlab", *(f"--ServerApp.{name}={value}" for name, value in options.items())]
    log = folder / "jupyterlab.log"
    with log.open("w") as file:
        kept = {"cwd": folder, "env": os.environ | own, "stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        server = subprocess.Popen(command, start_new_session=True, **kept)  # Ctrl-C is ours: a JupyterLab would ask
    try:
        answers(f"http://127.0.0.1:{port}/api", server, log)
        yield f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK}?token={token}"
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()  # its kernels notice that by themselves
            server.wait()


def answers(url: str, server: subprocess.Popen, log: Path) -> None:
    """Wait until a server answers at `url`."""
    end = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < end:
        with suppress(URLError), urlopen(url):
            return
        time.sleep(0.2)
    raise SystemExit(f"JupyterLab does not answer; it said:\n{log.read_text()[-3000:]}")


def run_all_cells(page: Any, url: str) -> None:
    """Open the notebook and run it as a reader does."""
    page.goto(url)
    page.get_by_text("| Idle").wait_for()  # in the status bar: cells run before there is a kernel are passed over
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-InputPrompt", has_text=re.compile(r"[*\d]")).first.wait_for()


def prompts(page: Any, pattern: str) -> int:
    """How many code cells have such a text before them: [ ]: to begin with, [*]: until they have run, then a number."""
    texts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").all_inner_texts()
    return sum(bool(re.search(pattern, text)) for text in texts)


def watch(page: Any, screenshot: Path, end: float) -> list[str]:
    """Look on while cells wait or run; returns the states that progress bars were in, in order."""
    states: list[str] = []
    while time.monotonic() < end and prompts(page, r"\*"):
        for bar in BAR.findall(page.locator(".jp-Notebook").inner_text()):
            states += [bar] if [bar] != states[-1:] else []
        if len(states) == 3 and not screenshot.exists():
            page.screenshot(path=screenshot)
        page.wait_for_timeout(200)
    page.wait_for_timeout(1000)  # what came last is drawn
    return states


def faults(page: Any, cells: int, states: list[str]) -> Iterator[str]:
    """What a reader would miss, or be alarmed by, of all that was and is on the page."""
    done = prompts(page, r"\d")
    print(f"{done} of {cells} code cells have run; states of progress bars: {' '.join(states)}")
    if len(set(states)) < 3:
        yield "no progress bar moved"
    if done < cells or not page.get_by_text("| Idle").count():
        yield "not all cells have run to their end"
    yield from (f"a cell is in error, or looks so:\n{text}" for text in page.locator(ON_RED).all_inner_texts())
    tables = [table.locator("th").all_inner_texts() for table in page.locator(".jp-OutputArea table").all()]
    print("tables, their headers:", *(" ".join(headers).strip() for headers in tables), sep="\n  ")
    if not any({"1", "2*", "3", "4*", "5", "6", "7", "8*"} <= set(headers) for headers in tables):
        yield "no table of accuracy by bit-width"
    sizes = page.locator(".jp-OutputArea img").evaluate_all("all => all.map(i => [i.naturalWidth, i.naturalHeight])")
    print("figures, in pixels:", *(f"{width} × {height}" for width, height in sizes))
    if not any(width >= 300 and height >= 200 for width, height in sizes):
        yield "no figure"


def look(browser: Any, screenshot: Path) -> list[str]:
    """Run the notebook in `browser`; returns what was wrong."""
    end = time.monotonic() + SECONDS
    running = screenshot.with_stem(f"{screenshot.stem}_running")
    for old in (screenshot, running):
        old.unlink(missing_ok=True)
    with TemporaryDirectory(ignore_cleanup_errors=True) as place:
        cells = checkout(Path(place))
        # JupyterLab draws only what is in view: the window is as high as the notebook.
        with jupyterlab(Path(place)) as url, browser.new_page(viewport={"width": 1440, "height": 2000}) as page:
            page.set_default_timeout(60_000)
            try:
                run_all_cells(page, url)
                return list(faults(page, cells, watch(page, running, end)))
            finally:
                page.screenshot(path=screenshot)


def main(screenshot: Path) -> int:
    """Find a browser, look, and say what was seen; returns the exit status."""
    named = os.environ.get("EMQ_CHROMIUM")
    chromium = next(filter(None, map(shutil.which, [named] if named else CHROMIUMS)), "")
    none = f"no Chromium here: {f'EMQ_CHROMIUM={named}' if named else ', '.join(CHROMIUMS)} not found"
    if find_spec("playwright") is None:
        print(f"not run: {'' if chromium else f'{none}; '}no Playwright here (`make browser` installs it)")
        return NOT_RUN
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = chromium or ("" if named else playwright.chromium.executable_path)
        if not os.path.exists(chromium):
            print(f"not run: {none}, and Playwright has installed none")
            return NOT_RUN
        screenshot.parent.mkdir(parents=True, exist_ok=True)
        with playwright.chromium.launch(executable_path=chromium) as browser:
            print(f"{chromium}, version {browser.version}")
            found = look(browser, screenshot)
    print(*found, f"screenshot: {screenshot}", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that all that was started is ended too
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build/browser.png")))
