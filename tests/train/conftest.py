"""A tiny dataset of real video files, and ways to train on it: in this process, or in others that can be killed."""

import os
import subprocess
import sys

import pytest
import yaml
from accelerate.state import AcceleratorState

from trfpp.configs.training import TrainConfig
from trfpp.data_prep.dataset import prepare
from trfpp.data_prep.latents import CacheKey, build_cache, finish_cache
from trfpp.data_prep.procedural import write_world

SETTINGS = {
    "model": "miniature",
    "steps": 6,
    "loader_workers": 0,
    "log_every": 2,
    "lora": {"targets": "motion", "rank": 2, "alpha": 2.0},
    "optim": {"lr": 1e-2, "warmup_steps": 2},
    "checkpoint": {"every": 2, "keep": 2},
    "validation": {"every": 0},
}


@pytest.fixture(scope="session")
def cached_dataset():
    """`cached_dataset(videos, data, **settings)`: prepares a dataset, its conditioning cached for the miniature."""

    def make(videos, data, **settings):
        prepare(videos, data, fps=None, progress=False, **settings)
        key = CacheKey(model="miniature")
        build_cache(data, key, progress=False)
        finish_cache(data, key)
        return data

    return make


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, cached_dataset):
    """Folder of a cached dataset of 4-frame clips at 32 x 32."""
    root = tmp_path_factory.mktemp("train")
    write_world(root / "videos", "linear", count=5, seed=0, num_frames=10, side=32)
    return cached_dataset(root / "videos", root / "data", num_frames=4, height=32, width=32, holdout=0.4)


@pytest.fixture
def config(dataset, tmp_path):
    """Makes settings of a short run; nested settings are merged."""

    def make(name="run", **changes):
        values = {**SETTINGS, "data": dataset, "output": tmp_path / name}
        for key, value in changes.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        return TrainConfig(**values)

    return make


@pytest.fixture
def train_here():
    """Trains in this process, as one process."""
    from trfpp.train.loop import train

    def run(config):
        AcceleratorState._reset_state(reset_partial_state=True)
        return train(config)

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def train_elsewhere(tmp_path):
    """Starts `python -m trfpp.train` in a new process (or under a launcher) and returns it.

    Its output is piped, or goes to a terminal.
    """

    def start(config, launcher=(sys.executable,), start_new_session=False, terminal=None, **environment):
        file = tmp_path / f"{config.output.name}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return subprocess.Popen(
            [*launcher, "-m", "trfpp.train", str(file)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=terminal,
            stdout=terminal or subprocess.PIPE,
            stderr=terminal or subprocess.PIPE,
            text=True,
            start_new_session=start_new_session,
        )

    return start
