"""Machine files and launchers: accelerate makes of each file what it promises, there is time to save, and a SLURM job that
runs out of time or is preempted is queued again, and ends with the bits of a run that nobody disturbed. The cluster's own
programs are stood in for by a few lines each."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig

from trfpp.configs.load import command_line
from trfpp.configs.training import TrainConfig
from trfpp.data_prep.dataset import prepare
from trfpp.data_prep.procedural import write_world
from trfpp.train.checkpoint import list_checkpoints
from trfpp.train.loop import train
from trfpp.trf.base import load_component

LAUNCH = Path(__file__).parents[1] / "launch"
pytestmark = pytest.mark.skipif(not LAUNCH.is_dir(), reason="an installed package has no machine files")

PROGRAMS = {
    # Two tasks, killed when it gets SIGTERM and when the first of them fails; the highest status is its own.
    "srun": """#!/usr/bin/env bash
shift
pids=()
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" & pids+=($!)
done
echo "${pids[@]}" > "$CLUSTER/tasks"
trap 'kill -KILL "${pids[@]}"' TERM
status=0
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    while kill -0 "$pid" 2>/dev/null; do code=0; wait "$pid" || code=$?; done
    if [ $code != 0 ]; then kill -KILL "${pids[@]}" 2>/dev/null; fi
    if [ $code -gt $status ]; then status=$code; fi
done
exit $status
""",
    # The tasks get the signal; the script and srun do not.
    "scancel": """#!/usr/bin/env bash
[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM $(cat "$CLUSTER/tasks")
""",
    "scontrol": """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") echo 127.0.0.1 ;;
    "show job") printf 'JobId=%s\\n   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=%s\\n' "$3" "$(cat "$CLUSTER/preempted")" ;;
    *) echo "$@" >> "$CLUSTER/requeued" ;;
esac
""",
}


@pytest.fixture
def launched(monkeypatch):
    """Puts this process into the environment of one that accelerate launches with a machine file, and gives its arguments."""

    def launch(file):
        arguments = launch_command_parser().parse_args(["--config_file", str(file), "-m", "trfpp.train", "svd_xt"])
        known = set(vars(arguments))
        for part in ("fsdp_config", "deepspeed_config"):
            # accelerate passes over a word that it does not know.
            assert yaml.safe_load(file.read_text()).get(part, {}).keys() <= known
        arguments, defaults, _ = _validate_launch_command(arguments)
        if arguments.use_deepspeed:
            arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            _, environment = prepare_deepspeed_cmd_env(arguments)
        elif arguments.use_fsdp or arguments.multi_gpu:
            environment = prepare_multi_gpu_env(arguments)
        else:
            _, environment = prepare_simple_launcher_cmd_env(arguments)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return arguments

    AcceleratorState._reset_state(reset_partial_state=True)
    yield launch
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("name", "processes", "machines"), [("one_gpu", 1, 1), ("many_gpus", 8, 1), ("many_machines", 16, 2)]
)
def test_machine_files_of_whole_models(launched, name, processes, machines):
    arguments = launched(LAUNCH / f"{name}.yaml")
    assert (arguments.num_processes, arguments.num_machines) == (processes, machines)
    assert arguments.multi_gpu == (processes > 1)
    assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys()


def test_fsdp2_cuts_the_unet_by_blocks(launched):
    launched(LAUNCH / "fsdp2.yaml")
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    unet = load_component("miniature", "unet")
    policy = fsdp2_prepare_auto_wrap_policy(plugin, unet)
    cut = {type(module).__name__ for module in unet.modules() if policy(module)}
    assert cut == {"BasicTransformerBlock", "TemporalBasicTransformerBlock", "SpatioTemporalResBlock"}


def test_fsdp2_refuses_the_recipe_as_it_is(launched, tmp_path):
    """In the state that accelerate builds on GPUs, and before it looks for data or a model."""
    launched(LAUNCH / "fsdp2.yaml")
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    config = command_line(TrainConfig, "train", ["svd_xt", f"data={tmp_path / 'none'}", f"output={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match=r"optim\.name=adamw8bit.*set optim\.name=adamw\."):
        train(config)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_is_of_the_stage_that_the_file_is_named_after(launched, stage):
    launched(LAUNCH / f"zero{stage}.yaml")
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert int(os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"]) == stage


def test_a_pod_has_time_to_save(monkeypatch):
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    for variable in container["env"]:
        if "value" in variable:  # the token is from a secret
            monkeypatch.setenv(variable["name"], variable["value"])
    patience = LaunchConfig(min_nodes=2, max_nodes=2, nproc_per_node=8).shutdown_timeout
    assert 500 < patience < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("script", ["torchrun.sh", "cpu.sh"])
def test_scripts_give_time_to_save(tmp_path, script):
    """They start a stand-in for torchrun that says what it is given."""
    program = tmp_path / "torchrun"
    program.write_text('#!/usr/bin/env bash\necho "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $*"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", None)
    for given, patience in (({}, "570"), ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}, "60")):
        said = subprocess.check_output(["bash", LAUNCH / script, "2", "c"], env=environment | given, text=True)
        assert said.split()[0] == patience
        assert said.split()[-3:] == ["-m", "trfpp.train", "c"]


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
    (tmp_path / "preempted").write_text("None")
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
        "SLURM_CPUS_PER_TASK": "8",
        "CLUSTER": str(tmp_path),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize(
    ("told", "preempted", "ending", "comes_again"),
    [
        ("script", "None", 143, True),
        ("tasks", "2026-01-01T01:00:00", 143, True),
        ("tasks", "None", 143, False),
        ("script", "None", 0, False),
    ],
    ids=["out of time", "preempted", "stopped by hand", "done all the same"],
)
def test_which_slurm_jobs_are_queued_again(cluster, tmp_path, told, preempted, ending, comes_again):
    """Tasks that take a while to save, whoever tells them to: SLURM signals either the script or, when it preempts, the tasks."""
    python = tmp_path / "bin" / "python"
    python.write_text("""#!/usr/bin/env bash
trap 'sleep 0.5; touch "$CLUSTER/saved-$RANK"; sleep 0.3; exit $ENDING' TERM
[ "$SRUN_CPUS_PER_TASK" = 8 ] && touch "$CLUSTER/running-$RANK"
while true; do sleep 0.1; done
""")
    python.chmod(0o755)
    process = subprocess.Popen(["bash", LAUNCH / "slurm.sh", "c"], env={**cluster, "ENDING": str(ending)})
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("running-*"))) < 2 or not (tmp_path / "tasks").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (tmp_path / "preempted").write_text(preempted)
    if told == "script":
        process.send_signal(signal.SIGUSR1)
    else:
        for task in (tmp_path / "tasks").read_text().split():
            os.kill(int(task), signal.SIGTERM)
    assert process.wait(timeout=30) == ending
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert (tmp_path / "requeued").is_file() == comes_again


def test_a_slurm_job_runs_out_of_time_and_is_queued_again(cluster, tmp_path):
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

    process, line = job("disturbed"), ""
    while process.poll() is None and "step 5 of 40" not in line:
        line = process.stdout.readline()
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
