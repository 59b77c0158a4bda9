"""What a step of training takes, from shapes alone: held to what tensors take in one."""

from dataclasses import replace

import pytest
import torch
from test_finetune import SMALL
from test_predict import Real
from tiny import CASES

from sparse_context.families import find_host
from sparse_context.pipelines.predict import Parts, parts_of
from sparse_context.training.config import TrainConfig
from sparse_context.training.predict import Plan, StepPredictor, StepPrediction, fits, settings_that_fit
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
