"""What takes a place is whole and readable by those who may read the user's other files; else the old one stays."""

import os
import socket
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trfpp.trf.replace import replacing


def test_an_interrupted_output_leaves_the_old_one(tmp_path):
    def interrupted():
        with replacing(tmp_path / "a.txt") as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_that_was_moved_aside_comes_back(tmp_path, monkeypatch):
    """However short the time between the two renames is, a signal may come in it."""

    def interrupted(source, target):
        raise KeyboardInterrupt

    def replace():
        with replacing(tmp_path / "patch") as beside:
            beside.mkdir()
            (beside / "new").touch()

    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "old").touch()
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            replace()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["patch", "patch/old"]
    replace()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["patch", "patch/new"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names are found by Linux's handles")
def test_what_is_in_it_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(Path(f"/proc/self/fd/{handle}").readlink().name))
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("renamed") or rename(*paths))
    with replacing(tmp_path / "patch", settled=True) as beside:
        (beside / "forward").mkdir(parents=True)
        (beside / "forward" / "weights").write_text("all")
    names = [beside.name, "forward", "weights"]
    assert done == [*names, "renamed", tmp_path.name]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_weights_are_as_readable_as_other_files(tmp_path):
    (tmp_path / "usual.txt").write_text("")
    usual = stat.S_IMODE((tmp_path / "usual.txt").stat().st_mode)
    with replacing(tmp_path / "one.safetensors") as beside:
        save_file({"a": torch.zeros(1)}, beside)
    with replacing(tmp_path / "patch") as beside:
        (beside / "forward").mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, beside / "forward" / "adapter.safetensors")
    for name in ("one.safetensors", "patch/forward/adapter.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == usual
    with replacing(tmp_path / "run.sh") as beside:
        beside.write_text("")
        beside.chmod(0o700)
    assert stat.S_IMODE((tmp_path / "run.sh").stat().st_mode) == 0o700


GONE = 9_999_999
"""No process has this number."""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_a_killed_process_left_goes_if_it_ran_here(tmp_path, monkeypatch, elsewhere):
    leftovers = []
    with monkeypatch.context() as killed:
        killed.setattr(os, "getpid", lambda: GONE)
        if elsewhere:
            killed.setattr(socket, "gethostname", lambda: "elsewhere")
        for name in ("clip.mp4", "clip"):
            with replacing(tmp_path / name) as beside:
                beside.write_text("")
            leftovers.append(beside)
    for leftover in leftovers:
        leftover.write_text("half")
    for name in ("clip.mp4", "clip"):
        with replacing(tmp_path / name) as beside:
            beside.write_text("")
    assert [leftover.exists() for leftover in leftovers] == [elsewhere, elsewhere]


def test_a_folder_that_a_killed_process_had_moved_aside_comes_back(tmp_path):
    aside = tmp_path / f".patch.{socket.gethostname()}.{GONE}.old"
    aside.mkdir()
    (aside / "weights").write_text("old")
    with pytest.raises(OSError, match="full"), replacing(tmp_path / "patch"):
        raise OSError("the disk is full")
    assert (tmp_path / "patch" / "weights").read_text() == "old"
    assert not aside.exists()


@pytest.mark.parametrize(
    ("name", "other"), [("clip.mp4", f"clip.{GONE}.mp4"), ("clip", "clip.v2"), ("clip", f"clip.{GONE}")]
)
def test_what_is_written_to_a_name_that_begins_alike_stays(tmp_path, monkeypatch, name, other):
    with replacing(tmp_path / other) as beside:
        beside.write_text("being written")
        with monkeypatch.context() as all_gone:
            all_gone.setattr("psutil.pid_exists", lambda number: False)
            with replacing(tmp_path / name) as mine:
                mine.write_text("")
    assert (tmp_path / other).read_text() == "being written"
