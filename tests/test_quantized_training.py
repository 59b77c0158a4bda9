"""LoRA on quantised weights: it learns what it learns on plain ones, and a killed run ends exactly."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_finetune import batches, example
from tiny import CASES

from sparse_context.families import find_host
from sparse_context.pipelines import ModelSpec
from sparse_context.pipelines.load import load
from sparse_context.pipelines.quantization import SKIPPED, Nf4OnCpu
from sparse_context.training import RunConfig
from sparse_context.training.cache import fingerprint
from sparse_context.training.config import TrainConfig
from sparse_context.training.finetune import Run, Watch, finetune
from sparse_context.training.launch import check_base
from sparse_context.training.loss import FlowMatching
from sparse_context.training.trainable import prepare
from sparse_context.training.validation import draw_validation, evaluating

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
SETTINGS = {"rank": 32, "lora_alpha": 32, "learning_rate": 1e-3, "max_train_steps": 4, "checkpointing_steps": 2}

pytestmark = pytest.mark.filterwarnings("default")  # of what the packages import


def host(folder, quantization=None):
    if quantization is not None:
        pytest.importorskip(PACKAGES[quantization])
    pipe = load(ModelSpec(str(folder), dtype="float32", device="cpu", quantization=quantization))
    return find_host(pipe, {"max_sequence_length": 12, "text_encoder_out_layers": [1, 2]})


def killed_at(step):
    def give(number):
        if number >= step:
            raise KeyboardInterrupt
        return batches(number)

    return give


@pytest.mark.parametrize(("quantization", "eight_bit"), [("int8", False), ("nf4", False), ("nf4", True)])
def test_a_killed_run_on_quantised_weights_ends_exactly(quantization, eight_bit, tiny_model, tmp_path):
    config = TrainConfig(**SETTINGS, ema=0.5, use_8bit_adam=eight_bit, validation_steps=2)
    watch = Watch(validation=[example(5)])

    def run(name, give, resume=False):
        said = Run(tmp_path / name, "tiny", "x", {"quantization": quantization}, resume)
        return finetune(host(tiny_model, quantization), give, said, config, watch=watch)

    whole = run("whole", batches)
    with pytest.raises(KeyboardInterrupt):
        run("cut", killed_at(3))
    resumed = run("cut", batches, resume=True)
    assert whole.read_bytes() == resumed.read_bytes()
    for name in ("weights", "average", "optimiser"):
        file = f"step-0000004/{name}.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), name
    assert f"| frozen weights | {quantization} |" in (tmp_path / "whole" / "README.md").read_text()
    state = load_file(tmp_path / "whole" / "step-0000004" / "optimiser.safetensors")
    kinds = {value.dtype for name, value in state.items() if "state1" in name or "exp_avg" in name}
    assert kinds == ({torch.uint8, torch.float32} if eight_bit else {torch.float32})


@pytest.fixture(scope="module")
def plain_losses(tiny_model):
    return losses(host(tiny_model))


def losses(trainer, after_validation=False):
    """Of eight steps on one batch, after which every weight of the LoRA has a gradient."""
    config = TrainConfig(**SETTINGS)
    trained = prepare(trainer, config)
    loss = FlowMatching(trainer, lambda number: batches(0), config)
    optimiser = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    values = []
    for step in range(8):
        if after_validation and step == 1:
            with evaluating(trainer.transformer):
                draw_validation(trainer, [example(5)], config)
        value = loss(0)
        value.backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained.parameters())
        optimiser.step()
        optimiser.zero_grad()
        values.append(value.item())
    assert any(weight.abs().sum() > 0 for name, weight in trained.named_parameters() if "lora_B" in name)
    return values


@pytest.mark.parametrize("quantization", PACKAGES)
def test_the_loss_falls_as_on_plain_weights_also_after_a_validation_picture(quantization, tiny_model, plain_losses):
    values = losses(host(tiny_model, quantization), after_validation=True)
    assert plain_losses[-1] < 0.97 * plain_losses[0]
    assert abs(values[0] / plain_losses[0] - 1) < 0.03  # what the stored weights are off
    assert np.allclose(np.divide(values, values[0]), np.divide(plain_losses, plain_losses[0]), rtol=0.02)


@pytest.mark.parametrize("quantization", PACKAGES)
def test_quantised_weights_have_a_fingerprint_of_their_own(quantization, tiny_model):
    first, again, plain = (
        fingerprint(host(tiny_model, name).transformer) for name in (quantization, quantization, None)
    )
    assert first == again != plain


def test_what_asks_for_the_type_of_its_weights_stays_as_it_is():
    """FLUX.3's embedders of time would take integers for a type to compute in."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    transformer = CASES["flux3"].build().transformer
    Nf4OnCpu(torch.float32).place(transformer)
    placed = {name for name, layer in transformer.named_modules() if isinstance(layer, Linear4bit)}
    plain = {name for name, layer in transformer.named_modules() if type(layer) is torch.nn.Linear}
    assert placed and plain and all(set(SKIPPED) & set(name.split(".")) for name in plain)
    assert transformer.dtype == torch.float32


def test_what_does_not_go_together_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="quantization is 'int4': choose int8 or nf4"):
        RunConfig(quantization="int4")
    with pytest.raises(ValueError, match="full trains all weights, and quantization=int8 stores them in too few bits"):
        check_base(TrainConfig(full=True), RunConfig(quantization="int8"))
    with pytest.raises(ValueError, match="compile is True and quantization is 'nf4', which are not compiled here"):
        check_base(TrainConfig(compile=True), RunConfig(quantization="nf4"))
    monkeypatch.setattr("importlib.util.find_spec", lambda asked: None)
    with pytest.raises(ValueError, match="use_8bit_adam is True, which needs bitsandbytes: pip install"):
        check_base(TrainConfig(use_8bit_adam=True), RunConfig())
