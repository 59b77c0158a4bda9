"""The embedded model's sparse fine-tuning: what its scenes become, and one resumed run on the shipped weights."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch
from tiny_scenes import save_assets
from typer.testing import CliRunner

from recipes.mini.__main__ import app
from recipes.mini.data import Assets
from recipes.mini.scenes import TASKS, make_scene
from recipes.mini.sparse import (
    FULL,
    FULL_KV,
    KV,
    LORA,
    choose,
    export_adapter,
    scene_batches,
    start_adapter,
    to_example,
    train_sparse,
)
from sparse_context.pipelines.embedded import ADAPTERS, WEIGHTS, adapter_record
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.training.checkpoints import newest_step


@pytest.fixture(autouse=True)
def no_accelerator_yet():
    """One process has one `Accelerator` state; a command has a process of its own, and these tests share one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def assets():
    """Six discs and four photographs, in all splits."""
    y, x = np.mgrid[:128, :128] - 63.5
    rng = np.random.default_rng(0)
    objects = np.zeros((6, 128, 128, 4), np.uint8)
    for rgba in objects:
        rgba[np.hypot(x, y) < 60] = [*rng.integers(0, 256, 3), 255]
    photos = rng.integers(0, 256, (4, 288, 288, 3), dtype=np.uint8)
    split = np.array([0, 0, 1, 1, 2, 2])
    return Assets(objects, photos, [f"disc {i}" for i in range(6)], split, np.array([0, 0, 1, 2]))


@pytest.mark.parametrize("task", TASKS)
def test_a_scene_becomes_an_example_with_its_masks(assets, task):
    scene = make_scene(assets.split("train"), task, 3)
    example = to_example(scene)
    assert np.array_equal(example.image, scene.target) and example.prompt == scene.prompt
    assert np.array_equal(example.source, scene.source)
    assert all(np.array_equal(a, b) for a, b in zip(example.references, scene.references, strict=True))
    assert [m.size for m in example.masks] == [r.size for r in example.references]
    assert all(
        np.abs(np.asarray(a) / 255 - b).max() < 0.01 for a, b in zip(example.masks, scene.reference_masks, strict=True)
    )
    if scene.focus.any():
        assert np.abs(np.asarray(example.mask) / 255 - scene.mask).max() < 0.01
    else:
        assert example.mask is None and task == "edit_global"


def test_batches_follow_from_their_number_and_share_shapes(assets):
    train = assets.split("train")
    for number in range(6):
        batch, again = (scene_batches(train, 4, 0)(number) for _ in range(2))
        assert [e.prompt for e in batch] == [e.prompt for e in again]
        assert len({tuple(r.size for r in e.references) for e in batch}) == 1
    assert [e.prompt for e in scene_batches(train, 4, 1)(0)] != [e.prompt for e in scene_batches(train, 4, 0)(0)]


def test_the_experiments_vary_what_they_name():
    assert choose() == LORA
    assert choose(kv=True) == KV
    with pytest.raises(ValueError, match="learning_rate is 0.0"):
        choose(rate=0.0)
    assert choose(rate=0.5) == replace(LORA, learning_rate=0.5 * LORA.learning_rate)
    assert choose(full=True, rate=2.0) == replace(
        FULL, learning_rate=2 * FULL.learning_rate, muon_learning_rate=2 * FULL.muon_learning_rate
    )
    assert choose(mix={"random": 1.0}) == replace(LORA, dropping=replace(LORA.dropping, mix={"random": 1.0}))
    assert choose(distillation=0.0).distillation == choose(preservation=0.0).preservation == 0
    assert choose(kv=True, merge=[0.0]).dropping.merge == (0.0,) and choose(full=True) == FULL
    control = choose(dense=True)
    assert (control.distillation, control.preservation, control.subsets, control.dropping.dense) == (0, 0, 1, 1)
    changed = choose(
        full=True,
        kv=True,
        steps=7,
        rank=8,
        rate=0.1,
        mix={"random": 1.0},
        coverage=[0.3],
        dense=True,
        seed=5,
        merge=[0.4],
        unseen=0.9,
    )
    assert (changed.full, changed.kv, changed.max_train_steps, changed.rank, changed.seed) == (True, True, 7, 8, 5)
    assert (changed.unseen, choose(full=True).unseen) == (0.9, FULL.unseen)
    assert changed.dropping == replace(FULL_KV.dropping, mix={"random": 1.0}, coverage=(0.3,), merge=(0.4,), dense=1.0)


