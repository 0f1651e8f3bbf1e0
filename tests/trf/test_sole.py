"""An output folder has one writer; what is left of a killed one does not count."""

import signal
import subprocess
import sys

import pytest
from filelock import FileLock

from trfpp.trf.sole import LOCK_FILE, sole

HOLDER = (
    "import sys, time; from pathlib import Path; from trfpp.trf.sole import sole\n"
    "with sole(Path(sys.argv[1])):\n"
    "    print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    """A process that has the folder `out`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_ends(tmp_path, holder):
    output = tmp_path / "out"
    with pytest.raises(ValueError, match="another process is at it"), sole(output):
        raise AssertionError
    assert (output / LOCK_FILE).is_file()  # still the other's
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with sole(output):
        (output / "result").touch()
    assert [path.name for path in output.iterdir()] == ["result"]


def test_a_folder_into_which_nothing_was_written_goes_again(tmp_path):
    with pytest.raises(KeyError), sole(tmp_path / "a" / "out"):
        raise KeyError
    assert not (tmp_path / "a" / "out").exists()


def test_what_cannot_be_written_to_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="nothing can be written there"), sole(tmp_path / "file" / "out"):
        raise AssertionError


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    def none(self, **settings):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(FileLock, "acquire", none)
    with pytest.warns(UserWarning, match="start no other process on it"), sole(tmp_path / "out"):
        (tmp_path / "out" / "result").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result"]
