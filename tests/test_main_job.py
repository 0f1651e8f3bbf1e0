"""The main job on real footage, by the command line: clips, patch, video between held-out frames, exports that agree."""

import json
from pathlib import Path

import PIL.Image
import pytest
import skvideo
import torch
from accelerate.state import AcceleratorState
from diffusers import UNetSpatioTemporalConditionModel
from peft import PeftModel

from trfpp import TimeReversalFusionPipeline
from trfpp.__main__ import main
from trfpp.data_prep.dataset import load_clips
from trfpp.trf.base import load_component

FOOTAGE = Path(skvideo.__file__).parent / "datasets" / "data"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs the job once; the footage lies among files that cannot be used."""
    root = tmp_path_factory.mktemp("job")
    source = root / "footage"
    source.mkdir()
    for name in ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"):
        (source / name).symlink_to(FOOTAGE / name)
    (source / "notes.mp4").write_text("not a video")
    commands = [
        f"prep source={source} output={root}/data fps=7 num_frames=4 height=32 width=32 holdout=0.2",
        f"train miniature data={root}/data output={root}/run steps=4 optim.warmup_steps=0 validation.every=0",
        f"infer manifest={root}/data/pairs/pairs.jsonl output={root}/out patches=[{root}/run/patch]"
        " sampler.num_inference_steps=2",
        *(f"export patch={root}/run/patch output={root}/{name} format={name}" for name in ("peft", "merged")),
        f"export patch={root}/run/patch output={root}/patch.safetensors format=diffusers",
    ]
    AcceleratorState._reset_state(reset_partial_state=True)
    for command in commands:
        assert main(command.split()) == 0, command
    AcceleratorState._reset_state(reset_partial_state=True)
    return root


def pairs(root):
    return [json.loads(line) for line in (root / "data" / "pairs" / "pairs.jsonl").read_text().splitlines()]


def test_every_file_is_used_or_reported(made):
    report = json.loads((made / "data" / "report.json").read_text())
    assert set(report["files"]) == {"bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4", "notes.mp4"}
    assert "not a readable video" in report["skipped"]["notes.mp4"]
    assert all(report["files"][name] > 0 for name in report["files"] if name != "notes.mp4")
    for split in ("train", "validation"):
        for clip in load_clips(made / "data", split):
            source_fps = 29.97 if "carphone" in clip["video"] else 25
            assert abs(3 / clip["fps"] - 3 / 7) <= 1 / source_fps
            assert all(
                abs(t - clip["timestamps"][0] - k / 7) <= 1 / source_fps for k, t in enumerate(clip["timestamps"])
            )


def test_held_out_pairs_were_generated_with_the_patch(made):
    for row in pairs(made):
        record = json.loads((made / "out" / row["id"] / "generation.json").read_text())
        assert record["config"]["patches"] == [str((made / "run" / "patch").resolve())]
        assert (record["config"]["sampler"]["fps"], record["sources"]["fps"]) == (row["fps"], "manifest")
        assert len(list((made / "out" / row["id"] / "frames").glob("*.png"))) == 4
        assert (made / "out" / row["id"] / "video.mp4").stat().st_size > 0


def test_exports_equal_the_live_patch(made):
    row = pairs(made)[0]
    start, end = (PIL.Image.open(made / "data" / "pairs" / row[name]) for name in ("start", "end"))

    def sample(unet=None, patch=None):
        pipe = TimeReversalFusionPipeline.from_pretrained("miniature")
        pipe.set_progress_bar_config(disable=True)
        if unet is not None:
            pipe.register_modules(unet=unet)
        if patch is not None:
            pipe.load_patch(patch)
        return pipe(
            start, end, height=32, width=32, num_frames=4, num_inference_steps=3, fps=row["fps"],
            motion_bucket_id=row["motion_bucket_id"], generator=torch.Generator().manual_seed(0), output_type="latent",
        ).frames  # fmt: skip

    def relative(one, other):
        return float((one - other).norm() / other.norm())

    live = sample(patch=made / "run" / "patch")
    plain = PeftModel.from_pretrained(load_component("miniature", "unet"), made / "peft").get_base_model()
    merged = UNetSpatioTemporalConditionModel.from_pretrained(made / "merged")
    assert relative(sample(plain), live) <= 1e-4
    assert relative(sample(merged), live) <= 1e-4
    assert relative(sample(), live) > 1e-3


def test_settings_with_which_nothing_was_made_are_not_kept(made, tmp_path):
    assert (made / "out" / "infer.yaml").is_file()
    words = ["infer", f"output={tmp_path}/none", "loop=nowhere.png", f"patches=[{made}/run/patch]"]
    assert main(words) == 2
    assert main([*words, "overwrite=true"]) == 2
    assert not (tmp_path / "none").exists()
    kept = (made / "out" / "infer.yaml").read_text()
    again = f"infer manifest={made}/data/pairs/pairs.jsonl output={made}/out seed=7 patches=[{made}/run/patch]"
    assert main(again.split()) == 0
    assert (made / "out" / "infer.yaml").read_text() == kept
