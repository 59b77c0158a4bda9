"""Families under the trainer: what a host gives the transformer is what its pipeline gives it, and a step trains it."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import picture
from whole import save_whole

from sparse_context import SparseContextConfig
from sparse_context.families import FAMILIES, find_host
from sparse_context.overview import LAYOUTS
from sparse_context.pipelines.engine import Engine
from sparse_context.pipelines.load import load
from sparse_context.pipelines.settings import call_settings
from sparse_context.pipelines.spec import ModelSpec, Request
from sparse_context.tokens import ReferenceTokens
from sparse_context.training.batch import TokenSet, encode, kept_tokens, prepare_batch
from sparse_context.training.card import LORA_FILE
from sparse_context.training.config import TrainConfig
from sparse_context.training.data import Example
from sparse_context.training.finetune import Run, finetune
from sparse_context.training.loss import flow_matching_loss

REFERENCES = {"FluxKontextPipeline": 1, "QwenImageEditPlusPipeline": 2, "Flux3ModularPipeline": 2}
PICTURES = [picture(128, 64, 1), picture(64, 80, 2)]


@pytest.fixture(scope="module", params=REFERENCES)
def model(request, tmp_path_factory):
    """(class, folder) of a tiny whole model."""
    return request.param, save_whole(request.param, tmp_path_factory.mktemp(request.param) / "model")


def loaded(folder):
    pipe = load(ModelSpec(str(folder), dtype="float32", device="cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def host_of(pipe, kv=False):
    return find_host(pipe, call_settings(pipe), kv)


def example(count):
    return Example("the cat", tuple(PICTURES[:count]), picture(64, 64, 3), (None,) * count)


def test_a_subclass_is_trained_as_what_it_inherits_from(model):
    pipe = loaded(model[1])
    kind = type(host_of(pipe))
    pipe.__class__ = type("Own", (type(pipe),), {})
    assert type(host_of(pipe)) is kind


def test_every_new_host_is_tried():
    assert set(REFERENCES) == {name for name, family in FAMILIES.items() if family.host and family.host != "Flux2"}


def predictions(pipe, count, keep, **changes):
    """(arguments, output) of each forward of the transformer in a short call, and what the call made."""
    seen = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs, out[0])), with_kwargs=True
    )
    # The strength that Kontext was distilled with is an input of its transformer
    guidance = None if type(pipe).__name__ == "FluxKontextPipeline" else 1.0
    config = SparseContextConfig(keep=keep, **changes)
    made = Engine(pipe=pipe)(Request("the cat", PICTURES[:count], config, steps=1, guidance_scale=guidance))
    hook.remove()
    return seen, made


@contextmanager
def arguments(pipe):
    """A dict that takes the keyword arguments of the transformer's forward within the `with` block."""
    given = {}
    hook = pipe.transformer.register_forward_hook(lambda m, a, kwargs, out: given.update(kwargs), with_kwargs=True)
    yield given
    hook.remove()


def different(given, expected):
    """Names of the tensors of one shape in both (Qwen's trainer pads texts) of which not every number is equal."""
    pairs = {name: (given[name], expected.get(name)) for name in given}
    shared = {
        name: pair
        for name, pair in pairs.items()
        if all(isinstance(some, torch.Tensor) for some in pair) and pair[0].shape == pair[1].shape
    }
    assert {"hidden_states", "timestep"} <= {*shared}
    return [name for name, pair in shared.items() if not torch.equal(*pair)]


@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_a_host_predicts_what_its_pipeline_predicts(model, keep):
    """The same noisy tokens, noise level, prompt and references: the same velocity, dense and with dropped tokens."""
    name, folder = model
    pipe = loaded(folder)
    pictures = PICTURES[: REFERENCES[name]]
    [(kwargs, predicted)], made = predictions(pipe, REFERENCES[name], keep)
    host = host_of(pipe)
    rows, columns = made.image.height // host.token, made.image.width // host.token
    given = kwargs["hidden_states"][:, : rows * columns]
    noisy = host.target_tokens(given.transpose(1, 2).reshape(1, -1, rows, columns))
    assert torch.equal(noisy.latents, given)
    references = host.reference_tokens([host.encode_pictures(host.pixels(one)) for one in pictures])
    assert len(references) == made.selection.total
    text = host.encode_text(["the cat"], [pictures])
    with torch.no_grad(), arguments(pipe) as given:
        velocity = host.velocity(noisy, kwargs["timestep"], text, references.keep(made.selection.index))
    assert not different(given, kwargs)
    assert (velocity - predicted[:, : rows * columns]).abs().max() < 1e-5


