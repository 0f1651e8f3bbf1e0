"""Adapters on a UNet that two processes hold half of each, by PyTorch's own FSDP2: they train as one process trains them, are
gathered, saved, and gone on from, sharded or not."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from trfpp.train.checkpoint import list_checkpoints

PROGRAM = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trfpp.configs.training import OptimSettings
from trfpp.train.average import Average
from trfpp.train.checkpoint import list_checkpoints, resume, save_checkpoint, snapshot
from trfpp.train.data import Sample
from trfpp.train.objective import Objective
from trfpp.train.optim import make_optimizer, make_schedule, set_rate
from trfpp.trf.adapters import adapter_parameters, adapter_weights
from trfpp.trf.base import essential_config, fingerprint, load_component
from trfpp.trf.patch import PatchCard, inject_patch
from trfpp.trf.sharding import is_sharded, whole
from torch.nn.utils import clip_grad_norm_

model, folder, steps, sharded = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "yes"
torch.set_num_threads(1)
rank, world = 0, 1
if sharded:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
unet = load_component(model, "unet").train()
inject_patch(unet, "both", targets="all", rank=2, alpha=2)
if sharded:
    for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        fully_shard(block)
    fully_shard(unet)
names = ("default/forward", "default/backward")
parameters = [one for name in names for one in adapter_parameters(unet, name)]
assert is_sharded(parameters) == sharded
assert not sharded or sum(one.to_local().numel() for one in parameters) < 0.6 * sum(one.numel() for one in parameters)
settings = OptimSettings(lr=1e-2, eps=1e-3, warmup_steps=2)
weights = {f"{name}:{key}": one for name in names for key, one in adapter_weights(unet, name).items()}
optimizer, rate = make_optimizer(weights, settings), make_schedule(settings, 8)
average = Average(parameters, optimizer, 0.9)
objective = Objective(direction="both", dtype=torch.float32, fusion=0.3)
checkpoints, start = folder / "checkpoints", 0
if existing := list_checkpoints(checkpoints):
    start = resume(existing[-1], unet, optimizer, average, "both")["step"]
for step in range(start, steps):
    set_rate(optimizer, rate(step))
    generator = torch.Generator().manual_seed(step)
    clips = 2  # of which each process sees its own
    draws = [torch.randn(clips, *shape, generator=generator) for shape in ((4, 4, 8, 8), (4, 4, 8, 8), (4, 8, 8), (1, 32))]
    mine = slice(rank * clips // world, (rank + 1) * clips // world)
    latents, noise, condition, embedding = (draw[mine] for draw in draws)
    rows = len(latents)
    batch = Sample(
        latents=torch.cat([latents, latents.flip(1)]), noise=torch.cat([noise, noise.flip(1)]),
        sigma=torch.full((2 * rows,), 2.0), condition=torch.cat([condition, condition.flip(1)]),
        embedding=torch.cat([embedding] * 2), added_time_ids=torch.tensor([[6.0, 100.0, 0.02]]).repeat(2 * rows, 1),
        backward=torch.tensor([False, True]).repeat_interleave(rows),
    )
    with objective.losses(unet, unet, batch, step) as losses:
        losses.total.backward()
    norm = whole(clip_grad_norm_(parameters, 0.1))
    assert norm > 0.1
    optimizer.step()
    optimizer.zero_grad()
    average.update()
content = snapshot(unet, "both", optimizer, average)
if rank == 0:
    card = PatchCard(
        trfpp_version="0", base_model=model, unet_fingerprint=fingerprint(unet.config), direction="both",
        unet_config=essential_config(unet.config), height=64, width=64, num_frames=4, fps=7,
    )
    save_checkpoint(checkpoints, steps, content, card, {}, {}, keep=9)
if sharded:
    dist.barrier()
    os._exit(0)  # gloo's threads and FSDP's hooks do not always end in peace
"""


@pytest.fixture
def trained(tiny_model, tmp_path):
    """Trains (on) to a step, in two processes or in one, and gives the checkpoint's tensors."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def train(name, steps, sharded):
        words = [program, tiny_model, tmp_path / name, str(steps), "yes" if sharded else "no"]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"] if sharded else []
        done = subprocess.run(
            [sys.executable, *launcher, *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        last = list_checkpoints(tmp_path / name / "checkpoints")[-1]
        assert last.name == f"step-{steps:06d}"
        return {
            f"{file.relative_to(last)}:{key}": value
            for file in last.rglob("*.safetensors")
            for key, value in load_file(file).items()
        }

    return train


def relative(one, other):
    keys = [key for key in one if one[key].is_floating_point()]
    difference = sum(float((one[key] - other[key]).square().sum()) for key in keys)
    return (difference / sum(float(other[key].square().sum()) for key in keys)) ** 0.5


def test_shards_train_as_one_process_and_go_on_in_any_number(trained, tmp_path):
    def copied(name, into):
        shutil.copytree(tmp_path / name, tmp_path / into)

    trained("one", 3, sharded=False)
    copied("one", "spread")
    one = trained("one", 6, sharded=False)
    two = trained("two", 6, sharded=True)
    assert one.keys() == two.keys()
    assert relative(two, one) < 1e-4
    trained("stopped", 3, sharded=True)
    copied("stopped", "gathered")
    again = trained("stopped", 6, sharded=True)
    assert all(torch.equal(again[key], two[key]) for key in two)
    assert relative(trained("gathered", 6, sharded=False), one) < 1e-4
    assert relative(trained("spread", 6, sharded=True), one) < 1e-4
