"""What the faces call, from Python: `load` and an `Engine`."""

import http.server
import io
import json
import shutil
import socket
import sys
import threading
import time
from contextlib import contextmanager

import diffusers.utils.logging
import huggingface_hub.hf_api
import numpy as np
import pytest
import tiny
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline
from PIL import Image
from tiny import picture

from sparse_context import SparseContextConfig, last_selection, mask
from sparse_context.pipelines import hub as hub_module
from sparse_context.pipelines import load as load_module
from sparse_context.pipelines.engine import Engine
from sparse_context.pipelines.errors import GenerationError
from sparse_context.pipelines.load import load
from sparse_context.pipelines.settings import call_settings, reference_sides
from sparse_context.pipelines.spec import ModelSpec, Request
from sparse_context.preview import fit_reference, select_pictures
from sparse_context.selectors.registry import blend


@pytest.fixture(scope="module")
def pipe(tiny_model):
    loaded = load(ModelSpec(str(tiny_model), dtype="float32", device="cpu"))
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def foreign():
    """A pipeline built in code: not distilled, no call settings, references as large as they come."""
    return tiny.build_flux2(Flux2KleinPipeline)


CALL = {"max_sequence_length": 12, "text_encoder_out_layers": [1, 2]}


@contextmanager
def settings_of(pipe, folder, **settings):
    """`pipe` as if it had been loaded from a folder with these call settings."""
    before = getattr(pipe.config, "_name_or_path", None)
    (folder / "call.json").write_text(json.dumps(settings))
    pipe.register_to_config(_name_or_path=str(folder))
    try:
        yield pipe
    finally:
        pipe.register_to_config(_name_or_path=before)


# Loading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    {"auto": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp32": torch.float32}.items(),
)
def test_dtype(tiny_model, name, dtype):
    loaded = load(ModelSpec(str(tiny_model), dtype=name, device="cpu"))
    assert type(loaded) is Flux2KleinPipeline
    assert {part.dtype for part in (loaded.transformer, loaded.vae, loaded.text_encoder)} == {dtype}
    assert loaded.device.type == "cpu"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_model_that_loads_for_long_has_a_clock_on_a_terminal(tiny_model, tmp_path, monkeypatch, terminal):
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    plain = load_module._load_plain

    def slow(*arguments):
        time.sleep(0.5)
        return plain(*arguments)

    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(hub_module, "PATIENCE", 0.1)
    monkeypatch.setattr(load_module, "_load_plain", slow)
    enabled = diffusers.utils.logging.is_progress_bar_enabled()
    diffusers.utils.logging.disable_progress_bar()
    try:
        load(ModelSpec(str(tiny_model), device="cpu"))
        said = stderr.getvalue()
        shutil.copy(tiny_model / "model_index.json", tmp_path)
        with pytest.raises(ValueError, match="does not load"):
            load(ModelSpec(str(tmp_path), device="cpu"))
    finally:
        (diffusers.utils.logging.enable_progress_bar if enabled else diffusers.utils.logging.disable_progress_bar)()
    assert (f"loading {tiny_model}: 00:00" in said) == terminal
    assert (f"loading {tmp_path}: 00:00" in stderr.getvalue()) == terminal
    assert said.endswith(" \r") == terminal  # nothing of it stays


