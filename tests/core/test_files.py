"""Files are whole or absent, whatever happens to the writer."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import BinaryIO

import pytest

from emqlib import files

# A process of its own that may be killed or run out of space.
WRITER = """
import os, resource, signal, sys
from pathlib import Path
from emqlib.files import write_atomic

def killed(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

def too_large(file):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    file.write(b"new" * 100_000)

write_atomic(Path(sys.argv[2]), {"killed": killed, "too_large": too_large}[sys.argv[3]])
"""


def run_writer(path: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WRITER, files.__file__, str(path), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def half_then(error: BaseException) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    return write


def test_home_is_the_checkout_or_where_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(files, "CHECKOUT", tmp_path)
    assert files.home() == tmp_path / "work"  # installed without a checkout
    (tmp_path / "pyproject.toml").touch()
    assert files.home() == tmp_path


def test_content_and_missing_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    files.write_atomic(path, lambda file: file.write(b"\x00\xff"))
    assert path.read_bytes() == b"\x00\xff"
    files.write_atomic(path, lambda file: file.write(b"again"))
    assert path.read_bytes() == b"again"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    for before in ([], ["file"]):
        with pytest.raises(type(error)):
            files.write_atomic(path, half_then(error))
        assert os.listdir(tmp_path) == before
        files.write_text(path, "old")
    assert path.read_text() == "old"


def test_content_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may rename first and write later; a power failure in between would leave an empty file."""
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.fstat(file).st_size) or sync(file))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("named") or replace(*names))
    files.write_text(tmp_path / "row.json", "{}")
    assert calls == [2, "named"] and (tmp_path / "row.json").read_text() == "{}"


def test_a_full_disk_is_reported_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    path.write_text("old")
    result = run_writer(path, "too_large")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("OSError: [Errno 27]") and str(path) in result.stderr
    assert os.listdir(tmp_path) == ["row.json"] and path.read_text() == "old"


def test_a_writer_killed_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    assert run_writer(path, "killed").returncode == -signal.SIGKILL
    assert not path.exists()
    path.write_text("old")
    assert run_writer(path, "killed").returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    files.write_text(path, "new")  # what the killed one left behind is in nobody's way
    assert path.read_text() == "new"


def test_a_reader_sees_whole_files_only(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 1 << 20
    contents = {letter * size for letter in "ab"}
    files.write_text(path, "a" * size)
    writer = Thread(target=lambda: [files.write_text(path, letter * size) for letter in "ba" * 10])
    writer.start()
    seen = [path.read_text()]
    while writer.is_alive():
        seen.append(path.read_text())
    writer.join()
    assert set(seen) <= contents


HOLDER = """
import sys, time
from pathlib import Path
from emqlib.files import alone
path = Path(sys.argv[2])
with alone(path):
    path.with_name(f".{path.name}.half.tmp").write_text("half")
    print("alone", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def hold(path: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that is alone with a file for so long, and leaves a part of it behind."""
    command = [sys.executable, "-c", HOLDER, files.__file__, str(path), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "alone\n"
    return process


def test_one_process_at_a_time_until_it_is_killed(tmp_path: Path) -> None:
    path, other = tmp_path / "a[1]*", tmp_path / ".a[1]*.b.half.tmp.old"
    other.write_text("another's")
    with hold(path, 60) as process:
        with pytest.raises(files.Busy, match=r"a\[1\]\*: another process is at work on it$"), files.alone(path):
            raise AssertionError
        assert (tmp_path / ".a[1]*.half.tmp").exists()
        with files.alone(tmp_path / "b"):  # another file is nobody's
            process.kill()
    with files.alone(path, patience=5), files.alone(path):  # again, in the same thread
        assert not (tmp_path / ".a[1]*.half.tmp").exists() and other.exists()


def test_who_is_patient_is_next(tmp_path: Path) -> None:
    with hold(tmp_path / "a", 0.5), files.alone(tmp_path / "a", patience=30):
        assert not list(tmp_path.glob("*.tmp"))


def test_folders_that_can_hold_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert files.can_hold_files(tmp_path) and files.can_hold_files(tmp_path / "a" / "b")
    assert not files.can_hold_files(tmp_path / "file") and not files.can_hold_files(tmp_path / "file" / "a")
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    assert not files.can_hold_files(tmp_path) and not files.can_hold_files(tmp_path / "a" / "b")


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for place in ("file/below", "folder"):
        with pytest.raises(OSError, match=r"file|folder"):
            files.write_text(tmp_path / place, "new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old" and not os.listdir(tmp_path / "folder")


def test_equal_values_have_equal_json() -> None:
    text = files.canonical_json({"b": (1, 2.5), "a": {"d": None, "c": "β"}})
    assert text == '{"a":{"c":"\\u03b2","d":null},"b":[1,2.5]}'
    assert text == files.canonical_json({"a": {"c": "β", "d": None}, "b": [1, 2.5]})
    assert json.loads(text) == {"a": {"c": "β", "d": None}, "b": [1, 2.5]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_json_has_no_word_for_these(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.canonical_json(value)


def test_digest() -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert files.digest("") == files.digest(b"") == empty
    assert files.digest("β") == files.digest("β".encode()) != files.digest("b")
