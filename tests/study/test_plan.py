"""The plan: complete, each run after what it needs, the most telling first; settings are those of the study."""

import json

import pytest

from trfpp.configs.schema import EvaluateConfig
from trfpp.configs.studying import StudyConfig
from trfpp.study.costs import of_evaluation
from trfpp.study.plan import METHODS, VARIANTS
from trfpp.study.planner import HELD_OUT_FROM, make_plan
from trfpp.study.told import Told, write_told

WORLDS = ["linear", "views", "loop", "irreversible", "control"]


@pytest.fixture(scope="module")
def config(settings, tmp_path_factory):
    """The whole study, and all that its recipe leaves out."""
    return settings("full", tmp_path_factory.mktemp("plan"), "variants.worlds=[linear,irreversible]")


@pytest.fixture(scope="module")
def plan(config):
    return make_plan(config)


def test_every_method_is_measured_in_every_domain(plan):
    usual = [method for method in METHODS if method not in VARIANTS]
    assert {f"eval/{world}-{method}" for world in WORLDS for method in usual} <= plan.runs.keys()
    for variant in VARIANTS:
        measured = [world for world in WORLDS if f"eval/{world}-{variant}" in plan.runs]
        assert measured == (["linear", "views", "loop"] if variant == "long" else ["linear", "irreversible"])
    assert {f"eval/base-{name}" for name in ("base", *WORLDS)} <= plan.runs.keys()
    assert {f"runs/{world}-{name}" for world in WORLDS for name in ("pair", "forward", "either", "full")} <= set(
        plan.runs
    )


def test_every_run_comes_after_what_it_needs_and_has_an_output_of_its_own(plan, config):
    seen = set()
    for name, run in plan.runs.items():
        assert name == run.name
        assert set(run.needs) <= seen
        assert run.seconds > 0
        seen.add(name)
        if run.kind != "cache":  # which lies in its dataset
            assert run.settings.output == config.output / name
    outputs = [run.settings.output for run in plan.runs.values() if run.kind != "cache"]
    assert len(set(outputs)) == len(outputs)


def test_what_answers_the_question_comes_first(plan):
    order = {name: number for number, name in enumerate(plan.runs)}
    ends = [order[f"eval/{world}-pair"] for world in WORLDS]
    assert ends == sorted(ends)
    swept = {name for curve in plan.curves for _, name in curve.points} - {f"eval/linear-{name}" for name in METHODS}
    assert min(order[name] for name in swept) > max(order[f"eval/{world}-full"] for world in WORLDS) > ends[-1]


def test_all_methods_sample_alike(plan, config):
    ways = {name for one in plan.sampled for _, name in one.ways}
    evaluations = {name: run.settings for name, run in plan.runs.items() if isinstance(run.settings, EvaluateConfig)}
    usual = {name: settings for name, settings in evaluations.items() if name not in ways}
    assert len(usual) > 60
    assert {(e.sampler.as_yaml(), e.seed) for e in usual.values()} == {(config.sampler.as_yaml(), 42)}
    swept = {name for curve in plan.curves for _, name in curve.points}
    assert {e.pairs for name, e in usual.items() if name not in swept} == {64}
    assert {e.pairs for name, e in usual.items() if name in swept} == {64, 32}  # ends of a sweep are there anyway
    assert all(e.loop == e.output.name.startswith("loop-") for e in evaluations.values())
    assert config.sampler.sampler == "trf++"


def test_ways_of_sampling_are_tried_on_pairs_that_nothing_was_chosen_by(plan):
    ways = {(one.world, one.method): dict(one.ways) for one in plan.sampled}
    best = {"linear": "long", "views": "long", "loop": "long", "irreversible": "pair", "control": "pair"}
    assert ways.keys() == {(world, method) for world in WORLDS for method in ("base", best[world])}
    patched = ways["views", "long"]
    assert list(patched) == ["trf++", "trf", "vibid", "mpd-seq", "mpd-par", "gi"]
    gi, own = (plan.runs[patched[name]].settings for name in ("gi", "trf++"))
    assert gi.sampler.model_dump(exclude_none=True) == {"sampler": "gi"}  # as its authors use it
    assert gi.model_dump(exclude={"sampler", "output"}) == own.model_dump(exclude={"sampler", "output"})
    assert [patch.parent.name for patch in gi.patches] == ["views-long"]
    assert not plan.runs[ways["views", "base"]["vibid"]].settings.patches
    assert gi.pairs == 16
    (manifest,) = {run.settings for run in plan.runs.values() if run.kind == "told" and run.settings.output == gi.data}
    assert (manifest.last, manifest.fps, manifest.motion_bucket_id) == (16, 1, 1)


