"""What a command says when it fails: a sentence for what the user can mend, a traceback for the rest."""

import pytest
import torch

from trfpp.configs.entry import run
from trfpp.configs.schema import InferConfig


def fail(error):
    def work(config):
        raise error

    return run("infer", InferConfig, work, ["output=out", "loop=a.png"])


def beyond_this_machine():
    """What a CPU without enough memory raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "MPS backend out of memory (MPS allocated: 17.10 GiB). Tried to allocate 2.00 GiB on private pool."
        ),
        beyond_this_machine(),
    ],
    ids=["cuda", "mps", "cpu"],
)
def test_too_little_memory_is_said_in_a_sentence(error, capsys, monkeypatch):
    assert fail(error) == 2
    said = capsys.readouterr().err
    assert said == "trfpp infer: the device's memory is too small; see trfpp infer --help for what takes less.\n"
    monkeypatch.setenv("TRFPP_DEBUG", "1")
    with pytest.raises(RuntimeError, match="memory"):
        fail(error)


def test_other_failures_of_torch_keep_their_traceback():
    with pytest.raises(RuntimeError, match="size mismatch"):
        fail(RuntimeError("size mismatch"))
