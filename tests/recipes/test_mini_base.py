"""The base: its batches, its run, and what is exported of it."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file as save_torch
from tiny_scenes import make_tiny_vae, save_assets
from transformers import Qwen2Tokenizer
from typer.testing import CliRunner

from recipes.mini import base
from recipes.mini import export as exporting
from recipes.mini.__main__ import app
from recipes.mini.base import BaseConfig, batch_number, batch_scenes, restore, train_base
from recipes.mini.data import (
    Assets,
)
from recipes.mini.export import export
from recipes.mini.scenes import make_scene
from sparse_context.embedded.demo import read_examples
from sparse_context.pipelines.embedded import ADAPTERS, OVERVIEW, WEIGHTS, read_call_settings
from sparse_context.training.cache import fingerprint
from sparse_context.training.checkpoints import load_average


def read_sheet(folder):
    with Image.open(folder / "sheet-0000002.png") as file:
        return np.asarray(file)


def test_repeated_batches_come_in_turns():
    assert [batch_number(step, 1) for step in range(5)] == [0, 1, 2, 3, 4]
    assert [batch_number(step, 2) for step in range(10)] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="repeats is 0: pass a whole number, 1 or more"):
        BaseConfig(repeats=0)


def test_the_references_of_a_batch_have_one_shape_and_batches_cost_the_same(assets):
    config = BaseConfig(steps=100, alone_until=0.2, small_until=0.5)
    seen = []
    for step in range(100):
        scenes = batch_scenes(assets, config, step)
        (shape,) = {tuple(r.shape for r in scene.references) for scene in scenes}
        tokens = 32 + 256 + sum(rows * columns // 64 for rows, columns, _ in shape)
        assert len(scenes) == max(4, round(16 * 544 / tokens))
        seen.append(({scene.task for scene in scenes}, len(shape), max(rows for rows, _, _ in shape)))
    assert {count for _, count, _ in seen[:20]} == {1} and {1, 2, 4} <= {count for _, count, _ in seen[20:]}
    assert {side for _, _, side in seen[:50]} == {128} and {side for _, _, side in seen[50:]} == {96, 128, 192}
    assert all({"edit_background", "subject_place"} & tasks for tasks, count, side in seen if (count, side) == (1, 128))
    assert all(len(tasks) == 1 for tasks, count, _ in seen if count > 1)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_batch_that_is_repeated_is_composed_once(assets, tiny_parts, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "TASKS", ("edit_background",))  # of the tokenizer's prompts
    save_assets(assets, tmp_path)
    make_tiny_vae().save_pretrained(tmp_path / "vae" / "final")
    composed, noises, shares = [], [], set()
    make, draw = base.make_batch, base.flow_matching_loss

    def noted(*given):
        composed.append(given[-1])
        shares.add(given[1].steps)
        return make(*given)

    def drawn(transformer, text, target, references, generator, *rest):
        noises.append((target.flatten()[0].item(), generator.initial_seed()))
        return draw(transformer, text, target, references, generator, *rest)

    monkeypatch.setattr(base, "make_batch", noted)
    monkeypatch.setattr(base, "flow_matching_loss", drawn)
    train_base(tmp_path, BaseConfig(steps=6, batch=1, repeats=2), show_every=0)
    assert shares == {3}  # of the batches, as many as are composed
    assert composed[:4] == [0, 1, 2, 3] and len(composed) <= 5  # one may be made ahead
    pictures, seeds = zip(*noises, strict=True)
    assert pictures[4:] == pictures[:2] and len(set(pictures)) == 4 and len(set(seeds)) == 6


def test_what_is_shipped_can_be_trained_further(pipe, tmp_path):
    restore(WEIGHTS, tmp_path)
    parts = torch.nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    before = {name: weight.clone() for name, weight in parts.state_dict().items()}
    assert load_average(tmp_path / "base", parts) == 0
    assert all(torch.equal(weight, before[name]) for name, weight in parts.state_dict().items())
    assert (tmp_path / "vae" / "final").is_dir() and Qwen2Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tokenizer", "vae"]  # and no half of one
    assert json.loads((tmp_path / "base" / "before.json").read_text()) == json.loads(
        (WEIGHTS / "call.json").read_text()
    )
    with pytest.raises(FileExistsError, match="is there already: move it away"):
        restore(WEIGHTS, tmp_path)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_recipe_as_commands_ends_at_the_same_model_however_often_it_is_stopped(
    assets, tiny_parts, few_latents, tmp_path, monkeypatch
):
    monkeypatch.setattr(base, "TASKS", ("edit_background",))  # of the sheets, and of the tokenizer's prompts
    monkeypatch.setattr(exporting, "EXAMPLES", {"one": ("edit_background", 6)})
    three = Assets(
        assets.objects,
        np.concatenate([assets.photos, assets.photos[:1]]),
        assets.object_names,
        assets.object_split,
        np.array([0, 1, 2]),
    )

    def run(folder, *arguments):
        done = CliRunner().invoke(app, [*map(str, arguments), "--folder", str(folder)], catch_exceptions=False)
        assert done.exit_code == 0, done.output

    made = []
    for name, stops in (("whole", [()]), ("stopped", [("--stop-after", 0)] * 2)):
        folder = tmp_path / name
        folder.mkdir()
        save_assets(three, folder)
        for step, batch in (("vae", 2), ("base", 1), ("decoder", 2)):
            for stop in stops:
                run(folder, step, "--steps", 2, "--batch", batch, *stop)
            assert (folder / step / "sheet-0000002.png").is_file()
        run(folder, "export", "--destination", folder / "weights")
        run(folder, "examples", "--destination", folder / "examples")
        assert not [*folder.rglob("*.partial"), *folder.rglob("*.old")]
        assert read_examples(folder / "examples")[0]["truth"].size == (128, 128)
        files = (folder / "weights").rglob("*.safetensors")
        made.append({file.relative_to(folder): file.read_bytes() for file in files})
    assert len(made[0]) == 3 and made[0] == made[1]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_base_from_nothing_leaves_its_sample_sheet_and_a_whole_tokenizer(assets, tiny_parts, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "TASKS", ("edit_background",))  # of the sheet, and of the tokenizer's prompts
    save_assets(assets, tmp_path)
    make_tiny_vae().save_pretrained(tmp_path / "vae" / "final")
    (tmp_path / "tokenizer.partial").mkdir()
    (tmp_path / "tokenizer.partial" / "half").touch()  # what a kill left
    train_base(tmp_path, BaseConfig(steps=2, batch=1))
    sheet = read_sheet(tmp_path / "base")
    assert sheet.shape == (128, 2 * 3 * 128, 3)  # two scenes: reference, truth and output
    for left, seed in ((0, 100), (3 * 128, 101)):
        scene = make_scene(assets.split("validation"), "edit_background", seed)
        assert np.array_equal(sheet[:, left : left + 256], np.hstack([scene.references[0], scene.target]))
    assert Qwen2Tokenizer.from_pretrained(tmp_path / "tokenizer").chat_template
    assert not (tmp_path / "tokenizer" / "half").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_restored_base_trains_and_is_exported_without_the_adapter_of_the_old_one(assets, pipe, tmp_path):
    save_assets(assets, tmp_path)
    restore(WEIGHTS, tmp_path)
    weights = tmp_path / "weights"
    weights.mkdir()
    about = {"base_weights": fingerprint(pipe.transformer)}
    adapters = [*(weights / own.name for own in ADAPTERS.values()), tmp_path / OVERVIEW.name]
    for adapter in adapters:
        save_torch({"weight": torch.ones(1)}, adapter, {"sparse_context": json.dumps(about)})
    export(tmp_path, weights)
    assert all(adapter.is_file() for adapter in adapters)  # these are the weights that they were trained on
    before = read_call_settings(WEIGHTS)["training_steps"]
    assert read_call_settings(weights)["training_steps"] == before
    train_base(tmp_path, BaseConfig(steps=2, batch=1), stop_after=0)  # one step
    record = json.loads((tmp_path / "base" / "config.json").read_text())
    assert (record["seed"], record["alone_until"], record["small_until"]) == (before, 0, 0)
    with pytest.raises(ValueError, match="begun with steps 2, not 3: continue it with its own"):
        train_base(tmp_path, BaseConfig(steps=3, batch=1))
    export(tmp_path, weights)
    assert not any(adapter.exists() for adapter in adapters)
    assert read_call_settings(weights)["training_steps"] == before + 1
    export(tmp_path, tmp_path / "exact", torch.float32)  # for another run to go on from
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "exact").rglob("*.json"))
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.rglob("*.old")]
    restore(tmp_path / "exact", tmp_path / "next")
    modules = torch.nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    parts = [copy.deepcopy(modules), copy.deepcopy(modules)]
    for part, folder in zip(parts, (tmp_path, tmp_path / "next"), strict=True):
        load_average(folder / "base", part)
    trained, gone_on = (part.state_dict() for part in parts)
    assert all(torch.equal(weight, gone_on[name]) for name, weight in trained.items())
    assert not all(torch.equal(weight, weight.bfloat16().float()) for weight in trained.values())