def test_the_costly_ways_of_sampling_come_last(plan):
    samplers = {name: sampler for one in plan.sampled for sampler, name in one.ways}
    order = [samplers[name] for name in plan.runs if name in samplers]
    each = 2 * len(WORLDS)  # the base and the pair
    assert order == [name for name in ("trf++", "trf", "vibid", "mpd-seq", "mpd-par", "gi") for _ in range(each)]


def test_patches_are_trained_and_used_as_their_names_say(plan):
    used = {method: plan.runs[f"eval/linear-{method}"].settings for method in METHODS}
    names = {method: [patch.parent.name for patch in one.patches] for method, one in used.items()}
    assert names == {
        **{method: [] for method in METHODS}, "forward_half": ["linear-forward"], "forward_both": ["linear-forward"],
        "either": ["linear-either"], "pair": ["linear-pair"], "long": ["linear-long"], "fused": ["linear-fused"], "rotated": ["linear-rotated"],
    }  # fmt: skip
    assert (used["forward_half"].scales, used["forward_both"].scales) == ([(1.0, 0.0)], [1.0])
    directions = {"forward": "forward", "either": "either", "pair": "both", "full": "both", "fused": "both"}
    assert {name: plan.runs[f"runs/linear-{name}"].settings.direction for name in directions} == directions
    assert (used["cross_fade"].baseline, used["flow_warp"].baseline) == ("cross_fade", "flow_warp")
    assert used["ceiling"].reconstruct
    assert used["full"].model == str(plan.runs["runs/linear-full"].settings.output / "model")
    objectives = {name: plan.runs[f"runs/linear-{name}"].settings.objective for name in ("pair", *VARIANTS)}
    assert {name: (one.fusion, one.rotated_attention) for name, one in objectives.items()} == {
        "pair": (0, False), "long": (0.5, False), "fused": (0.5, False), "rotated": (0, True),
    }  # fmt: skip
    longer = plan.runs["runs/linear-long"].settings
    assert (longer.steps, longer.data) == (2000, plan.runs["linear/clips-2048"].settings.output)
    assert plan.runs["runs/linear-long"].settings.start_from == plan.runs["runs/linear-pair"].settings.output / "patch"
    assert plan.runs["eval/base-loop"].settings.patches == [plan.runs["runs/loop-pair"].settings.output / "patch"]


def test_held_out_films_are_others(plan):
    for world in WORLDS:
        train, held = (plan.runs[f"{world}/{part}"].settings for part in ("train", "held"))
        assert (train.world, train.seed, train.first, train.count) == (world, 1, 0, 512)
        assert (held.world, held.seed, held.first, held.count) == (world, 1, HELD_OUT_FROM, 64)
        assert plan.runs[f"{world}/pairs"].settings.holdout == 1
        assert plan.runs[f"{world}/clips"].settings.holdout == 0
        assert plan.runs[f"{world}/clips"].settings.cut_threshold == 255


def test_sweeps_change_one_setting_and_share_the_main_runs(plan):
    points = {(curve.sweep, curve.method): dict(curve.points) for curve in plan.curves}
    scales = points["patch scale", "pair"]
    assert (scales[0], scales[1]) == ("eval/linear-base", "eval/linear-pair")
    assert plan.runs[scales[0.5]].settings.scales == [0.5]
    ranks = points["rank", "pair"]
    assert list(ranks) == [4, 16, 64]
    assert ranks[16] == "eval/linear-pair"
    main = plan.runs["runs/linear-pair"].settings
    other = plan.runs["runs/linear-rank-4"].settings
    assert (other.lora.rank, other.lora.alpha / other.lora.rank) == (4, main.lora.alpha / main.lora.rank)
    same = {"lora", "output"}
    assert other.model_dump(exclude=same) == main.model_dump(exclude=same)
    assert points["targets", "pair"]["all"] == "eval/linear-pair"
    assert plan.runs["runs/linear-targets-motion"].settings.lora.targets == "motion"
    assert list(points["training clips", "pair"]) == [8, 32, 128, 512]
    assert plan.runs["linear/train-8"].settings.count == 8
    assert plan.runs["runs/linear-clips-8"].settings.data == plan.runs["linear/clips-8"].settings.output
    told = points["fps told over measured", "base"]
    assert told[1] == "eval/linear-base"
    assert plan.runs["linear/told/fps-0.5.jsonl"].settings.fps == 0.5
    assert plan.runs[told[0.5]].settings.data == plan.runs["linear/told/fps-0.5.jsonl"].settings.output