# Under autocast torch says once that RMS norm, whose weights stay float32, is not fused
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_embedded_model_trains_and_continues(assets, tmp_path):
    save_assets(assets, tmp_path)
    torch.set_num_threads(1)
    for steps in (1, 2):
        config = choose(steps=steps, rank=2)
        result = train_sparse(tmp_path, config, batch=1, validation=())
    assert result.is_file()
    own = export_adapter(tmp_path / "sparse", tmp_path)
    assert own.parent == tmp_path and own.name == ADAPTERS["plain"].name and not list(tmp_path.glob("*.partial"))
    about = adapter_record(result)
    assert adapter_record(own) == about | {"scale": 1.0} and about["steps"] == 2
    narrow, wide = load_file(own), load_file(result)
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)
    start_adapter(tmp_path / "again", own, config)
    begun = load_file(tmp_path / "again" / "step-0000000" / "average.safetensors")
    assert len(begun) == len(narrow) and newest_step(tmp_path / "again") == 0
    for name, tensor in begun.items():
        assert torch.equal(tensor, narrow["transformer." + name.replace("/", ".").replace(".default", "")].float())
    resumed = train_sparse(
        tmp_path, replace(config, max_train_steps=1, learning_rate=1e-9), name="again", batch=1, validation=()
    )
    assert all(torch.allclose(tensor, narrow[name].float(), atol=1e-6) for name, tensor in load_file(resumed).items())
    with pytest.raises(ValueError, match="adapts other layers than a LoRA of rank 3 on this model does"):
        start_adapter(tmp_path / "other", own, replace(config, rank=3))
    with pytest.raises(ValueError, match="differ in whether they are for KV mode"):
        start_adapter(tmp_path / "other", own, replace(config, kv=True))
    with pytest.raises(ValueError, match="again holds a run at step 1: name another folder"):
        start_adapter(tmp_path / "again", own, config)
    assert not (tmp_path / "other").exists()
    export_adapter(tmp_path / "sparse", tmp_path, scale=0.5)
    half = load_file(own)
    assert sum(".lora_B." in name for name in wide) == len(wide) / 2
    assert all(torch.equal(half[name], narrow[name] * (0.5 if ".lora_B." in name else 1)) for name in wide)
    assert adapter_record(own)["scale"] == 0.5
    with pytest.raises(ValueError, match="scale is 0"):
        export_adapter(tmp_path / "sparse", tmp_path, scale=0)
    before = own.read_bytes()
    save_torch(wide, result, {"sparse_context": json.dumps(about | {"kv": True})})
    kv = export_adapter(tmp_path / "sparse", tmp_path)
    assert kv.name == ADAPTERS["kv"].name and adapter_record(kv)["kv"] and own.read_bytes() == before
    save_torch(wide, result, {"sparse_context": json.dumps(about | {"base_weights": "another"})})
    with pytest.raises(ValueError, match="began from other weights than the package holds"):
        export_adapter(tmp_path / "sparse", tmp_path)
    assert own.read_bytes() == before
    assert sorted(p.name for p in result.parent.glob("step-*")) == ["step-0000001", "step-0000002"]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_run_of_all_weights_is_exported_as_a_lora(assets, tmp_path):
    save_assets(assets, tmp_path)
    torch.set_num_threads(1)
    config = replace(choose(full=True, steps=1), gradient_accumulation_steps=1, subsets=1)
    tuned = train_sparse(tmp_path, config, name="all", batch=1, validation=())
    own = export_adapter(tmp_path / "all", tmp_path, rank=8)
    about = adapter_record(own)
    assert (about["rank"], about["steps"], about["kv"], about["distillation"]) == (8, 1, False, 0)
    base, lora = load_file(WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors"), load_file(own)
    changed = load_file(tuned / "diffusion_pytorch_model.safetensors")
    name = "single_transformer_blocks.3.attn.to_out"
    change = changed[f"{name}.weight"] - base[f"{name}.weight"].float()
    made = lora[f"transformer.{name}.lora_B.weight"].float() @ lora[f"transformer.{name}.lora_A.weight"].float()
    assert torch.linalg.matrix_rank(made, rtol=1e-3) == 8
    left = (change - made).square().sum()
    assert left.item() == pytest.approx(torch.linalg.svdvals(change)[8:].square().sum().item(), rel=0.02)
    assert load(ModelSpec(lora=str(own))).transformer.peft_config
    slow = replace(config, learning_rate=1e-9, muon_learning_rate=1e-9)
    on = train_sparse(tmp_path, slow, name="on", batch=1, start=own, validation=())
    begun = load_file(tmp_path / "on" / "step-0000000" / "weights.safetensors")
    assert {key.replace("/", ".") for key in begun} == base.keys()
    assert torch.allclose(begun[f"{name}.weight".replace(".", "/")], base[f"{name}.weight"].float() + made, atol=1e-6)
    moved = load_file(on / "diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(moved[key.replace("/", ".")], tensor, atol=1e-6) for key, tensor in begun.items())
    record = json.loads((on.parent / "config.json").read_text())
    assert record["base_weights"] == about["base_weights"]  # so what it learned is told from the package's base
    assert record["start"] == own.name
    with pytest.raises(ValueError, match=f"start was '{own.name}' and is now None"):
        train_sparse(tmp_path, replace(slow, max_train_steps=2), name="on", batch=1, validation=())


def test_a_run_that_goes_on_takes_no_other_model(tmp_path):
    ran = CliRunner().invoke(app, ["sparse", "--folder", str(tmp_path), "--onward", "--model", str(WEIGHTS)])
    assert isinstance(ran.exception, ValueError)
    assert str(ran.exception) == "A LoRA to start from is of the package's own weights: leave the model out."
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[]", "not JSON", '"x"'])
def test_a_lora_of_others_has_no_record(tmp_path, text):
    save_torch({"x": torch.zeros(1)}, tmp_path / "lora.safetensors", {"sparse_context": text})
    assert adapter_record(tmp_path / "lora.safetensors") == {}


def test_the_warm_up_fits_into_a_short_run():
    assert choose(full=True, steps=100).lr_warmup_steps == 10
    assert choose(full=True).lr_warmup_steps == FULL.lr_warmup_steps
    assert choose(full=True, kv=True) == FULL_KV
