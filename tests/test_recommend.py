"""The search for a safe keep: what is tried, when it stops, what it recommends, and how it goes on."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny import picture

from sparse_context import SparseContextConfig
from sparse_context.evaluation import recommend as search
from sparse_context.evaluation import tolerance as bounds
from sparse_context.evaluation.recommend import recommend
from sparse_context.evaluation.recommendation import Tried, Way
from sparse_context.evaluation.tolerance import TOLERANCES, Tolerance, find_tolerance
from sparse_context.images import open_picture
from sparse_context.pipelines import Engine, ModelSpec
from sparse_context.pipelines.settings_file import parse_settings, read_settings
from sparse_context.samples import Sample
from sparse_context.trained import Trained, note_trained

KEEPS = (0.5, 0.25, 0.1)


@pytest.fixture
def samples(tmp_path):
    for i in range(2):
        picture(64, 64, i).save(tmp_path / f"{i}.png")
    return [Sample(f"s{i}", "the cat", (tmp_path / f"{i}.png",)) for i in range(2)]


@pytest.fixture
def settings(tiny_model):
    return parse_settings({"model": str(tiny_model), "dtype": "float32", "device": "cpu", "steps": 2, "seed": 3})


@pytest.fixture
def calls(monkeypatch):
    """The settings of every call of an engine but warm-ups, in order: (keep, task, overview)."""
    made = []

    class Counting(Engine):
        def __call__(self, request, **more):
            config = request.config
            made.append((config.keep, config.task, config.overview))
            return super().__call__(request, **more)

    monkeypatch.setattr(search, "Engine", Counting)
    return made


def level_of(settings, samples, folder, keep):
    """The worst PSNR of a keep, found by a tolerance that everything is within."""
    found = recommend(
        settings, samples, Tolerance("any", {"psnr": 0.0}), folder, keeps=[keep], tasks=["edit"], overviews=[None]
    )
    return found.best.scores["psnr_to_dense"]


def test_it_goes_downward_and_stops_at_the_first_keep_that_shows(settings, samples, tmp_path, calls):
    levels = {keep: level_of(settings, samples, tmp_path / f"{keep}", keep) for keep in KEEPS}
    assert levels[0.5] > levels[0.25]
    calls.clear()
    said = []
    tolerance = Tolerance("mine", {"psnr": (levels[0.5] + levels[0.25]) / 2})
    found = recommend(
        settings,
        samples,
        tolerance,
        tmp_path / "out",
        keeps=KEEPS[::-1],
        tasks=["edit"],
        overviews=[None],
        say=said.append,
    )
    (way,) = found.ways
    assert [each.config.keep for each in way.tried] == [0.5, 0.25] and [each.holds for each in way.tried] == [
        True,
        False,
    ]
    assert found.best is way.tried[0] and found.best.scores["psnr_to_dense"] == levels[0.5]
    dense, first, second = (1.0, "edit", "trained"), (0.5, "edit", None), (0.25, "edit", None)
    assert calls == [dense] * 2 + [first] * 2 + [second] * 2 + [dense, first] * search.TURNS
    assert said[0] == f"at most {2 * (1 + 3) + 2 * search.TURNS} calls of the model for 2 scenes"
    assert said[1].startswith("a call with all tokens takes ") and said[1].endswith(" in all")
    chosen = read_settings(tmp_path / "out" / "settings.json")
    assert (chosen.spec, chosen.request.seed, chosen.request.steps) == (settings.spec, 3, 2)
    assert chosen.request.config == SparseContextConfig(keep=0.5, task="edit", overview=None)
    sheet = open_picture(tmp_path / "out" / "sheet.png")
    assert sheet.width > 3 * 192 and sheet.height > 2 * 192
    record = json.loads((tmp_path / "out" / "recommendation.json").read_text())
    assert record["figures"]["best"] == found.best.name and record["config"]["bounds"] == tolerance.bounds


def test_the_settings_make_the_picture_that_was_judged(settings, samples, tmp_path):
    recommend(
        settings,
        samples,
        Tolerance("any", {"psnr": 0.0}),
        tmp_path / "out",
        keeps=[0.25],
        tasks=["subject"],
        overviews=[4],
    )
    chosen = read_settings(tmp_path / "out" / "settings.json")
    assert chosen.request.config == SparseContextConfig(keep=0.25, task="subject", overview=4)
    (shown,) = (tmp_path / "out" / "shown").glob("*")
    for i, sample in enumerate(samples):
        request = replace(chosen.request, prompt="the cat", references=sample.open_references(), seed=3 + i)
        made = Engine(chosen.spec, bar=False)(request)
        assert np.array_equal(made.image, open_picture(shown / f"{sample.name}.png"))


def test_a_search_that_was_stopped_goes_on_and_another_tolerance_makes_no_call_again(
    settings, samples, tmp_path, calls, monkeypatch
):
    everything = {"keeps": KEEPS, "tasks": ["edit", "subject"], "overviews": [None]}
    original = search.Search.downward

    def stop(self, task, *rest):
        if task == "subject":
            raise KeyboardInterrupt
        return original(self, task, *rest)

    monkeypatch.setattr(search.Search, "downward", stop)
    with pytest.raises(KeyboardInterrupt):
        recommend(settings, samples, Tolerance("any", {"psnr": 0.0}), tmp_path, **everything)
    monkeypatch.setattr(search.Search, "downward", original)
    assert {task for _, task, _ in calls} == {"auto", "edit"}
    calls.clear()
    found = recommend(settings, samples, Tolerance("any", {"psnr": 0.0}), tmp_path, **everything)
    assert {task for _, task, _ in calls[: -2 * search.TURNS]} == {"subject"}
    assert [len(way.tried) for way in found.ways] == [3, 3] and found.best.kept == min(w.best.kept for w in found.ways)
    calls.clear()
    found = recommend(settings, samples, Tolerance("none", {"psnr": 99.0}), tmp_path, **everything)
    assert calls == [] and found.best is None and found.won is None
    assert read_settings(tmp_path / "settings.json").request.config.keep == 1.0
    assert str(found).endswith("recommended: keep all tokens; with fewer, the images are outside the tolerance")
    with pytest.raises(ValueError, match="is of .*: give another folder"):
        recommend(
            replace(settings, request=replace(settings.request, steps=1)),
            samples,
            Tolerance("any", {"psnr": 0.0}),
            tmp_path,
        )


@pytest.mark.parametrize("change", [{"negative_prompt": "blurred"}, {"vae": "channels-last"}])
def test_calls_of_other_settings_are_not_taken_for_these(settings, samples, tmp_path, monkeypatch, change):
    few = {"keeps": [0.5], "tasks": ["edit"], "overviews": [None]}
    recommend(settings, samples[:1], Tolerance("any", {"psnr": 0.0}), tmp_path, **few)
    part = "spec" if "vae" in change else "request"
    other = replace(settings, **{part: replace(getattr(settings, part), **change)})
    (name,) = change
    with pytest.raises(ValueError, match=f"is of {name} None and not {change[name]!r}: give another folder"):
        recommend(other, samples[:1], Tolerance("any", {"psnr": 0.0}), tmp_path, **few)


def test_a_pipeline_without_overviews_is_tried_without(settings, samples, tmp_path, monkeypatch):
    original = search.Search.downward

    def refuse(self, task, overview, keeps):
        if overview is not None:
            raise ValueError("overview is 4, but this pipeline takes none: leave it out.")
        return original(self, task, overview, keeps)

    monkeypatch.setattr(search.Search, "downward", refuse)
    anything = Tolerance("any", {"psnr": 0.0})
    found = recommend(settings, samples[:1], anything, tmp_path / "a", keeps=[0.5], tasks=["edit"])
    assert [(way.task, way.overview) for way in found.ways] == [("edit", None)]
    with pytest.raises(ValueError, match="takes none"):
        recommend(settings, samples[:1], anything, tmp_path / "b", keeps=[0.5], tasks=["edit"], overviews=[4])


def test_weights_for_overviews_that_do_not_go_with_the_rest_are_not_tried():
    assert search._overviews_of(Engine(ModelSpec(device="cpu", lora_scale=0.5))) == []
    assert search._overviews_of(Engine(ModelSpec(device="cpu", quantization="int8"))) == []


def test_weights_that_know_overviews_are_tried_with_what_suits_each_budget(tiny_model):
    engine = Engine(ModelSpec(str(tiny_model), dtype="float32", device="cpu"))
    assert search._overviews_of(engine) == [4]
    note_trained(engine.pipe().transformer, Trained((2, 4)))
    assert search._overviews_of(engine) == ["auto"]


def test_larger_references_are_tried_as_they_will_be_used(settings, samples, tmp_path):
    config = replace(settings.request.config, overview=4, reference_max_pixels=2**21)
    larger = replace(settings, request=replace(settings.request, config=config))
    anything = Tolerance("any", {"psnr": 0.0})
    found = recommend(larger, samples[:1], anything, tmp_path, keeps=[0.5], tasks=["edit"], overviews=[None, 4])
    assert [way.tried[0].config.reference_max_pixels for way in found.ways] == [None, 2**21]


def test_a_keep_that_is_no_ratio(settings, samples, tmp_path):
    with pytest.raises(ValueError, match="^keep is 1: pass ratios above 0 and below 1.$"):
        recommend(settings, samples, Tolerance("any", {"psnr": 0.0}), tmp_path, keeps=[1.0])


# What was found -------------------------------------------------------------------------------------------------------


def tried(keep, kept, holds):
    config = SparseContextConfig(keep=keep, task="edit", overview=None)
    return Tried(f"edit-{keep}", config, kept, 100, {"psnr_to_dense": 21.5}, 1.0, holds)


def test_the_best_of_a_way_is_the_last_that_holds():
    assert Way("edit", None, [tried(0.5, 50, True), tried(0.2, 20, True), tried(0.1, 10, False)]).best.kept == 20
    assert Way("edit", None, [tried(0.5, 50, True), tried(0.2, 20, True)]).best.kept == 20
    assert Way("edit", None, [tried(0.5, 50, False)]).best is None


# Tolerances -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "metrics"),
    [
        ({"stlpips_pytorch", "torchmetrics"}, ["psnr", "st_lpips"]),
        ({"torchmetrics"}, ["psnr", "ssim"]),
        (set(), ["psnr"]),
    ],
)
def test_a_named_tolerance_goes_by_the_metrics_that_are_there(monkeypatch, installed, metrics):
    monkeypatch.setattr(bounds, "find_spec", lambda package: package if package in installed else None)
    found = find_tolerance("same-content")
    assert list(found.bounds) == metrics
    assert found.bounds.items() <= TOLERANCES["same-content"].items()
    assert all(name in str(found) for name in metrics)


def test_every_bound_has_to_hold():
    found = find_tolerance("psnr=28, st_lpips=0.1")
    assert str(found) == "psnr=28, st_lpips=0.1: psnr at least 28, st_lpips at most 0.1, against all tokens"
    for psnr, distance, holds in ((28, 0.1, True), (27.9, 0.1, False), (40, 0.11, False), (None, 0.0, False)):
        assert found.holds({"psnr_to_dense": psnr, "st_lpips_to_dense": distance}) is holds


@pytest.mark.parametrize(
    ("text", "says"),
    {
        "close": "tolerance is 'close': write it as psnr=28,st_lpips=0.1, or choose same-picture or same-content.",
        "psnr=x": "write it as psnr=28",
        "psnrr=3": "metric is 'psnrr': choose from psnr",
        "clip_i=0.9": "The metric clip_i needs a model",
        "psnr=nan": "tolerance is 'psnr=nan': pass numbers.",
    }.items(),
)
def test_a_tolerance_that_is_none(text, says):
    with pytest.raises(ValueError) as raised:
        find_tolerance(text)
    assert says in str(raised.value)
