"""Files that are written whole or not at all, and what killed writers leave behind."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from avser_fast.inference import whole_files
from avser_fast.inference.whole_files import remove_unfinished, write_bytes
from python_training.data.store import Store, mend

WAITING = """
import os, sys, time
from avser_fast.inference.whole_files import write_bytes
def wait(descriptor):
    print("written", flush=True)
    time.sleep(60)
os.fsync = wait
write_bytes(sys.argv[1], b"half")
"""


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "a", b"one", memoryview(b"two"))
    assert (tmp_path / "a").read_bytes() == b"onetwo"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'a'}'"):
        write_bytes(tmp_path / "a", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"onetwo"
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none" / "a")):
        write_bytes(tmp_path / "none" / "a", b"")


def test_what_a_killed_writer_left_is_removed_and_a_living_one_is_not_disturbed(tmp_path: Path) -> None:
    others = [tmp_path / name for name in (".hidden", ".a.1", "b.12.0123abcd", ".a.12.0123abcd.png")]
    for path in others:
        path.write_bytes(b"not ours")
    command = [sys.executable, "-c", WAITING, str(tmp_path / "shard.safetensors")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "written\n"
        (unfinished,) = tmp_path.glob(".shard.safetensors.*")
        assert mend(tmp_path) == {} and unfinished.exists(), "it is being written"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert unfinished.exists()
    assert mend(tmp_path) == {} and sorted(tmp_path.iterdir()) == sorted(others)


def test_a_new_file_that_is_taken_for_a_leftover_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    removed: list[Path] = []

    def late(file: Any, how: int) -> None:
        if not removed:  # another process looks between the making of the file and its lock
            removed.extend(tmp_path.glob(".a.*"))
            monkeypatch.setattr(fcntl, "flock", lock)
            remove_unfinished(tmp_path)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_bytes(tmp_path / "a", b"whole")
    assert len(removed) == 1 and [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_where_there_are_no_locks_files_are_written_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: Any, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(whole_files.fcntl, "flock", none)
    write_bytes(tmp_path / "a", b"whole")
    leftover = tmp_path / f".a.{os.getpid()}.0123abcd"
    leftover.touch()
    remove_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == [leftover, tmp_path / "a"]


def test_writers_beside_somebody_who_cleans(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from avser_fast.inference.whole_files import remove_unfinished\n"
        "print('ready', flush=True)\n"
        "while True: remove_unfinished(Path(sys.argv[1]))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as cleaner:
        assert cleaner.stdout is not None and cleaner.stdout.readline() == "ready\n"
        for i in range(300):
            write_bytes(tmp_path / str(i), b"%d" % i)
        assert cleaner.poll() is None
        cleaner.kill()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {str(i): b"%d" % i for i in range(300)}


def test_a_store_is_whole_after_its_writer_was_killed(tmp_path: Path) -> None:
    leftover = tmp_path / ".0123456789abcdef.safetensors.1.0123abcd"
    leftover.write_bytes(b"half of a shard")
    assert list(Store(tmp_path).keys()) == [] and mend(tmp_path) == {} and not leftover.exists()
