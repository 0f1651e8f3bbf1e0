"""What a command says when it fails: a sentence for what the user can mend, a traceback for the rest."""

import pytest
import torch

from trfpp.configs.entry import run
from trfpp.configs.schema import InferConfig


def fail(error):
    def work(config):
        raise error

    return run("infer", InferConfig, work, ["output=out", "loop=a.png"])


def test_too_little_memory_is_said_in_a_sentence(capsys, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert fail(error) == 2
    said = capsys.readouterr().err
    assert said == "trfpp infer: the device's memory is too small; see trfpp infer --help for what takes less.\n"
    monkeypatch.setenv("TRFPP_DEBUG", "1")
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        fail(error)


def test_other_failures_of_torch_keep_their_traceback():
    with pytest.raises(RuntimeError, match="size mismatch"):
        fail(RuntimeError("size mismatch"))