def test_call_settings(pipe, foreign, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call_settings(pipe) == json.loads((tiny_model / "call.json").read_text())
    (tmp_path / "call.json").write_text('{"height": 8}')  # of whatever this folder is, not of the model
    assert call_settings(foreign) == {}
    assert call_settings(tiny.build_flux2(Flux2KleinPipeline, is_distilled=True)) == {"num_inference_steps": 4}


# The hub -------------------------------------------------------------------------------------------------------------


@contextmanager
def hub(monkeypatch, status=404, headers=()):
    """A hub that gives every request this answer."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (404, "RepoNotFound", "no model has this name, or it is private: log in with `hf auth login`.$"),
        (403, "GatedRepo", "accept its terms there first, and log in with `hf auth login`.$"),
        (404, "EntryNotFound", "it has no model_index.json there.$"),
        (500, "", "500"),
    ],
)
def test_what_the_hub_answers_is_told(monkeypatch, status, code, says):
    with hub(monkeypatch, status, [("X-Error-Code", code)]), pytest.raises(ValueError, match=says) as caught:
        load(ModelSpec("nobody/nothing"))
    assert str(caught.value).startswith(
        "The model nobody/nothing is not a local folder, and the hub does not provide it: "
    )


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(hub_module, "HUB_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.perf_counter()
        with pytest.raises(ValueError, match="it cannot be reached, check the connection"):
            load(ModelSpec("nobody/nothing"))
    assert time.perf_counter() - start < 5


def test_an_unreachable_hub_is_not_asked_again_and_again():
    start = time.perf_counter()
    with pytest.raises(ValueError, match="it cannot be reached, check the connection"):
        load(ModelSpec("nobody/nothing"))
    assert time.perf_counter() - start < 5


def test_an_id_that_is_none():
    with pytest.raises(ValueError, match="that is not a valid model id"):
        load(ModelSpec("no--body/noth..ing"))


# Calls ---------------------------------------------------------------------------------------------------------------


def test_generate_is_the_direct_call(pipe):
    references = [picture(64, 64), picture(128, 32, 1)]
    config = SparseContextConfig(keep=0.25, selector="detail")
    result = Engine(pipe=pipe)(Request("the cat", references, config, seed=3, steps=1, height=72))
    assert result.selection is last_selection(pipe)
    assert (result.selection.kept, result.selection.total) == (80, 320)
    again = pipe(
        image=[references[0], fit_reference(references[1], 64)],
        prompt="the cat",
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=1,
        height=72,
        width=64,
        guidance_scale=1.0,
        **CALL,
    ).images[0]
    assert result.image.size == (64, 72)
    assert np.array_equal(result.image, again)


def test_the_report_of_a_call(pipe):
    result = Engine(pipe=pipe)(Request("the cat", [picture(64, 64)]))
    report = json.loads(json.dumps(result.to_dict()))
    assert report["size"] == [64, 64]
    assert report["selection"] == result.selection.to_dict()
    times = report["seconds"]
    assert all(seconds > 0 for seconds in times.values())
    assert times["total"] >= sum(times[phase] for phase in ("text", "encode", "denoise", "decode"))


def test_without_references_nothing_is_selected(pipe):
    Engine(pipe=pipe)(Request("the cat", [picture(64, 64)]))
    result = Engine(pipe=pipe)(Request("the cat", []))
    assert result.selection is None and result.to_dict()["selection"] is None


def test_without_a_config_a_fifth_is_kept(pipe):
    assert Engine(pipe=pipe)(Request("the cat", [picture(64, 64)])).selection.kept == 13


def test_a_pipeline_without_settings_takes_references_as_they_are(foreign, tmp_path):
    with settings_of(foreign, tmp_path, **CALL):
        result = Engine(pipe=foreign)(
            Request("the cat", [picture(103, 79), picture(5, 5)], steps=1, guidance_scale=3.0)
        )
    assert [kept.grid for kept in result.selection.references] == [(9, 12), (8, 8)]
    assert result.image.size == (96, 72)  # of the first reference


def test_a_setting_that_the_pipeline_does_not_know_is_left_out(tmp_path):
    kv = tiny.build_flux2(Flux2KleinKVPipeline)
    settings = {**CALL, "guidance_scale": 4.0, "no_such_argument": 1, "num_inference_steps": 1}
    with settings_of(kv, tmp_path, **settings):
        assert Engine(pipe=kv)(Request("the cat", [picture(64, 64)], height=64, width=64)).selection.kept == 13
        with pytest.raises(ValueError, match="but Flux2KleinKVPipeline takes none: leave it out"):
            Engine(pipe=kv)(Request("the cat", [picture(64, 64)], guidance_scale=2.0))


def test_references_are_scaled_to_what_the_model_was_trained_on(pipe, tmp_path):
    with settings_of(pipe, tmp_path, **CALL, reference_size=128, num_inference_steps=1, height=64, width=64):
        result = Engine(pipe=pipe)(Request("the cat", [picture(300, 300), picture(400, 200), picture(2000, 20)]))
    assert [kept.grid for kept in result.selection.references] == [(16, 16), (11, 22), (8, 64)]


def test_masks_are_scaled_with_their_references(pipe):
    drawn = np.zeros((200, 400), bool)
    drawn[:, 200:] = True
    for selector in (mask([drawn]), {mask([drawn]): 1.0}, blend({mask([drawn]): 1.0}), [mask([drawn])]):
        result = Engine(pipe=pipe)(
            Request("the cat", [picture(400, 200)], SparseContextConfig(keep=8, selector=selector))
        )
        (kept,) = result.selection.references
        assert kept.grid == (8, 16)
        assert (kept.scores[:, 9:] == 1).all() and (kept.scores[:, :7] == 0).all()
        assert kept.mask[:, 8:].sum() == 8


def test_what_is_transparent_is_white_to_the_model(pipe):
    pixels = np.zeros((128, 128, 4), np.uint8)
    pixels[32:96, 32:96] = (200, 30, 30, 255)
    result = Engine(pipe=pipe)(
        Request("the cat", [Image.fromarray(pixels)], SparseContextConfig(keep=4, selector="mask"))
    )
    (kept,) = result.selection.references
    assert (kept.picture[:12] == (255, 255, 255, 0)).all()
    assert (kept.picture[20:44, 20:44] == (200, 30, 30, 255)).all()
    assert kept.mask[2:6, 2:6].sum() == 4


SELECTORS = ["uniform", "random", "edges", "detail", "saliency", {"edges": 0.5, "random": 0.5}, None]


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_select_pictures_keeps_what_the_pipeline_keeps(foreign, tmp_path, selector):
    references = [picture(103, 79), picture(40, 90, 1)]
    config = SparseContextConfig(keep=0.2, selector=selector)
    with settings_of(foreign, tmp_path, **CALL):
        made = Engine(pipe=foreign)(Request("the cat", references, config, steps=1, height=8, width=8)).selection
    assert_same_selection(made, select_pictures(references, config, token=tiny.TOKEN))


def test_select_pictures_scales_a_large_picture_as_the_pipeline_does(foreign):
    from sparse_context import apply_sparse_context

    reference, drawn = picture(1501, 1003), np.zeros((1003, 1501), np.uint8)
    drawn[300:700, 400:1000] = 255
    config = SparseContextConfig(keep=40, selector={"saliency": 0.4, "edges": 0.3, mask([drawn]): 0.3})
    apply_sparse_context(foreign, config)
    foreign(image=[reference], prompt="the cat", num_inference_steps=1, height=8, width=8, guidance_scale=1.0, **CALL)
    assert_same_selection(last_selection(foreign), select_pictures([reference], config, token=tiny.TOKEN))


def assert_same_selection(first, second):
    assert first.total == second.total
    for one, other in zip(first.references, second.references, strict=True):
        assert one.grid == other.grid
        assert one.selector == other.selector
        assert np.array_equal(one.picture, other.picture)
        assert np.array_equal(one.scores, other.scores)
        assert np.array_equal(one.index, other.index)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"seed": -1}, "^seed is -1: pass a number from 0 to 9223372036854775807.$"),
        ({"steps": 0}, "^steps is 0: pass a number above 0.$"),
        ({"height": 60}, "^height is 60: this model needs a multiple of 8, such as 64.$"),
        ({"width": -8}, "^width is -8: pass a number above 0.$"),
        ({"guidance_scale": 2.0}, "^guidance_scale is 2.0, but this distilled model takes none: leave it out.$"),
        (
            {"negative_prompt": "dark"},
            "^negative_prompt is 'dark', but this distilled model takes none: leave it out.$",
        ),
        ({"guidance_scale": float("nan")}, "^guidance_scale is nan: pass a number of 0 or more.$"),
    ],
)
def test_arguments_out_of_range(pipe, arguments, says):
    with pytest.raises(ValueError, match=says):
        Engine(pipe=pipe)(Request("the cat", [picture(64, 64)], **arguments))


def test_references_that_do_not_suit(pipe):
    with pytest.raises(ValueError, match="^There are 4 references, and this model takes at most 3: pass fewer.$"):
        Engine(pipe=pipe)(Request("the cat", [picture(64, 64)] * 4))
    wrong = SparseContextConfig(selector=mask([np.ones((32, 64), bool)]))
    with pytest.raises(ValueError, match="^The mask of reference 1 is 64x32, but its picture is 64x64: pass a mask"):
        Engine(pipe=pipe)(Request("the cat", [picture(64, 64)], wrong))
    for selector in (mask([np.ones((64, 64), bool)] * 2), {mask([np.ones((64, 64), bool)] * 2): 1.0}):
        with pytest.raises(
            ValueError, match="^The selector holds 2 masks for 1 references: pass one mask per reference"
        ):
            Engine(pipe=pipe)(Request("the cat", [picture(64, 64)], SparseContextConfig(selector=selector)))
    with pytest.raises(
        ValueError, match="^selector has 2 values for 1 references: pass one value, or one per reference"
    ):
        Engine(pipe=pipe)(Request("the cat", [picture(64, 64)], SparseContextConfig(selector=["edges", "random"])))


def test_what_fails_in_the_pipeline_is_one_sentence_with_its_cause(pipe, tmp_path):
    with settings_of(pipe, tmp_path, max_sequence_length=12, text_encoder_out_layers=[9], num_inference_steps=1):
        with pytest.raises(GenerationError, match="^Flux2KleinPipeline failed: tuple index out of range.$") as caught:
            Engine(pipe=pipe)(Request("the cat", [picture(64, 64)]))
    assert isinstance(caught.value.__cause__, IndexError)


def test_memory_that_runs_out_says_what_to_do(pipe, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(pipe, "encode_prompt", full)
    with pytest.raises(GenerationError, match="^The device's memory ran out: keep fewer tokens, .* cpu_offload or"):
        Engine(pipe=pipe)(Request("the cat", [picture(64, 64)]))


def test_a_pipeline_without_an_input_for_guidance_is_not_called_distilled(pipe, monkeypatch):
    monkeypatch.setattr("sparse_context.pipelines.arguments.call_inputs", lambda pipe: ())
    is_distilled = pipe.config.is_distilled
    pipe.register_to_config(is_distilled=False)
    try:
        with pytest.raises(ValueError, match="^guidance_scale is 2.0, but Flux2KleinPipeline takes none: leave it out"):
            Engine(pipe=pipe)(Request("the cat", [picture(64, 64)], guidance_scale=2.0))
    finally:
        pipe.register_to_config(is_distilled=is_distilled)


def test_another_number_of_tasks_than_references_is_named():
    config = SparseContextConfig(task=["edit", "subject"])
    for size in (64, {"edit": 64, "subject": 128}):
        with pytest.raises(
            ValueError, match="task has 2 values for 3 references: pass one value, or one per reference"
        ):
            reference_sides(size, config, 3)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", "abc", "steps is 'abc': pass a whole number above 0."),
        ("steps", 4.5, "steps is 4.5: pass a whole number above 0."),
        ("height", True, "height is True: pass a whole number above 0."),
        ("seed", 1.5, "seed is 1.5: pass a number from 0"),
        ("guidance_scale", "high", "guidance_scale is 'high': pass a number of 0 or more."),
    ],
)
def test_a_number_of_another_kind_is_refused_before_a_model_is_loaded(field, value, said):
    with pytest.raises(ValueError) as raised:
        Request("x", **{field: value})
    assert str(raised.value).startswith(said)
