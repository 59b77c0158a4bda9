"""What a call takes, from shapes alone: held to what tensors take in one, and to what a GPU was seen to take."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline
from test_speed import SMALL
from tiny import CASES, EACH_FAMILY, build_flux2, cases, picture

from sparse_context import SparseContextConfig
from sparse_context.bench.config import BenchConfig
from sparse_context.bench.flops import call_flops
from sparse_context.bench.predict import predict
from sparse_context.bench.shapes import SHAPES
from sparse_context.families.shape import Tokens
from sparse_context.pipelines import Engine, GenerationError, ModelSpec, Request, engine
from sparse_context.pipelines.dry import DryRun
from sparse_context.pipelines.predict import Parts, Prediction, Predictor, kept_of, offload_of, parts_of, parts_of_shape

RESULTS = Path(__file__).parents[1] / "results"


# A dry run ------------------------------------------------------------------------------------------------------------


def test_what_is_let_go_is_not_counted():
    with DryRun() as run:
        first = torch.empty(1000, device="meta")
        second = first + 1
        view = second[::2]
        del first, second
        assert (run._held, run.peak) == (4000, 8000)  # the view holds it
        del view
        third = torch.empty(500, device="meta").add_(1)
        assert (run._held, run.peak) == (2000, 8000)
        del third


def test_attention_keeps_no_scores():
    query, key = (torch.empty(1, 2, n, 8, device="meta") for n in (1000, 3000))
    with DryRun() as run:
        made = torch.nn.functional.scaled_dot_product_attention(query, key, key)
    assert made.shape == query.shape and made.transpose(1, 2).is_contiguous()
    assert run.flops == 4 * 2 * 1000 * 3000 * 8 and run.peak == 4 * query.numel() + 4 * 2 * 1000


@pytest.mark.parametrize("kv", [False, True])
def test_operations_are_those_of_the_formulas(kv):
    predictor = Predictor(parts_of_shape(SMALL, torch.float32, kv))
    call = predictor([(4, 4), (6, 4)], 20, (8, 8), steps=3)
    assert call.tokens == Tokens(SMALL.text, 64, 20) and call.total == 40
    assert call.flops == pytest.approx(call_flops(SMALL, call.tokens, 3, kv), rel=0.02)


# Held to measurements -------------------------------------------------------------------------------------------------


def tensors_of(run):
    """The most bytes that tensors take at once while something is run, for real."""
    with torch.no_grad(), Real() as real:
        run()
    return real.peak


class Real(DryRun):
    """The same count of what is computed, with attention as it is."""

    def __enter__(self):
        return super(DryRun, self).__enter__()

    def __exit__(self, *error):
        super(DryRun, self).__exit__(*error)


@pytest.mark.parametrize("name", cases(*EACH_FAMILY))
def test_memory_of_the_phases_is_that_of_the_tensors(name):
    """On the CPU, whose attention keeps no scores either; what comes in is held as well."""
    pipe = CASES[name].build()
    parts = parts_of(pipe, text=12)
    call = Predictor(parts)([(12, 12)], 144, (8, 8))
    kind, shape = parts.shape.kind, parts.shape
    mode = "extract" if parts.kv else None
    transformer = pipe.transformer.eval()

    def denoise():
        made = transformer(**kind.arguments(transformer, shape, call.tokens, mode), return_dict=False)
        if parts.kv:
            later = kind.arguments(transformer, shape, call.tokens, "cached")
            transformer(**later, kv_cache=made[1], return_dict=False)

    assert call.activations["denoise"] == pytest.approx(tensors_of(denoise), rel=0.1)
    token = shape.token
    size = (1, 3, 1, 12 * token, 12 * token) if parts.takes_frames else (1, 3, 12 * token, 12 * token)
    assert call.activations["encode"] == pytest.approx(tensors_of(lambda: pipe.vae.encode(torch.zeros(size))), rel=0.1)
    assert call.weights["transformer"] == sum(weight.nbytes for weight in pipe.transformer.parameters())


@pytest.mark.parametrize("shape", ["klein-9b", "klein-4b"])
def test_memory_is_that_which_a_gpu_was_seen_to_take(shape):
    """By the published runs on an H200, for every method and keep: within a tenth in all phases."""
    rows = json.loads((RESULTS / f"bench_gpu_{shape}.json").read_text(encoding="utf-8"))["figures"]["rows"]
    predictors = {kv: Predictor(parts_of_shape(SHAPES[shape], torch.bfloat16, kv)) for kv in (False, True)}
    grid = (64, 64)
    for row in rows:
        if (row["references"], row["keep"]) not in ((1, None), (4, None), (4, 0.1)) or row["method"] == "downscaled":
            continue
        references = [grid] * row["references"] if row["tokens"]["references"] else []
        call = predictors["kv" in row["method"]](references, row["tokens"]["references"], grid, 4)
        for phase in ("encode", "denoise", "decode"):
            if phase in row["memory"] and phase in call.activations:
                found = call.activations[phase] / row["memory"][phase]
                assert 0.9 < found < 1.1, (row["method"], row["references"], phase, found)


# What fits ------------------------------------------------------------------------------------------------------------


def prediction(offload=None):
    weights = {"transformer": 100, "vae": 10, "text_encoder": 50}
    return Prediction(Tokens(1, 2, 3), 4, 5, weights, {"text": 1, "encode": 20, "denoise": 30, "decode": 40}, offload)


def test_weights_are_counted_where_they_are():
    assert prediction().resident == 160 and prediction().peak == 200
    assert prediction("model").peaks == {"text": 51, "encode": 30, "denoise": 130, "decode": 50}
    assert prediction("group").peak == 40


def test_the_largest_keep_is_the_largest_that_fits():
    parts = parts_of_shape(SMALL, torch.float32)
    alone = {"transformer": parts.modules["transformer"]}  # the true VAE takes more than this transformer with any keep
    predictor = Predictor(replace(parts, modules=alone))
    grids, output = [(64, 64)] * 2, (4, 4)
    peaks = [predictor(grids, 8192 * n // 100, output).peak for n in (1, 40, 41)]
    assert peaks[0] < peaks[1] < peaks[2]
    assert predictor.largest_keep(grids, output, int(peaks[1] / engine.ROOM) + 1) == 0.4
    assert predictor.largest_keep(grids, output, 100 * peaks[2]) == 1.0
    assert predictor.largest_keep(grids, output, peaks[0] // 2) is None


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"keep": 0.3}, 77),
        ({"keep": 40}, 40),
        ({"keep": [0.5, 1.0]}, 32 + 192),
        ({"keep": "auto"}, 256),
        ({"keep": 0.3, "multiple_of": 16}, 80),
        ({"keep": 1.0}, 256),
    ],
)
def test_how_many_tokens_a_config_keeps(config, kept):
    assert kept_of(SparseContextConfig(**config), [(8, 8), (16, 12)]) == kept


@pytest.fixture(scope="module")
def model(tiny_model):
    return Engine(ModelSpec(str(tiny_model), dtype="float32", device="cpu"), bar=False)


def ask(keep=0.5, references=2):
    return Request("the cat", [picture(64, 96, i) for i in range(references)], SparseContextConfig(keep=keep), steps=2)


def test_an_engine_predicts_what_its_call_keeps(model):
    made, call = model(ask()), model.predict(ask())
    assert (call.tokens.references, call.total) == (made.selection.kept, made.selection.total)
    assert call.tokens.output == made.image.width * made.image.height // 64
    assert set(call.activations) == {"text", "encode", "denoise", "decode"}
    assert call.weights["transformer"] == sum(weight.nbytes for weight in model.pipe().transformer.parameters())
    assert "encode" not in model.predict(ask(references=0)).activations
    assert model.largest_keep(ask(), 2**40) == 1.0


def out_of_memory(pipe, most, error=torch.OutOfMemoryError):
    """A hook by which the transformer runs out of memory where it sees more tokens."""

    def check(module, args, kwargs):
        if kwargs["hidden_states"].shape[1] > most:
            if error is RuntimeError:
                torch.empty(2**62, dtype=torch.uint8)  # as torch says it of the machine's own memory
            raise error("CUDA out of memory.")

    return pipe.transformer.register_forward_pre_hook(check, with_kwargs=True)


def test_what_ran_out_of_memory_names_the_keep_that_fits(model, monkeypatch):
    request = ask(keep=1.0)
    call, smaller = model.predict(request), model.predict(ask(keep=0.5))
    room = smaller.peak / engine.ROOM + 1
    monkeypatch.setattr(engine, "free_memory", lambda device: int(room) - call.resident)
    largest = model.largest_keep(request, int(room))
    assert 0.5 <= largest < 1
    handle = out_of_memory(model.pipe(), call.tokens.output + smaller.tokens.references)
    try:
        with pytest.raises(
            GenerationError, match=f"ran out: keep={largest:g} fits into the 0.0 GiB that were free. Or"
        ):
            model(request)
        monkeypatch.setattr(engine, "free_memory", lambda device: 1000)
        with pytest.raises(
            GenerationError, match="and no keep fits into the 0.0 GiB that were free: ask for a smaller"
        ):
            model(request)
        for unknown in (None, 2**40):  # nobody knows, or it should have fitted
            monkeypatch.setattr(engine, "free_memory", lambda device, unknown=unknown: unknown)
            with pytest.raises(GenerationError, match="ran out: keep fewer tokens, ask for a smaller height and width"):
                model(request)
    finally:
        handle.remove()
    assert model(ask(keep=0.5)).selection.kept == smaller.tokens.references


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_memory_of_the_machine_runs_out_as_that_of_a_gpu(model, monkeypatch, error):
    monkeypatch.setattr(engine, "free_memory", lambda device: 1000)
    handle = out_of_memory(model.pipe(), 0, error)
    try:
        with pytest.raises(GenerationError, match="and no keep fits into the 0.0 GiB that were free: ask for"):
            model(ask())
    finally:
        handle.remove()


def test_a_compiled_transformer_is_predicted_as_the_one_that_it_was_made_of():
    pipe = build_flux2(Flux2KleinPipeline)
    plain = Predictor(parts_of(pipe))([(4, 4)], 8, (8, 8))
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert Predictor(parts_of(pipe))([(4, 4)], 8, (8, 8)) == plain


def test_how_a_pipeline_is_offloaded_is_seen():
    assert offload_of(build_flux2(Flux2KleinPipeline)) is None
    for name in ("model", "group", "sequential"):
        pipe = build_flux2(Flux2KleinPipeline)
        if name == "model":
            pipe.enable_model_cpu_offload(device="cpu")
        elif name == "group":
            pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        else:
            pipe.enable_sequential_cpu_offload(device="cpu")
        assert offload_of(pipe) == ("model" if name == "model" else "group"), name


def test_a_vae_of_the_user_s_own_cannot_be_predicted():
    pipe = build_flux2(Flux2KleinPipeline)

    class Own(torch.nn.Module):
        dtype = torch.float32

    pipe.vae = Own()
    with pytest.raises(ValueError, match="What Own takes cannot be predicted, for it has no config"):
        parts_of(pipe)


# The command ----------------------------------------------------------------------------------------------------------


def test_configs_alone_say_what_a_model_takes(tiny_model, model, tmp_path):

    config = BenchConfig(references=(2,), keep=(0.5,), size=(64,), methods=("dense", "sparse", "sparse_kv"), steps=2)
    rows, fits = predict(config, model=str(tiny_model), dtype="float32", memory=1.0, output=tmp_path / "out.json")
    loaded = Predictor(parts_of(model.pipe(), text=rows[0].call.tokens.text))
    references = [(8, 8)] * 2
    for row, kept in ((rows[0], 128), (rows[1], 64)):
        assert row.call.activations == loaded(references, kept, (8, 8), 2).activations
        assert row.call.weights == {name: size for name, size in loaded.parts.weights.items() if size}
    assert rows[2].call.flops < rows[1].call.flops
    assert [fit.keep for fit in fits] == [1.0]
    written = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert written["rows"][1]["peak"] == rows[1].call.peak and written["fits"][0]["keep"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": float("inf")}, "memory is inf: pass gigabytes, a number above 0."),
        ({"memory": -1.0}, "memory is -1: pass gigabytes, a number above 0."),
        ({"cpu_offload": "disk"}, "cpu_offload is 'disk': choose model or group."),
        ({}, r"references is \d+, and this model takes at most \d+: pass fewer."),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        predict(BenchConfig(references=(99,)), **arguments)


def test_more_references_than_a_family_takes_are_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    with pytest.raises(ValueError, match=r"^references is 2, and this model takes at most 1: pass fewer\.$"):
        predict(BenchConfig(references=(1, 2)), model=str(tmp_path))


@pytest.mark.parametrize(
    ("part", "about", "message"),
    [
        ("vae", [None, None], "is incomplete: it has no vae."),
        ("transformer", ["diffusers", "Own"], "do not load: module diffusers has no attribute Own."),
    ],
)
def test_a_model_that_is_not_whole_is_refused(tiny_model, tmp_path, part, about, message):
    copied = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps(index | {part: about}))
    with pytest.raises(ValueError, match=f"{copied} {message}$"):
        predict(BenchConfig(references=(1,)), model=str(copied))


def test_kv_costs_memory_and_saves_operations():
    plain, kv = (Predictor(parts_of_shape(SMALL, torch.float32, kv)) for kv in (False, True))
    grids = [(32, 32)] * 2
    assert kv(grids, 2048, (8, 8), 4).flops < plain(grids, 2048, (8, 8), 4).flops
    assert kv(grids, 2048, (8, 8), 4).activations["denoise"] > plain(grids, 2048, (8, 8), 4).activations["denoise"]
    assert isinstance(parts_of(build_flux2(Flux2KleinKVPipeline)), Parts)
