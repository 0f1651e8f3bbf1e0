"""What takes a place is whole and readable by those who may read the user's other files; else the old one stays."""

import os
import stat

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
