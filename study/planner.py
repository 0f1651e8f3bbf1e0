"""The runs of the study, made from its settings: which there are, in which order, and what each is told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..configs.load import read_yaml, recipes
from ..configs.schema import CacheConfig, EvaluateConfig, PrepConfig, SamplerName, SamplerOverrides, WorldsConfig
from ..configs.studying import StudyConfig
from ..configs.training import CheckpointSettings, OptimSettings, TrainConfig, ValidationSettings
from ..data_prep.bounds import MANIFEST_FILE, PAIRS_FOLDER
from .costs import Maker, of_cache, of_evaluation, of_films, of_prep, of_training
from .digest import digest
from .plan import MAIN, VARIANTS, Curve, Kind, Plan, Run, Sampled
from .told import Told

HELD_OUT_FROM = 100_000
"""Number of the first held-out film of a world: no training comes as far."""
DIRECTIONS = {"pair": "both", "forward": "forward", "either": "either"}
"""The patches of a domain and the direction each is trained in; those of the sweeps are as the main one."""
PATCHED: dict[str, tuple[str, float | tuple[float, float]]] = {
    "forward_half": ("forward", (1.0, 0.0)),
    "forward_both": ("forward", 1.0),
    "either": ("either", 1.0),
    "pair": ("pair", 1.0),
    **{variant: (variant, 1.0) for variant in VARIANTS},
}
"""The patch and the scale of the methods that have one."""
UNPATCHED: dict[str, dict[str, Any]] = {
    "base": {},
    "ceiling": {"reconstruct": True},
    "cross_fade": {"baseline": "cross_fade", "model": ""},
    "flow_warp": {"baseline": "flow_warp", "model": ""},
}
"""The settings of the others."""


def make_plan(config: StudyConfig) -> Plan:
    """All runs of the study."""
    planner = Planner(config)
    for world in config.worlds:
        for method in ("base", "cross_fade", "flow_warp", "ceiling", MAIN):
            planner.method(world, method)
    for world in config.worlds:
        for method in ("forward_half", "forward_both", "either"):
            planner.method(world, method)
    for world in config.worlds_of(config.longer):
        planner.method(world, "long")
    planner.sampling()
    for world in config.worlds_of(config.variants):
        for variant in ("fused", "rotated"):
            planner.method(world, variant)
    if config.forgetting:
        for method in ("base", "cross_fade", "flow_warp", "ceiling"):
            planner.method("base", method)
        for world in config.worlds:
            planner.measure("base", world, patch=planner.patch(world, MAIN))
        for world in config.worlds_of(config.longer):
            planner.measure("base", f"{world}-long", patch=planner.patch(world, "long"))
    if config.full is not None:
        for world in config.worlds:
            planner.method(world, "full")
    for world in config.worlds_of(config.sweeps):
        planner.sweeps(world)
    return planner.plan


class Planner:
    """Adds runs to a plan, each once, after what it needs; every method gives the name of the run it adds."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.plan = Plan()

    def add(
        self, name: str, kind: Kind, settings: Any, seconds: float, needs: Iterable[str] = (), also: Iterable[str] = ()
    ) -> str:
        """A run; one that is there already must be the same. It reads `also`, of which its `needs` were made."""
        needs = tuple(needs)
        rests_on = digest(settings, self.config.output, [self.plan.runs[need].digest for need in needs])
        run = Run(name=name, kind=kind, settings=settings, needs=(*needs, *also), digest=rests_on, seconds=seconds)
        assert self.plan.runs.setdefault(name, run) == run
        return name

    def at(self, name: str) -> Path:
        """Where a run's output lies."""
        return self.config.output / name

    # Data

    def films(self, world: str, part: str, count: int, first: int = 0) -> str:
        """Films of a world."""
        name, config = f"{world}/{part}", self.config
        settings = WorldsConfig.model_validate({
            "world": world, "output": self.at(name), "count": count, "first": first,
            "seed": config.seed, "num_frames": config.num_frames, "size": config.size,
        })  # fmt: skip
        return self.add(name, "films", settings, of_films(count))

    def dataset(self, name: str, films: str, count: int, holdout: int) -> str:
        """A dataset of films, each whole."""
        side = {"height": self.config.size, "width": self.config.size, "num_frames": self.config.num_frames}
        recipe = read_yaml(recipes("prep")["worlds"])
        settings = PrepConfig(**{
            **recipe, **side, "source": self.at(films), "output": self.at(name), "holdout": float(holdout),
        })  # fmt: skip
        return self.add(name, "clips", settings, of_prep(count), [films])

    def clips(self, world: str, count: int | None = None) -> tuple[str, str]:
        """Names of a training dataset and of its cache; `count` takes the first films only."""
        some = "" if count is None else f"-{count}"
        count = count or self.config.train_films
        data = self.dataset(f"{world}/clips{some}", self.films(world, f"train{some}", count), count, holdout=0)
        settings = CacheConfig(model=self.config.model, data=self.at(data))
        return data, self.add(f"{data}/latents", "cache", settings, of_cache(count), [data])

    def pairs(self, world: str) -> str:
        """The held-out pairs of a world."""
        return self.dataset(f"{world}/pairs", self.held(world), self.config.pairs, holdout=1)

    def held(self, world: str) -> str:
        """The films of the held-out pairs, with what is true of them."""
        return self.films(world, "held", self.config.pairs, HELD_OUT_FROM)

    # Trainings

    def patch(self, world: str, name: str, *, clips: int | None = None, **lora: Any) -> str:
        """A patch for a world, on all its clips or the first ones; `lora` are its own settings of the adapter."""
        patch, direction, run = self.config.patch, DIRECTIONS.get(name, DIRECTIONS[MAIN]), f"runs/{world}-{name}"
        data = self.clips(world, self.config.longer.films if name == "long" else clips)
        changes: dict[str, dict[str, Any]] = {
            "long": {"fusion": self.config.longer.fusion},
            "fused": {"fusion": self.config.variants.fusion},
            "rotated": {"rotated_attention": True},
        }
        objective = changes.get(name, {})
        steps, begun = patch.steps, None
        needs: tuple[str, ...] = data
        if name == "long":
            main = self.patch(world, MAIN)
            steps, needs, begun = self.config.longer.steps, (*data, main), self.at(main) / "patch"
        settings = self._training(
            run, data[0], steps, patch.optim, direction,
            lora=patch.lora.model_copy(update=lora), objective=patch.objective.model_copy(update=objective),
            start_from=begun,
        )  # fmt: skip
        ways = 2 if direction == "both" else 1
        seconds = of_training(steps, ways * patch.batch_size, full=False)
        return self.add(run, "train", settings, seconds, needs)

    def full(self, world: str) -> str:
        """All weights fine-tuned on a world."""
        full = self.config.full
        assert full is not None
        name, data = f"runs/{world}-full", self.clips(world)
        settings = self._training(name, data[0], full.steps, full.optim, "both")
        return self.add(name, "full", settings, of_training(full.steps, 2 * settings.batch_size, full=True), data)

    def _training(
        self, name: str, data: str, steps: int, optim: OptimSettings, direction: str, **more: Any
    ) -> TrainConfig:
        world = data.partition("/")[0]
        return TrainConfig.model_validate({
            "model": self.config.model, "data": self.at(data), "output": self.at(name), "steps": steps, "optim": optim,
            "direction": direction, "domain": f"the procedural world {world!r}",
            "batch_size": self.config.patch.batch_size, "seed": self.config.patch.seed, "loader_workers": 0,
            "objective": self.config.patch.objective,
            "log_every": 25, "checkpoint": CheckpointSettings(every=250, keep=1),
            "validation": ValidationSettings(every=0), **more,
        })  # fmt: skip

    # Evaluations

    def method(self, world: str, method: str) -> str:
        """One of `METHODS` on a world's held-out pairs."""
        if method in PATCHED:
            name, scale = PATCHED[method]
            return self.measure(world, method, patch=self.patch(world, name), scale=scale, save_videos=True)
        if method == "full":
            run = self.full(world)
            return self.measure(world, method, needs=[run], model=str(self.at(run) / "model"), save_videos=True)
        return self.measure(world, method, save_videos=True, **UNPATCHED[method])

    def measure(
        self,
        world: str,
        name: str,
        *,
        patch: str | None = None,
        scale: Any = 1.0,
        manifest: str | None = None,
        needs: Iterable[str] = (),
        **more: Any,
    ) -> str:
        """An evaluation on a world's held-out pairs, or on a manifest made of them; `more` are settings of its own."""
        config, data = self.config, self.pairs(world)
        patches = {"patches": [self.at(patch) / "patch"], "scales": [scale]} if patch else {}
        values = {
            "model": config.model, "data": self.at(manifest or data), "output": self.at(f"eval/{world}-{name}"),
            "pairs": config.pairs, "batch": config.batch, "sampler": config.sampler, "precision": "no",
            "loop": world == "loop", "truth": self.at(f"{world}/held/truth.jsonl"), "seed": config.sampling_seed,
            **patches, **more,
        }  # fmt: skip
        settings = EvaluateConfig.model_validate(values)
        maker: Maker = "baseline" if settings.baseline else "reconstruct" if settings.reconstruct else "sample"
        seconds = of_evaluation(settings.pairs or config.pairs, maker, settings.sampler)
        uses = [one for one in (data, patch, manifest, *needs) if one]
        return self.add(f"eval/{world}-{name}", "evaluate", settings, seconds, uses, also=[self.held(world)])

    # Ways of sampling

    def sampling(self) -> None:
        """Every way on the base and on the pair, in the order of the samplers: the costly ones come last."""
        config, longer = self.config, self.config.worlds_of(self.config.longer)
        found: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for sampler in config.sampling.samplers:
            for world in config.worlds_of(config.sampling):
                for method in ("base", "long" if world in longer else MAIN):
                    found.setdefault((world, method), []).append((sampler, self._sampled(world, method, sampler)))
        self.plan.sampled += [
            Sampled(world=world, method=method, ways=tuple(ways)) for (world, method), ways in found.items()
        ]

    def _sampled(self, world: str, method: str, sampler: SamplerName) -> str:
        count = min(self.config.sampling.pairs, self.config.pairs)
        return self.measure(
            world,
            f"{sampler}-{method}",
            patch=None if method == "base" else self.patch(world, method),
            manifest=self.manifest(world, f"last-{count}", last=count),
            sampler=SamplerOverrides(sampler=sampler),
            pairs=count,
        )

    def manifest(self, world: str, name: str, **changes: Any) -> str:
        """A manifest made of a world's held-out pairs."""
        pairs, name = self.pairs(world), f"{world}/told/{name}.jsonl"
        settings = Told(manifest=self.at(pairs) / PAIRS_FOLDER / MANIFEST_FILE, output=self.at(name), **changes)
        return self.add(name, "told", settings, 0.1, [pairs])

    # Sweeps

    def sweeps(self, world: str) -> None:
        """One setting at a time; where its value is that of the main runs, their evaluation is the point."""
        sweeps, patch = self.config.sweeps, self.config.patch
        some: dict[str, Any] = {"pairs": min(sweeps.pairs, self.config.pairs)}
        main, base = self.method(world, MAIN), self.method(world, "base")

        def scaled(value: float) -> str:
            if value in (0, 1):
                return main if value else base
            run = self.patch(world, MAIN)
            return self.measure(world, f"scale-{value:g}", patch=run, scale=float(value), **some)

        def trained(name: str, usual: bool, **changes: Any) -> str:
            return main if usual else self.measure(world, name, patch=self.patch(world, name, **changes), **some)

        def told(what: str, key: str, value: float, method: str) -> str:
            if value == 1:
                return main if method == MAIN else base
            name = self.manifest(world, f"{what}-{value:g}", **{key: float(value)})
            run = self.patch(world, MAIN) if method == MAIN else None
            return self.measure(world, f"{what}-{value:g}-{method}", patch=run, manifest=name, **some)

        def curve(sweep: str, points: Iterable[tuple[float | str, str]], method: str = MAIN) -> None:
            self.plan.curves.append(Curve(sweep=sweep, world=world, method=method, points=tuple(points)))

        ratio = patch.lora.alpha / patch.lora.rank
        ranks, counts, factors = (sorted({*values}) for values in (sweeps.ranks, sweeps.clips, sweeps.factors))
        curve("patch scale", [(value, scaled(value)) for value in sorted({*sweeps.scales})])
        curve("targets", [
            (value, trained(f"targets-{value}", value == patch.lora.targets, targets=value)) for value in sweeps.targets
        ])  # fmt: skip
        curve("rank", [
            (value, trained(f"rank-{value}", value == patch.lora.rank, rank=value, alpha=ratio * value))
            for value in ranks
        ])  # fmt: skip
        curve("training clips", [
            (value, trained(f"clips-{value}", value == self.config.train_films, clips=value)) for value in counts
        ])  # fmt: skip
        for what, key, sweep in (
            ("fps", "fps", "fps told over measured"),
            ("bucket", "motion_bucket_id", "motion bucket told over measured"),
        ):
            for method in ("base", MAIN):
                curve(sweep, [(value, told(what, key, value, method)) for value in factors], method)
