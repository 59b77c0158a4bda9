"""An engine: one pipeline for many threads, its warm-up, its cancelling, its progress, and quantised weights."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import picture
from whole import save_whole

from sparse_context import ReferenceCache, SparseContextConfig
from sparse_context.pipelines import Cancelled, Engine, GenerationError, ModelSpec, Request
from sparse_context.pipelines.load import load

KEEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)


@pytest.fixture(scope="module")
def spec(tiny_model):
    return ModelSpec(str(tiny_model), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def engine(spec):
    return Engine(spec, bar=False)


@pytest.fixture(scope="module")
def modular(tmp_path_factory):
    folder = save_whole("Flux2KleinModularPipeline", tmp_path_factory.mktemp("modular") / "tiny model")
    return Engine(ModelSpec(str(folder), dtype="float32", device="cpu"), bar=False)


def ask(keep=0.2, steps=3, seed=0, references=2):
    images = [picture(64, 64, i) for i in range(references)]
    return Request("the cat", images, SparseContextConfig(keep=keep), seed=seed, steps=steps)


def pixels(generation):
    return np.asarray(generation.image)


def together(engines, requests):
    """The answers of as many threads as there are requests, which all begin at once."""
    start = threading.Barrier(len(requests))

    def answer(engine, each):
        start.wait()
        return engine(each)

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(answer, engines, requests))


# Threads -------------------------------------------------------------------------------------------------------------


def test_eight_threads_get_what_each_would_get_alone(engine):
    requests = [ask(keep, seed=i) for i, keep in enumerate(KEEPS)]
    alone = [engine(each) for each in requests]
    assert len({generation.selection.kept for generation in alone}) == len(KEEPS)
    for one, other in zip(alone, together([engine] * 8, requests), strict=True):
        assert np.array_equal(pixels(one), pixels(other))
        assert other.selection.kept == one.selection.kept
        assert np.array_equal(one.selection.index, other.selection.index)
    assert len({id(generation.selection) for generation in alone}) == len(KEEPS)


def test_engines_of_one_pipeline_wait_for_each_other(engine):
    pipe = engine.pipe()
    requests = [ask(keep, seed=i) for i, keep in enumerate(KEEPS[:4])]
    alone = [pixels(engine(each)) for each in requests]
    engines = [Engine(pipe=pipe, bar=False) for _ in requests]
    for one, other in zip(alone, together(engines, requests), strict=True):
        assert np.array_equal(one, pixels(other))


def test_threads_load_the_pipeline_once(spec, monkeypatch):
    loaded = []
    monkeypatch.setattr("sparse_context.pipelines.engine.load", lambda spec: loaded.append(load(spec)) or loaded[-1])
    fresh = Engine(spec, bar=False)
    assert not loaded
    together([fresh] * 4, [ask(seed=i, steps=1) for i in range(4)])
    assert len(loaded) == 1 and fresh.pipe() is loaded[0]


def test_all_tokens_of_the_embedded_model_are_answered_without_its_adapter(monkeypatch):
    loaded = []
    monkeypatch.setattr("sparse_context.pipelines.engine.load", lambda spec: loaded.append(spec) or spec)
    embedded = Engine(ModelSpec(lora_scale=0.5))
    assert embedded.pipe(SparseContextConfig(keep=1.0)) == ModelSpec(lora="none")
    assert embedded.pipe(SparseContextConfig(keep=0.2)) == embedded.pipe() == ModelSpec(lora_scale=0.5)
    assert len(loaded) == 2
    for spec in (ModelSpec("folder"), ModelSpec(lora="a"), ModelSpec(kv=True), ModelSpec(lora="none")):
        assert Engine(spec).pipe(SparseContextConfig(keep=1.0)) == spec


def test_a_layout_that_the_weights_for_overviews_do_not_know_is_answered_without_them(monkeypatch):
    monkeypatch.setattr("sparse_context.pipelines.engine.load", lambda spec: spec)
    embedded = Engine(ModelSpec())
    named = SparseContextConfig(overview=4)
    assert embedded.pipe(named) == embedded.pipe(replace(named, overview_layout="spread")) == ModelSpec(lora="overview")
    assert embedded.pipe(replace(named, overview_layout="reference")) == ModelSpec()


def test_an_engine_is_of_a_spec_or_of_a_pipeline(engine, spec):
    with pytest.raises(TypeError, match="a ModelSpec or a pipeline, not both"):
        Engine(spec, pipe=engine.pipe())
    with pytest.raises(TypeError, match="int is not a pipeline that Sparse Context knows"):
        Engine(pipe=3)


# Progress and cancelling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["engine", "modular"])
def test_progress_is_told_after_each_step(kind, request):
    engine, told = request.getfixturevalue(kind), []
    plain = engine(ask())
    watched = engine(ask(), progress=lambda step, steps: told.append((step, steps)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert np.array_equal(pixels(plain), pixels(watched))
    assert "step" not in vars(engine.pipe().scheduler)


@pytest.mark.parametrize("kind", ["engine", "modular"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_cancelled_call_ends_before_its_next_step_and_the_next_call_is_as_usual(kind, at, request, caplog):
    engine, event, told = request.getfixturevalue(kind), threading.Event(), []
    plain = engine(ask())
    forwards = []
    handle = engine.pipe().transformer.register_forward_pre_hook(lambda *_: forwards.append(1))

    def progress(step, steps):
        told.append(step)
        if step == at:
            event.set()

    if at == 0:
        event.set()
    try:
        with pytest.raises(Cancelled, match="^The call was cancelled.$"):
            engine(ask(), cancel=event, progress=progress)
    finally:
        handle.remove()
    assert told == list(range(1, at + 1)) and len(forwards) == (at + 1 if at else 0)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert "step" not in vars(engine.pipe().scheduler)
    assert np.array_equal(pixels(plain), pixels(engine(ask())))


def test_a_function_cancels_as_an_event_does(engine):
    answers = iter([False, False, True])
    with pytest.raises(Cancelled):
        engine(ask(), cancel=lambda: next(answers))


def test_who_waits_for_a_turn_can_leave(engine):
    inside, go_on, leave = threading.Event(), threading.Event(), threading.Event()

    def hold(step, steps):
        inside.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(engine, ask(), progress=hold)
        assert inside.wait(60)
        second = pool.submit(engine, ask(), cancel=leave)
        leave.set()
        with pytest.raises(Cancelled):
            second.result(60)
        assert not first.done()
        go_on.set()
        assert first.result(60).selection.kept > 0


# Several at once, and previews ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", [False, True])
def test_requests_about_the_same_references_are_answered_by_one_call(spec, kv):
    engine, forwards = Engine(replace(spec, kv=kv), bar=False), []
    request = ask(seed=3)
    requests = [request, replace(request, prompt="the room", seed=8), replace(request, seed=9)]
    alone = [engine(each) for each in requests]
    handle = engine.pipe().transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    answers = engine.together(requests)
    handle.remove()
    assert len(forwards) == 3
    assert len({pixels(answer).tobytes() for answer in answers}) == 3
    for one, other in zip(alone, answers, strict=True):
        assert np.abs(pixels(one).astype(int) - pixels(other)).max() <= 1
        assert np.array_equal(one.selection.index, other.selection.index)


def test_what_cannot_be_answered_together_is_refused(engine, modular):
    with pytest.raises(ValueError, match="^Requests that are answered together may differ in prompt and seed alone"):
        engine.together([ask(0.2), ask(0.3)])
    with pytest.raises(ValueError, match="^There are 2 requests, and Flux2KleinModularPipeline answers one at a time"):
        modular.together([ask(), ask(seed=1)])


@pytest.mark.parametrize("kv", [False, True])
@pytest.mark.parametrize("references", [0, 2])
def test_the_last_preview_is_the_picture_and_previews_change_nothing(spec, references, kv):
    engine, drawn = Engine(replace(spec, kv=kv), bar=False), []
    request = ask(references=references)
    generation = engine(request, preview=lambda step, steps, draw: drawn.append((step, steps, draw())))
    assert np.array_equal(pixels(generation), pixels(engine(request)))
    assert [(step, steps, len(pictures)) for step, steps, pictures in drawn] == [(1, 3, 1), (2, 3, 1), (3, 3, 1)]
    differences = [np.abs(np.asarray(pictures[0]).astype(int) - pixels(generation)) for *_, pictures in drawn]
    assert differences[-1].max() <= 1 < differences[0].max()
    assert "decode" not in vars(engine.pipe().vae)


def test_the_size_of_a_preview_is_that_of_the_picture(engine):
    drawn = []
    wide = replace(ask(references=1), width=96, height=32)
    together = engine.together(
        [wide, replace(wide, seed=1)], preview=lambda step, steps, draw: drawn.append([each.size for each in draw()])
    )
    assert drawn == [[(96, 32)] * 2] * 3 and [each.image.size for each in together] == [(96, 32)] * 2


def test_a_pipeline_that_cannot_decode_has_no_previews(modular):
    told = []
    modular(ask(), preview=lambda *_: told.append(1))
    assert told == []


def test_a_cache_of_the_engine_remembers_references(spec):
    cache = ReferenceCache()
    engine = Engine(spec, bar=False, cache=cache)
    first = engine(ask())
    assert (cache.hits, cache.misses) == (0, 4)
    assert np.array_equal(pixels(first), pixels(engine(ask())))
    assert (cache.hits, cache.misses) == (4, 4)


# Warm-up and comparing ------------------------------------------------------------------------------------------------


def test_a_warm_up_loads_the_pipeline_and_changes_nothing(spec):
    engine = Engine(spec)
    engine.warm_up()
    pipe = engine.pipe()
    assert getattr(pipe, "_progress_bar_config", {}) == {}
    engine.warm_up(ask())
    cold = Engine(spec, bar=False)
    assert np.array_equal(pixels(engine(ask())), pixels(cold(ask())))


def test_a_comparison_is_both_answers(engine):
    told = []
    comparison = engine.compare(ask(0.25), progress=lambda step, steps: told.append((step, steps)))
    assert told == [(step, 6) for step in range(1, 7)]
    assert np.array_equal(pixels(comparison.sparse), pixels(engine(ask(0.25))))
    assert np.array_equal(pixels(comparison.dense), pixels(engine(ask(1.0))))
    assert comparison.speedup == comparison.dense.times.total / comparison.sparse.times.total
    sheet = np.asarray(comparison.draw())
    assert np.array_equal(sheet[:64, :64], pixels(comparison.dense))
    assert np.array_equal(sheet[:64, -64:], pixels(comparison.sparse))


# What a spec and a request refuse -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"dtype": "int8"}, "dtype is 'int8': choose auto, float16, fp16, bfloat16, bf16, float32, fp32."),
        ({"cpu_offload": "disk"}, "cpu_offload is 'disk': choose model or group."),
        ({"lora_scale": -1.0}, "lora_scale is -1.0: pass a number of 0 or more."),
        ({"quantization": "int4"}, "quantization is 'int4': choose int8, nf4, int8-bnb or name a .gguf file."),
        ({"quantization": "no.gguf"}, "The GGUF file no.gguf is not there: name one that holds the model's transf"),
    ],
)
def test_a_spec_refuses_what_no_pipeline_takes(fields, says):
    with pytest.raises(ValueError) as caught:
        ModelSpec(**fields)
    assert str(caught.value).startswith(says)


def test_a_model_that_does_not_fit_on_the_device_is_one_sentence(spec, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("diffusers.DiffusionPipeline.to", full)
    says = "does not fit into the memory of cpu: pass cpu_offload or quantization.$"
    with pytest.raises(GenerationError, match=says):
        Engine(spec, bar=False)(ask())


# Quantised weights ----------------------------------------------------------------------------------------------------


def quantized(spec, name):
    return Engine(ModelSpec(spec.model, spec.dtype, spec.device, quantization=name), bar=False)


@pytest.mark.filterwarnings("default")
def test_int8_weights_change_the_picture_little(engine, spec):
    pytest.importorskip("torchao")
    small = quantized(spec, "int8")
    weight = small.pipe().transformer.transformer_blocks[0].attn.to_q.weight
    assert type(weight).__module__.startswith("torchao")
    assert type(small.pipe().vae.encoder.conv_in.weight) is torch.nn.Parameter
    difference = np.abs(pixels(small(ask())).astype(int) - pixels(engine(ask())))
    assert 0 < difference.max() and difference.mean() < 3
    kept = small(ask()).selection.kept
    assert kept == engine(ask()).selection.kept


def write_gguf(transformer, file, kind):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(file), "flux")
    for name, weight in transformer.state_dict().items():
        array = weight.float().numpy()
        if kind == "Q8_0" and array.ndim == 2 and array.shape[1] % 32 == 0:
            packed = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file_is_the_transformer(engine, spec, tmp_path, kind):
    file = tmp_path / "transformer.gguf"
    write_gguf(engine.pipe().transformer, file, kind)
    difference = np.abs(pixels(quantized(spec, str(file))(ask())).astype(int) - pixels(engine(ask())))
    # On some processors the last bit depends on where in memory a matrix begins
    assert difference.max() <= 1 if kind == "F32" else 0 < difference.max() and difference.mean() < 3


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "package"), {"int8": "torchao", "nf4": "bitsandbytes", "Q8_0.gguf": "gguf"}.items())
def test_a_lora_on_quantised_weights_is_as_it_is_in_its_file(engine, spec, tmp_path, monkeypatch, name, package):
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    if package == "gguf":
        write_gguf(engine.pipe().transformer, tmp_path / name, "Q8_0")
    layer = "transformer_blocks.0.attn.to_q"
    rows, columns = engine.pipe().transformer.get_submodule(layer).weight.shape
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, columns), (rows, 2)))
    lora = {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    save_file(lora, tmp_path / "lora.safetensors")
    pipe = load(replace(spec, quantization=name, lora="lora.safetensors"))
    found = pipe.transformer.get_submodule(layer)
    x = torch.randn(4, columns, generator=generator)
    with torch.no_grad():
        change = found(x) - found.base_layer(x)
    torch.testing.assert_close(change, x @ (up @ down).T, rtol=1e-4, atol=1e-4)


def test_what_is_no_gguf_file_is_one_sentence(spec, tmp_path):
    pytest.importorskip("gguf")
    file = tmp_path / "transformer.gguf"
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=f"does not load: {file} is no GGUF file of its transformer: ") as caught:
        quantized(spec, str(file)).pipe()
    assert "\n" not in str(caught.value)


def test_int8_of_bitsandbytes_needs_a_gpu(spec):
    says = "^quantization is 'int8-bnb', which needs a GPU, and the device is cpu: choose int8.$"
    with pytest.raises(ValueError, match=says):
        quantized(spec, "int8-bnb").pipe()


@pytest.mark.parametrize(("name", "package"), {"int8": "torchao", "a.gguf": "gguf", "nf4": "bitsandbytes"}.items())
def test_a_package_that_is_not_there_is_named(spec, tmp_path, monkeypatch, name, package):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda asked: None)
    says = f"^quantization is '{name}', which needs {package}: pip install 'sparse-context.quantization.'.$"
    with pytest.raises(ValueError, match=says):
        quantized(spec, name).pipe()


def test_an_engine_with_a_cache_encodes_a_reference_once_and_makes_the_same(engine, spec):
    cached = Engine(spec, bar=False, cache=ReferenceCache())
    plain = pixels(engine(ask()))
    encoded = []
    handle = cached.pipe().vae.encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
    first, second = pixels(cached(ask())), pixels(cached(ask()))
    handle.remove()
    assert len(encoded) == 2 and cached.cache.hits == 4 == cached.cache.misses  # latents and scores of two references
    assert np.array_equal(plain, first) and np.array_equal(plain, second)
