"""What a step of training takes, from shapes alone: held to what tensors take in one."""

import json
import re

import pytest
import torch
from test_finetune import SMALL
from test_predict import Real
from tiny import CASES, picture

from sparse_context.families import find_host
from sparse_context.families.shape import Tokens
from sparse_context.pipelines.predict import ROOM, parts_of
from sparse_context.training import RunConfig
from sparse_context.training.config import TrainConfig
from sparse_context.training.dropping import Dropping
from sparse_context.training.dry_run import dry_run
from sparse_context.training.predict import Plan, StepPrediction, StepPredictor, settings_that_fit
from sparse_context.training.trainable import prepare

GRIDS, OUTPUT = [(12, 12)], (8, 8)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["klein", "kontext", "qwen-edit-2511"])
def test_memory_of_a_step_is_that_of_its_tensors(name, checkpointing):
    pipe = CASES[name].build()
    config = TrainConfig(**SMALL, gradient_checkpointing=checkpointing)
    parts = parts_of(pipe, text=12)
    step = StepPredictor(parts, type(pipe).__name__, config, Plan(device="cpu"))(GRIDS, 1.0, OUTPUT)
    transformer = pipe.transformer
    prepare(find_host(pipe, {}), config)
    given = parts.shape.kind.arguments(transformer, parts.shape, step.tokens, None)
    with Real() as run:
        loss = transformer(**given, return_dict=False)[0].float().square().mean()
        torch.autograd.backward(loss)
    inputs = sum(value.nbytes for value in given.values() if isinstance(value, torch.Tensor))
    assert step.activations == pytest.approx(run.peak + inputs, rel=0.1)
    trained = [weight for weight in transformer.parameters() if weight.requires_grad]
    assert step.trained == sum(weight.nbytes for weight in trained) and step.optimiser == 2 * step.trained
    frozen = sum(weight.nbytes for weight in transformer.parameters()) - step.trained
    assert step.weights["transformer"] == frozen


def test_what_is_stored_in_fewer_bits_takes_less():
    def weights(**plan):
        parts = parts_of(CASES["klein"].build(), text=12)
        config = TrainConfig(**SMALL, use_8bit_adam="quantization" in plan)
        return StepPredictor(parts, "Flux2KleinPipeline", config, Plan(**plan))(GRIDS, 1.0, OUTPUT).weights

    plain, int8, nf4 = (
        weights(**plan)["transformer"] for plan in ({}, {"quantization": "int8"}, {"quantization": "nf4"})
    )
    assert 3 * int8 < plain and 1.5 * nf4 < int8
    assert set(weights()) == {"transformer", "vae", "text_encoder"}
    assert set(weights(encoders_first=True)) == {"transformer"}
    assert set(weights(encoders_first=True, validates=True)) == {"transformer", "vae"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    picture(64, 64, 0).save(folder / "0.png")
    row = {"references": ["0.png", "0.png"], "image": "0.png", "prompt": "the cat"}
    (folder / "data.jsonl").write_text(json.dumps(row))
    return folder / "data.jsonl"


def predict(model, data, **run):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    config = TrainConfig(rank=2, dropping=Dropping(overview_factors=(4,)), max_train_steps=10)
    return dry_run(
        str(model), str(data), config, RunConfig(resolution=64, dtype="float32", mixed_precision="no", **run)
    )


def test_a_dry_run_says_tokens_memory_and_time(tiny_model, data):
    said = predict(tiny_model, data, cache_latents=True, cache_text=True)
    rows = {line[:16].strip(): line[16:].split() for line in said.splitlines() if " GB " in line[16:]}
    assert [rows[name][:3] for name in ("1", "0.5", "overview by 4")] == [
        ["12", "64", "128"],
        ["12", "64", "64"],
        ["12", "64", "8"],
    ]
    assert re.search(r"Activations with gradient checkpointing: \d", said)
    assert "The encoders come first, alone" in said and "text_encoder" not in said
    assert re.search(r"A batch of 204 tokens was measured: \d+\.\d\d s", said)
    assert re.search(r"Beside weights and LoRA it took \d+\.\d\d GB; \d+\.\d\d GB were computed", said)


def test_what_is_measured_is_the_largest_step_of_the_run(tiny_model, data, monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    config = TrainConfig(rank=2, dropping=Dropping(keep_max=0.5, dense=0.0), max_train_steps=10)
    run = RunConfig(resolution=64, dtype="float32", mixed_precision="no")
    said = dry_run(str(tiny_model), str(data), config, run)
    assert re.search(r"A batch of 140 tokens was measured: \d+\.\d\d s", said)  # 12 + 64 + half of 128


def test_what_cannot_fit_is_refused_with_what_would(tiny_model, data, monkeypatch):
    from sparse_context.training import dry_run as module

    sizes = []

    def free(device):
        return sizes[0]

    def load(*arguments):
        raise AssertionError("it loaded a model")

    monkeypatch.setattr(module, "free_memory", free)
    monkeypatch.setattr("sparse_context.training.launch.load", load)
    sizes.append(1000)
    with pytest.raises(
        ValueError, match=r"The largest step takes 0\.0 GB, and 0\.0 GB are free: no setting makes it fit: pass a"
    ):
        predict(tiny_model, data)
    parts = parts_of(CASES["klein"].build(), text=12)
    config = TrainConfig(rank=2, gradient_checkpointing=True)
    enough = StepPredictor(parts, "Flux2KleinPipeline", config, Plan(device="cpu"))([(8, 8)] * 2, 1.0, (8, 8)).peak
    sizes[0] = int(enough / ROOM) + 1
    with pytest.raises(ValueError, match=r"it fits with --set gradient_checkpointing=true\.$"):
        predict(tiny_model, data)


def test_only_settings_that_are_needed_and_possible_are_advised():
    """The sizes are those of an imagined run: what is asked is which settings are named."""

    def predict(config, plan):
        weights = {None: 100, "int8": 50, "nf4": 25}[plan.quantization] + (0 if plan.encoders_first else 40)
        return StepPrediction(
            Tokens(1, 1, 1), 1, {"transformer": weights}, 0, 0, 10 if config.gradient_checkpointing else 30
        )

    def advise(size, possible=True, **config):
        return settings_that_fit(predict, TrainConfig(**config), Plan(), int(size / ROOM) + 1, possible)

    caches = "cache_latents=true cache_text=true"
    assert advise(150) == ["gradient_checkpointing=true"] and advise(130) == [caches]
    assert advise(55) == [caches, "quantization=nf4"] and advise(35) == [
        "gradient_checkpointing=true",
        caches,
        "quantization=nf4",
    ]
    assert advise(100, possible=False) == ["gradient_checkpointing=true", "quantization=int8"]
    assert advise(60, fsdp=True) is None and advise(150, fsdp=True) == ["gradient_checkpointing=true"]
    assert advise(60, full=True) is None and advise(60, compile=True) is None
