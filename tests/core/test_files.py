"""Files are whole or absent. Writers that are killed or have no room: project/test_faults."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import BinaryIO

import pytest

from emqlib import files


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
    path, others = tmp_path / "a[1]*", [tmp_path / f".a[1]*.b.half.tmp{end}" for end in (".old", "")]
    for other in others:  # parts of other files, one of which is being written
        other.write_text("another's")
    with hold(path, 60) as process:
        with pytest.raises(files.Busy, match=r"a\[1\]\*: another process is at work on it$"), files.alone(path):
            raise AssertionError
        assert (tmp_path / ".a[1]*.half.tmp").exists()
        with files.alone(tmp_path / "b"):  # another file is nobody's
            process.kill()
    with files.alone(path, patience=5), files.alone(path):  # again, in the same thread
        assert not (tmp_path / ".a[1]*.half.tmp").exists() and all(other.exists() for other in others)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_json_has_no_word_for_these(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.canonical_json(value)