def test_a_part_brings_what_it_needs(plan):
    names = [run.name for run in plan.chosen(["eval/views-pair", "loop/held"])]
    assert names == [
        "views/held", "views/pairs", "views/train", "views/clips", "views/clips/latents", "runs/views-pair",
        "eval/views-pair", "loop/held",
    ]  # fmt: skip
    assert plan.chosen([]) == list(plan.runs.values())
    with pytest.raises(ValueError, match="no run is called 'eval/nothing'"):
        plan.chosen(["eval/nothing"])


def test_what_no_evaluation_waits_for_need_not_be_there(plan):
    """Films, caches and trainings may be deleted once they were used, unless they are asked for by name."""

    def missing(*patterns, but):
        done = {name for name in plan.runs if name.startswith("eval/") and name not in but}
        return [run.name for run in plan.missing(patterns, done)]

    assert missing(but=()) == []
    assert missing("eval/*", but=()) == []
    assert missing("loop/held", but=()) == ["loop/held"]
    assert missing(but=["eval/views-cross_fade"]) == ["views/held", "views/pairs", "eval/views-cross_fade"]
    kinds = {run.kind for run in plan.missing((), ["runs/linear-pair"])}
    assert kinds == {run.kind for run in plan.runs.values()}


def test_parts_can_be_left_out(settings, tmp_path):
    left_out = (
        "worlds=[loop]",
        "longer.worlds=[]",
        "variants.worlds=[]",
        "full=null",
        "forgetting=false",
        "sampling.worlds=[]",
        "sweeps.worlds=[]",
    )
    plan = make_plan(settings("full", tmp_path, *left_out))
    assert not plan.curves
    assert not plan.sampled
    assert {name.split("/")[-1] for name in plan.runs if name.startswith("eval/")} == {
        f"loop-{method}" for method in METHODS if method not in ("full", *VARIANTS)
    }


def test_a_part_is_for_the_studys_domains(settings, tmp_path):
    plan = make_plan(settings("full", tmp_path, "worlds=[loop]", "longer.worlds=[linear,loop]"))
    assert {name.split("/")[0] for name in plan.runs} == {"loop", "base", "runs", "eval"}
    assert {name.split("/")[1].split("-")[0] for name in plan.runs if name.startswith("runs/")} == {"loop"}
    assert "runs/loop-long" in plan.runs


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("patch.objective.fusion=0.5", "variants.worlds has a pair trained for its fusion"),
        ("patch.objective.alternate_directions=true", "is for forward patches too"),
        ("patch.lora.init=pissa", "starts from the pair"),
    ],
)
def test_patches_that_cannot_be_compared_are_refused(settings, tmp_path, setting, reason):
    with pytest.raises(ValueError, match=reason):
        settings("full", tmp_path, setting)


def test_the_truth_is_there_for_what_is_held_against_it(plan):
    """Though the films may be gone, of which the pairs were made."""
    done = [name for name in plan.runs if name.endswith("/pairs") or name.startswith("runs/")]
    assert "linear/held" in [run.name for run in plan.missing(["eval/linear-base"], done)]


def test_guidance_costs_as_much_again_where_it_is_done(config):
    def cost(maker, **changes):
        sampler = config.sampler.model_copy(update=changes)
        return of_evaluation(64, maker, sampler) - of_evaluation(0, maker, sampler)

    free = cost("sample", max_guidance_scale=1.0)
    everywhere = cost("sample", min_guidance_sigma=0.0, max_guidance_sigma=1000.0)
    assert cost("sample") - free == pytest.approx((everywhere - free) * 2 / 12)  # steps at 9.7 and at 3.4
    assert everywhere > 1.6 * free
    assert cost("sample", sampler="trf") > 4 * cost("sample") > 6 * cost("reconstruct") > 12 * cost("baseline")


def test_defaults_are_the_recipe(settings, tmp_path):
    """So that `trfpp study output=...` is the whole study as well."""
    recipe = settings("full", tmp_path)
    bare = StudyConfig(output=tmp_path, model=recipe.model)
    assert make_plan(recipe).runs == make_plan(bare).runs


def test_told_manifests_differ_in_what_the_model_is_told(tmp_path):
    pair = {"id": "a", "start": "a/start.png", "end": "a/end.png", "truth": "a/truth", "num_frames": 4}
    manifest = tmp_path / "pairs" / "pairs.jsonl"
    manifest.parent.mkdir()
    manifest.write_text("".join(json.dumps({**pair, "fps": 8, "motion_bucket_id": b}) + "\n" for b in (100, 200)))
    output = tmp_path / "told" / "more.jsonl"
    write_told(Told(manifest=manifest, output=output, fps=0.5, motion_bucket_id=2))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["fps"], row["motion_bucket_id"]) for row in rows] == [(4, 200), (4, 255)]
    assert (output.parent / rows[0]["start"]).resolve() == (tmp_path / "pairs" / "a" / "start.png").resolve()
    assert rows[0]["id"] == "a"
