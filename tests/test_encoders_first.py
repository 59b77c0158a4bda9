"""With all that encoders make on disk, they are let go before the transformer is loaded, and nothing else changes."""

import contextlib
import gc
import json
import weakref

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from diffusers import Flux2KleinPipeline
from test_finetune import example
from tiny import build_flux2, picture

from sparse_context.families import find_host
from sparse_context.training import RunConfig, TrainConfig
from sparse_context.training.batch import encode, prepare_batch, text_encoders
from sparse_context.training.cache import Cache
from sparse_context.training.dropping import Dropping
from sparse_context.training.encoders import Prompts
from sparse_context.training.launch import launch as train
from sparse_context.training.validation import draw_validation


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(3):
        picture(64, 64, i).save(folder / f"{i}.png")
    rows = [{"references": [f"{i}.png", "0.png"], "image": f"{2 - i}.png", "prompt": f"the cat {i}"} for i in range(3)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "data.jsonl"


@pytest.fixture
def loaded(monkeypatch):
    """What each load of a run leaves out, and whether text encoders of the one before were still there."""
    seen, before = [], []

    def load(spec, leave_out=()):
        gc.collect()
        seen.append((leave_out, any(encoder() is not None for encoder in before)))
        pipe = launch_module.load_pipeline(spec, leave_out)
        if pipe.text_encoder is not None:
            before.append(weakref.ref(pipe.text_encoder))
        return pipe

    import sparse_context.training.launch as launch_module

    monkeypatch.setattr(launch_module, "load_pipeline", launch_module.load, raising=False)
    monkeypatch.setattr(launch_module, "load", load)
    return seen


def run(model, data, folder, steps=3, caches=True, resume=None, **settings):
    AcceleratorState._reset_state(reset_partial_state=True)
    dropping = Dropping(overview_factors=(2,))
    config = TrainConfig(rank=2, dropping=dropping, max_train_steps=steps, caption_dropout=0.4, **settings)
    return train(
        str(model),
        str(data),
        folder,
        config,
        RunConfig(
            resolution=64,
            dtype="float32",
            mixed_precision="no",
            validation_data=str(data),
            num_validation_images=1,
            cache_latents=caches,
            cache_text=caches,
        ),
        resume=resume,
    )


def test_a_run_whose_encoders_went_first_is_that_with_them(tiny_model, data, loaded, tmp_path):
    plain = run(tiny_model, data, tmp_path / "plain", caches=False)
    assert loaded == [((), False)]
    loaded.clear()
    cached = run(tiny_model, data, tmp_path / "cached")
    assert loaded == [(("transformer",), False), (("text_encoder", "text_encoder_2"), False)]
    assert plain.read_bytes() == cached.read_bytes()
    sheets = [tmp_path / name / "validation" / "step-0000003.webp" for name in ("plain", "cached")]
    assert sheets[0].read_bytes() == sheets[1].read_bytes()
    files = [len(list((tmp_path / "cached" / "cache" / kind).rglob("*.safetensors"))) for kind in ("latents", "text")]
    assert files == [6, 4]  # three images, each with its overview; three prompts and the empty one
    # A file that goes missing meanwhile is one sentence, and resuming makes it again
    for file in (tmp_path / "cached" / "cache" / "text").rglob("*.safetensors"):
        file.unlink()
    again = run(tiny_model, data, tmp_path / "cached", steps=4, resume="latest")
    assert again is not None and list((tmp_path / "cached" / "cache" / "text").rglob("*.safetensors"))


def test_prompts_of_guidance_are_remembered_too(tiny_model, tmp_path):
    pipe = build_flux2(Flux2KleinPipeline)
    pipe.register_to_config(_name_or_path=str(tiny_model))  # by which its call settings are found
    host = find_host(pipe, {})
    shown, config = [example(5)], TrainConfig()
    sheet = draw_validation(host, shown, config)
    transformer, pipe.transformer = pipe.transformer, None
    prompts = Prompts()
    prompts.remember(pipe, shown, contextlib.nullcontext)
    assert pipe.transformer is None and len(prompts) == 2
    texts = Cache(tmp_path, text_encoders(pipe))
    pipe.transformer, pipe.text_encoder = transformer, None
    prompts.recall(pipe)
    assert np.array_equal(draw_validation(host, shown, config), sheet)
    with pytest.raises(ValueError, match="prompt was not encoded before the run, and its text encoder is not loaded"):
        draw_validation(host, [example(5, prompt="another")], config)
    with pytest.raises(OSError, match="A file of the cache of texts is gone or damaged, and its encoder is not loaded"):
        encode(host, prepare_batch(host, shown, ["the cat"]), text_cache=texts)
