"""Machine files and launchers: accelerate reads each file, YAML is YAML, and a SLURM job is preempted, queued again, and ends
with the bits of a run that nobody disturbed. The cluster's own programs are stood in for by a few lines each."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config import load_config_from_file
from safetensors.torch import load_file

from trfpp.configs.training import TrainConfig
from trfpp.data_prep.dataset import prepare
from trfpp.data_prep.procedural import write_world
from trfpp.train.checkpoint import list_checkpoints

LAUNCH = Path(__file__).parents[1] / "launch"
pytestmark = pytest.mark.skipif(not LAUNCH.is_dir(), reason="an installed package has no machine files")

PROGRAMS = {
    # Two tasks, to which signals are passed on; the first failure is the status.
    "srun": """#!/usr/bin/env bash
shift
pids=()
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" & pids+=($!)
done
trap 'kill -TERM "${pids[@]}"' TERM
status=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" && true; code=$?; done
    if [ "${code:-0}" != 0 ]; then status=$code; fi
done
exit $status
""",
    "scontrol": """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
""",
}


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda file: file.name)
def test_machine_files_are_read(file):
    if file.name == "kubernetes.yaml":
        kinds = [document["kind"] for document in yaml.safe_load_all(file.read_text())]
        assert kinds == ["Service", "Job"]
        return
    assert load_config_from_file(str(file)).num_processes >= 1


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.sh")), ids=lambda file: file.name)
def test_scripts_are_valid_and_say_how_they_are_used(file):
    assert os.access(file, os.X_OK)
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    if file.name != "slurm.sh":
        done = subprocess.run(["bash", file], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "usage:" in done.stderr


@pytest.fixture
def cluster(tmp_path):
    """The environment of a SLURM job of two tasks on this machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "here",
        "REQUEUED": str(tmp_path / "requeued"),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


def test_a_slurm_job_is_preempted_and_queued_again(cluster, tmp_path):
    write_world(tmp_path / "videos", "linear", count=4, seed=0, num_frames=4, side=32)
    prepare(
        tmp_path / "videos", tmp_path / "data", fps=None, num_frames=4, height=32, width=32, holdout=0.0, progress=False
    )

    def job(name):
        run = TrainConfig(
            model="miniature", data=tmp_path / "data", output=tmp_path / name, steps=40, loader_workers=0, log_every=5,
            lora={"targets": "motion", "rank": 2, "alpha": 2.0}, checkpoint={"every": 1000}, validation={"every": 0},
        )  # fmt: skip
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
        return subprocess.Popen(
            ["bash", LAUNCH / "slurm.sh", file],
            env=cluster,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    process, deadline = job("disturbed"), time.monotonic() + 120
    while not list((tmp_path / "disturbed" / "log").glob("events*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    (saved,) = list_checkpoints(tmp_path / "disturbed" / "checkpoints")
    assert 0 < int(saved.name.removeprefix("step-")) < 40
    for name in ("disturbed", "left_alone"):
        process = job(name)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert ("resumed from" in said) == (name == "disturbed")
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1
    one, other = (
        load_file(tmp_path / name / "patch" / "adapter_model.safetensors") for name in ("disturbed", "left_alone")
    )
    assert all(torch.equal(one[key], other[key]) for key in other)