SEEN = {
    "FluxKontextPipeline": lambda seen: [seen["hidden_states"], seen["img_ids"]],
    "QwenImageEditPlusPipeline": lambda seen: [
        seen["hidden_states"],
        seen["img_shapes"][0].rows,
        torch.tensor([*seen["img_shapes"][0], *seen["img_shapes"][0].whole]),
    ],
    "Flux3ModularPipeline": lambda seen: [seen["image_cond_hidden_states"], seen["image_cond_ids"]],
}
"""The references' tokens and their places, of the arguments of a transformer's forward."""


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_host_makes_the_overviews_that_its_pipeline_makes(model, layout, factor):
    """The transformer gets the same tokens and position ids, bit by bit, from the trainer and from a call."""
    name, folder = model
    pipe, count = loaded(folder), REFERENCES[name]
    [(seen, predicted)], made = predictions(pipe, count, 0.4, overview=factor, overview_layout=layout)
    assert list(made.selection.overviews) == [*range(count)]
    host = host_of(pipe)
    batch = prepare_batch(host, [replace(example(count), image=made.image)], ["the cat"])
    encoded = encode(host, batch, overviews=[(i, factor) for i in range(count)])
    kept = kept_tokens(host, encoded, TokenSet.of(made.selection))
    assert len(kept) == made.selection.kept
    noisy = host.target_tokens(encoded.target)
    noisy = ReferenceTokens(seen["hidden_states"][:, : len(noisy)], noisy.ids)
    with torch.no_grad(), arguments(pipe) as given:
        velocity = host.velocity(noisy, seen["timestep"], encoded.text, kept)
    assert all(map(torch.equal, SEEN[name](given), SEEN[name](seen)))
    assert not different(given, seen)
    assert (velocity - predicted[:, : len(noisy)]).abs().max() < 1e-5


def test_pixels_and_a_call_of_the_pipeline_do_not_disturb_each_other(model):
    """They are asked by a thread ahead of the steps, while validation may call the same pipeline."""
    name, folder = model
    host = host_of(loaded(folder))
    pixels, image = host.pixels(PICTURES[1]), predictions(host.pipe, REFERENCES[name], 0.5)[1].image
    during = []
    processor, preprocess = type(host.pipe.image_processor), type(host.pipe.image_processor).preprocess

    def disturbed(self, *args, **kwargs):
        if not during:
            during.append(None)  # the thread's own pixels come by here too
            with ThreadPoolExecutor(1) as pool:
                during[0] = pool.submit(host.pixels, PICTURES[1]).result()
        return preprocess(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "preprocess", disturbed)
        disturbed_image = predictions(host.pipe, REFERENCES[name], 0.5)[1].image
    assert torch.equal(during[0], pixels)
    assert np.array_equal(disturbed_image, image)


def test_references_change_the_loss_and_gradients_reach_the_weights(model):
    name, folder = model
    host = host_of(loaded(folder))
    host.transformer.requires_grad_(True)
    count = REFERENCES[name]
    encoded = encode(host, prepare_batch(host, [example(count)], ["the cat"]))
    total = len(host.reference_tokens(encoded.references))
    noise = torch.randn(encoded.target.shape, generator=torch.Generator().manual_seed(0))
    losses = [
        flow_matching_loss(host, encoded, np.arange(0, total, step), torch.tensor([0.5]), noise) for step in (1, 3)
    ]
    assert losses[0] != losses[1]
    losses[1].backward()
    assert all(torch.isfinite(p.grad).all() for p in host.transformer.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in host.transformer.parameters())


def test_a_step_trains_an_adapter_that_plain_diffusers_loads(model, monkeypatch, tmp_path):
    name, folder = model
    host = host_of(loaded(folder))
    config = TrainConfig(max_train_steps=1, learning_rate=0.5, lr_warmup_steps=0, distillation=0.5)
    batch = [example(REFERENCES[name])]
    result = finetune(host, lambda number: batch, Run(tmp_path / "run", str(folder), "made here"), config)
    assert result.name == LORA_FILE
    host.transformer.eval()
    count = REFERENCES[name]
    [(_, trained)], _ = predictions(host.pipe, count, 0.3)
    fresh = loaded(folder)
    [(_, before)], _ = predictions(fresh, count, 0.3)
    fresh.load_lora_weights(str(result.parent), weight_name=LORA_FILE, use_safetensors=True)
    [(_, after)], _ = predictions(fresh, count, 0.3)
    assert (after - before).abs().max() > 1e-3
    assert (after - trained).abs().max() < 1e-5
    # The code of the model card loads it too
    monkeypatch.chdir(result.parent)
    code = Path("README.md").read_text().split("```python")[1].split("```")[0].replace("path/to/model", str(folder))
    names: dict = {}
    exec(code, names)
    assert type(names["pipe"]).__name__ == name and names["pipe"].transformer.peft_config


def test_the_card_of_a_full_fine_tuning_loads_the_transformer_of_its_family(model, monkeypatch, tmp_path):
    name, folder = model
    host = host_of(loaded(folder))
    config = TrainConfig(full=True, max_train_steps=1, learning_rate=0.5, lr_warmup_steps=0)
    batch = [example(REFERENCES[name])]
    finetune(host, lambda number: batch, Run(tmp_path / "run", str(folder), "made here"), config)
    monkeypatch.chdir(tmp_path / "run")
    code = Path("README.md").read_text().split("```python")[1].split("```")[0].replace("path/to/model", str(folder))
    names: dict = {}
    exec(code, names)
    fresh = names["pipe"].transformer.state_dict()
    for key, weight in host.transformer.state_dict().items():
        assert torch.equal(weight.to(fresh[key].dtype), fresh[key]), key


def test_a_host_says_what_it_cannot_do(model):
    name, folder = model
    pipe = loaded(folder)
    with pytest.raises(ValueError, match=f"KV mode is for FLUX.2 klein: {name} has no pipeline that runs it.$"):
        host_of(pipe, kv=True)
    if name == "FluxKontextPipeline":
        host = host_of(pipe)
        latents = host.encode_pictures(host.pixels(Image.new("RGB", (64, 64))))
        with pytest.raises(ValueError, match="takes one reference, and a sample has 2: give each one.$"):
            host.reference_tokens([latents, latents])
