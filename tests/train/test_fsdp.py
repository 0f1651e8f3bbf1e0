"""What FSDP cannot do is refused in a sentence; the rest is left to it."""

import pytest

from trfpp.train.fsdp import check_fsdp


@pytest.mark.parametrize(
    ("version", "changes", "says"),
    [
        (1, {}, "fsdp_version 1"),
        (2, {"optim": {"name": "adamw8bit"}}, "optim.name=adamw8bit"),
        (2, {"optim": {"name": "paged_adamw8bit"}}, "optim.name=paged_adamw8bit"),
        (2, {"optim": {"name": "prodigy", "lr": 1.0}}, "optim.name=prodigy"),
        (2, {"quantization": "nf4"}, "quantization=nf4"),
        (2, {"quantization": "fp8"}, "quantization=fp8"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(config, version, changes, says):
    with pytest.raises(ValueError, match=says):
        check_fsdp(version, config(**changes))


@pytest.mark.parametrize("name", ["adamw", "adamw_schedulefree"])
def test_the_rest_is_left_to_it(config, name):
    settings = config(optim={"name": name, "lr": 1.0}, lora={"kind": "dora"}, precision="bf16")
    assert check_fsdp(2, settings) is None  # it raises what it refuses
