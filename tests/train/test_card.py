"""The card of a run knows what its clips tell of a pair of bounds."""

import pytest

from trfpp.data_prep.calibration import distance, estimate
from trfpp.data_prep.dataset import clip_frames, load_clips, prepare
from trfpp.data_prep.procedural import write_world
from trfpp.train.plan import make_plan
from trfpp.train.setup import make_card
from trfpp.trf.base import load_config


def test_the_card_holds_the_calibration_of_the_training_clips(config, tmp_path):
    write_world(tmp_path / "films", "linear", count=20, seed=0, num_frames=6, side=32)
    prepare(tmp_path / "films", tmp_path / "data", fps=None, progress=False, num_frames=6, height=32, width=32)
    clips = load_clips(tmp_path / "data", "train")
    run = config(data=tmp_path / "data")
    card = make_card(run, make_plan(run, 1), load_config(run.model, "unet"))
    assert card.calibration.clips == len(clips)
    apart = distance(*clip_frames(clips[0])[[0, -1]])
    assert apart == pytest.approx((clips[0]["bound_flow"], clips[0]["bound_difference"]))
    fps, bucket = estimate(card.calibration, apart, 6)
    assert min(clips["fps"]) <= fps <= max(clips["fps"])
    assert min(clips["motion_bucket"]) <= bucket <= max(clips["motion_bucket"])
    assert type(card).model_validate_json(card.model_dump_json()) == card
