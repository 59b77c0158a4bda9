"""Random numbers are the user's: nothing of ours advances a generator that is not its own."""

import json
import random
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_evaluation_metrics import tiny_clip, tiny_dino, torchvision_files  # noqa: F401
from test_saliency import sources, wheel  # noqa: F401
from tiny import CASES, EACH_FAMILY, PAINTING, cases, picture
from tiny_scenes import make_assets, save_assets

from recipes.mini.data import Assets
from sparse_context import (
    SELECTORS,
    ReferenceCache,
    SparseContextConfig,
    apply_sparse_context,
    blend,
    choose_tokens,
    draw_kept,
    last_selection,
    mask,
    remove_sparse_context,
    select_tokens,
)
from sparse_context.evaluation import networks
from sparse_context.selectors import saliency
from sparse_context.tokens import ReferenceTokens


def states():
    """Where each global generator is."""
    kind, keys, *rest = np.random.get_state()
    found = {"torch": torch.get_rng_state().tolist(), "numpy": (kind, keys.tolist(), *rest)}
    found["random"] = random.getstate()
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        found["accelerator"] = torch.get_device_module(device).get_rng_state().tolist()
    return found


@contextmanager
def untouched():
    """Fails if the block moves a global generator. Each stands somewhere in the middle of its numbers before."""
    torch.manual_seed(41), np.random.seed(42), random.seed(43)
    torch.rand(5), np.random.rand(5), [random.random() for _ in range(5)]
    before = states()
    yield
    after = states()
    assert [name for name in before if before[name] != after[name]] == []


@pytest.fixture(autouse=True)
def nothing_read_yet():
    """As in a process in which no net was used, and no run begun, before."""
    from accelerate.state import AcceleratorState

    saliency._read.cache_clear()
    for net in (networks.st_lpips_net, networks.lpips_net, networks.efficientnet, networks.clip, networks.vision):
        net.cache_clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def pixels(seed=0):
    return np.asarray(picture(64, 64, seed))


# What users call ------------------------------------------------------------------------------------------------------


def select(selector, folder, request):
    pictures = [np.dstack([pixels(i), np.tile(np.uint8([0, 255]), (64, 32))]) for i in range(2)]  # with a mask
    kept = select_tokens(pictures, [(8, 8), (8, 8)], SparseContextConfig(selector=selector))
    draw_kept(pictures[0], kept.references[0])


def choose(folder, request):
    choose_tokens([np.random.default_rng(0).random((8, 8))], 0.2)


def keep_tokens(folder, request):
    ReferenceTokens(torch.zeros(1, 8, 4), torch.zeros(8, 4)).keep(np.array([1, 4]))


def cached(folder, request):
    pipe = CASES["klein"].build()
    with untouched():
        apply_sparse_context(pipe, keep=0.3, selector="saliency", cache=ReferenceCache())
        for _ in range(2):
            CASES["klein"].call(pipe, [picture(64, 64)])


def command(*arguments):
    """Run the command here, expecting success."""

    def run(folder, request):
        from sparse_context.cli import main

        words = {"{model}": request.getfixturevalue("tiny_model"), "{out}": folder}
        picture(64, 64).save(folder / "a.png")
        for name in ("b", "c"):
            picture(64, 64, ord(name)).save(folder / f"{name}.png")
        rows = [{"references": [f"{name}.png"], "image": "a.png", "prompt": "the cat"} for name in "bc"]
        (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        filled = [str(argument) for argument in arguments]
        for word, value in words.items():
            filled = [argument.replace(word, str(value)) for argument in filled]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended, untouched():
            patch.setattr(sys, "argv", ["sparse-context", *filled])
            main()
        assert ended.value.code == 0

    return run


def load(folder, request, lora=None, **options):
    from sparse_context.pipelines.load import load
    from sparse_context.pipelines.spec import ModelSpec

    model = str(request.getfixturevalue("tiny_model"))
    if lora is not None:
        block = "transformer.transformer_blocks.0.attn.to_q"
        lora = str(folder / "lora.safetensors")
        save_file({f"{block}.lora_A.weight": torch.ones(2, 32), f"{block}.lora_B.weight": torch.ones(32, 2)}, lora)
    with untouched():
        load(ModelSpec(model, device="cpu", lora=lora, **options))


def load_embedded(folder, request, **options):
    from sparse_context.pipelines.load import load
    from sparse_context.pipelines.spec import ModelSpec

    load(ModelSpec(device="cpu", **options))


def generate(folder, request):
    from sparse_context.pipelines.engine import Engine
    from sparse_context.pipelines.load import load
    from sparse_context.pipelines.spec import ModelSpec, Request

    pipe = load(ModelSpec(str(request.getfixturevalue("tiny_model")), device="cpu", dtype="float32"))
    pipe.set_progress_bar_config(disable=True)
    with untouched():
        Engine(pipe=pipe)(Request("the cat", [picture(64, 64)], SparseContextConfig(selector="saliency"), seed=3))


def train(folder, request, **options):
    from sparse_context.training.config import TrainConfig
    from sparse_context.training.dropping import DROPS, Dropping
    from sparse_context.training.launch import launch
    from sparse_context.training.options import RunConfig

    model = str(request.getfixturevalue("tiny_model"))
    for name in "ab":
        picture(64, 64, ord(name)).save(folder / f"{name}.png")
    rows = [{"references": [f"{name}.png"], "image": "a.png", "prompt": "the cat"} for name in "ab"]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dropping = Dropping(mix=dict.fromkeys(DROPS, 1.0), merge=(0.0, 0.3))
    run = RunConfig(
        dtype="float32",
        mixed_precision="no",
        validation_data=str(folder / "data.jsonl"),
        num_validation_images=1,
        **{name: options.pop(name) for name in set(options) & {field.name for field in fields(RunConfig)}},
    )
    with untouched():
        for steps, resume in ((1, None), (2, "latest")):
            config = TrainConfig(
                dropping=dropping,
                max_train_steps=steps,
                checkpointing_steps=1,
                caption_dropout=0.5,
                **{"rank": 2} | options,
            )
            launch(model, str(folder / "data.jsonl"), folder / "run", config, run, resume=resume)


def evaluate(folder, request):
    from sparse_context.evaluation.evaluate import evaluate
    from sparse_context.evaluation.grid import grid, maker
    from sparse_context.evaluation.metrics import find_metrics
    from sparse_context.evaluation.plots import draw_all
    from sparse_context.evaluation.report import table
    from sparse_context.pipelines.load import load
    from sparse_context.pipelines.spec import ModelSpec
    from sparse_context.samples import Sample

    files = [folder / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        picture(64, 64, i).save(file)
    samples = [Sample(f"sample {i}", "the cat", (files[i].read_bytes(),), files[2].read_bytes()) for i in range(2)]
    pipe = load(ModelSpec(str(request.getfixturevalue("tiny_model")), device="cpu", dtype="float32"))
    pipe.set_progress_bar_config(disable=True)
    with untouched():
        metrics = find_metrics(["psnr", "ssim", "st_lpips"])
        result = evaluate(maker(pipe), samples, grid([1, 0.5], ["random", "saliency"]), metrics, folder / "out")
        table(result), draw_all(result, folder / "out", samples)


def measure(name, file, folder, request):
    from sparse_context.evaluation.metrics import find_metrics

    path = None if file is None else request.getfixturevalue(file.partition("/")[0]) / file.partition("/")[2]
    with untouched():
        metric = find_metrics([name if path is None else f"{name}={path}"])[name].function
        metric(pixels(), "a cat" if name == "clip_t" else pixels(1), None)


def without_pooler(folder, request):
    """A file without weights that are drawn then."""
    model = request.getfixturevalue("tiny_dino")
    assert not any("pooler" in name for name in load_file(model / "model.safetensors"))
    measure("dino_i", "tiny_dino", folder, request)


def bench(folder, request, **options):
    from sparse_context.bench.config import BenchConfig
    from sparse_context.bench.run import run_bench
    from sparse_context.bench.shapes import SHAPES

    config = BenchConfig(references=(1,), keep=(0.25,), size=(64,), turns=1, steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "klein-4b", replace(SHAPES["klein-4b"], heads=1, text_width=24))  # or it takes 18 s
        run_bench(config, device="cpu", output=folder / "bench.json", **options)


def drop(kind, folder, request):
    from sparse_context.training.dropping import Dropping, draw_selection

    pictures = [[np.dstack([pixels(), np.full((64, 64), 255, np.uint8)])]]
    draw_selection(Dropping(mix={kind: 1.0}, coverage=(0.1,), merge=(0.3,)), pictures, [(8, 8)], [1, 2])


def ahead(workers, folder, request):
    from sparse_context.training.data import Ahead

    make = Ahead(partial(torch.full, (2,)), workers)
    assert make(3).tolist() == [3, 3] and make(4).tolist() == [4, 4]


def extract(folder, request):
    from sparse_context.training.lora import extract_lora

    base, tuned = (torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2))
    with untouched():
        extract_lora(base, tuned, 2)


def random_pipeline(folder, request):
    from sparse_context.bench.build import build_pipeline
    from sparse_context.families.flux2.bench import FLUX2
    from sparse_context.families.shape import Shape

    encoder = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 151_936,
        "hidden_size": 4,
        "intermediate_size": 8,
    }
    build_pipeline(Shape(FLUX2, 1, 1, 1, 12, encoder), torch.device("cpu"), torch.float32)


def train_embedded(folder, request):
    from recipes.mini import base, vae
    from recipes.mini.base import BaseConfig, train_base
    from recipes.mini.export import export
    from recipes.mini.vae import VaeConfig, train_vae

    save_assets(make_assets(), folder)
    with pytest.MonkeyPatch.context() as patch, untouched():
        patch.setattr(vae, "measure_latents", partial(vae.measure_latents, pictures=32))  # of 512
        patch.setattr(base, "TASKS", ("edit_background",))  # one row of the sheet that is drawn at the end
        train_vae(folder, VaeConfig(steps=1, batch=2, crop=32))
        train_base(folder, BaseConfig(steps=1, batch=1))
        export(folder, folder / "weights")


def train_net(folder, request):
    from recipes.mini import saliency_net

    composites, (package, *_) = request.getfixturevalue("sources"), request.getfixturevalue("wheel")
    save_assets(
        Assets(
            np.concatenate([composites.objects.objects] * 2),
            composites.backdrops,
            list("abcdef"),
            np.zeros(6, np.int64),
            np.array([0, 1]),
        ),
        folder,
    )
    with pytest.MonkeyPatch.context() as patch, untouched():
        for name, value in {"BUILT": (6, 2), "EMOJI": 3, "BACKDROPS": (0, 1), "fetch": lambda *_: package}.items():
            patch.setattr(saliency_net, name, value)
        saliency_net.train_saliency(folder, saliency_net.SaliencyConfig(steps=1, batch=2, warmup=1))
        saliency_net.export_saliency(folder, folder / "net.safetensors")


ENTRIES = {
    **{f"select {name}": partial(select, name) for name in SELECTORS},
    "select mask": partial(select, mask([np.ones((64, 64), bool)] * 2)),
    "select blend": partial(select, blend({"saliency": 0.5, "random": 0.5})),
    "choose": choose,
    "keep": keep_tokens,
    "cache": cached,
    **{f"drop {kind}": partial(drop, kind) for kind in ("random", "blobs", "bands", "edges", "saliency", "outside")},
    "load": load,
    "load in float16": partial(load, dtype="float16"),
    "load with offload": partial(load, cpu_offload="group"),
    "load for KV": partial(load, kv=True),
    "load a LoRA": partial(load, lora=True),
    "load part of a LoRA": partial(load, lora=True, lora_scale=0.5),
    "load the embedded model": load_embedded,
    "load the embedded model for KV": partial(load_embedded, kv=True),
    "generate": generate,
    "train": train,
    "train by processes": partial(train, dataloader_num_workers=2),
    "train all": partial(train, full=True, muon_learning_rate=1e-3, ema=0.9),
    "train with all else": partial(
        train,
        distillation=0.5,
        preservation=1.0,
        subsets=2,
        gradient_checkpointing=True,
        cache_latents=True,
        cache_text=True,
        report_to="tensorboard",
    ),
    "a thread ahead": partial(ahead, 0),
    "processes ahead": partial(ahead, 2),
    "evaluate": evaluate,
    **{f"measure {name}": partial(measure, name, None) for name in ("psnr", "ssim", "st_lpips", "identity")},
    "measure lpips": partial(measure, "lpips", "torchvision_files/alex.safetensors"),
    "measure lpips by squeeze": partial(measure, "lpips", "torchvision_files/squeeze.pth"),
    "measure clip_i": partial(measure, "clip_i", "tiny_clip"),
    "measure clip_t": partial(measure, "clip_t", "tiny_clip"),
    "measure dino_i": without_pooler,
    "extract a LoRA": extract,
    "bench blocks": partial(bench, random_weights="klein-4b", blocks=1, dtype="float32"),
    "random weights": random_pipeline,
    "train the embedded model": train_embedded,
    "train the saliency net": train_net,
    "command generate": command(
        "generate",
        "-m",
        "{model}",
        "--image",
        "{out}/b.png",
        "--prompt",
        "the cat",
        "--selector",
        "saliency",
        "--output",
        "{out}/made.png",
        "--show-tokens",
        "{out}/tokens.png",
        "--compare",
        "{out}/both.png",
    ),
    "command select": command("select", "{out}/b.png", "--selector", "saliency", "--output", "{out}/tokens.png"),
    "command train": command(
        "train",
        "-m",
        "{model}",
        "--data",
        "{out}/data.jsonl",
        "--output-dir",
        "{out}/run",
        "--max-train-steps",
        1,
        "--rank",
        2,
        "--set",
        "mixed_precision=no",
    ),
    "command evaluate": command(
        "evaluate",
        "-m",
        "{model}",
        "--data",
        "{out}/data.jsonl",
        "--output",
        "{out}/eval",
        "--keep",
        "0.5",
        "--metric",
        "psnr",
    ),
}


# Under autocast torch says once that RMS norm, whose weights stay float32, is not fused
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("entry", ENTRIES)
def test_global_generators_are_as_before(entry, request, tmp_path, capsys):
    with untouched():
        ENTRIES[entry](tmp_path, request)


@pytest.mark.parametrize("case", cases(*EACH_FAMILY, *PAINTING))
def test_a_call_with_a_generator_of_its_own_leaves_the_global_ones(case):
    pipe = CASES[case].build()
    with untouched():
        apply_sparse_context(pipe, keep=0.3, selector="saliency")
        CASES[case].call(pipe, CASES[case].references())
        remove_sparse_context(pipe)
    assert saliency._read.cache_info().currsize == 1  # it was the first use of the net


@pytest.mark.parametrize("case", cases(*EACH_FAMILY, *PAINTING))
def test_a_call_without_a_generator_draws_what_the_untouched_pipeline_draws(case):
    """Which it may: then a series that was seeded once goes on as it did."""
    pipe, ends = CASES[case].build(), []
    for keep in (None, 1.0, 0.3):
        if keep is not None:
            apply_sparse_context(pipe, keep=keep, selector="saliency")
        torch.manual_seed(5)
        CASES[case].call(pipe, CASES[case].references(), generator=None)
        ends.append(states()["torch"])
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize("case", cases("klein", "flux2-modular", "flux3"))
def test_the_same_seed_in_the_global_generator_is_the_same_picture(case):
    """`torch.manual_seed` returns the global generator."""
    pipe = CASES[case].build()
    apply_sparse_context(pipe, keep=0.3, selector="saliency")
    first, second = (CASES[case].call(pipe, CASES[case].references(), generator=torch.manual_seed(0)) for _ in range(2))
    assert last_selection(pipe) is not None and torch.equal(first, second)


FRESH = """
import random, sys
import numpy, torch
torch.manual_seed(1), numpy.random.seed(2), random.seed(3)
def states():
    kind, keys, *rest = numpy.random.get_state()
    return torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest), random.getstate()
before = states()
import importlib, pkgutil
import sparse_context
for name in sparse_context.__all__:
    getattr(sparse_context, name)
for module in pkgutil.walk_packages(sparse_context.__path__, "sparse_context."):
    # Gradio draws as it is imported, in the process of the app alone
    if not module.name.endswith("__main__") and not module.name.startswith("sparse_context.app."):
        importlib.import_module(module.name)
    if states() != before:
        sys.exit(module.name)
selection = sparse_context.select_tokens(
    [numpy.zeros((64, 64, 3), numpy.uint8)], [(8, 8)], sparse_context.SparseContextConfig(selector="saliency"))
sparse_context.draw_kept(numpy.zeros((64, 64, 3), numpy.uint8), selection.references[0])
if states() != before:
    sys.exit("the first use of saliency")
"""


@pytest.mark.slow
def test_neither_imports_nor_the_first_use_of_saliency_draw_in_a_fresh_process():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (0, "")


def test_a_device_of_the_user_s_does_not_move_the_net():
    """Nor does its number format."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            net = saliency.load_net()
    finally:
        torch.set_default_dtype(torch.float32)
    tensors = [*net.parameters(), *net.buffers()]
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("cpu", torch.float32)}


def test_a_seed_makes_the_adapter_that_it_always_made():
    """A run is to end at the weights that its seed stands for, wherever the global generator was."""
    from peft import LoraConfig
    from test_finetune import klein

    from sparse_context.training.config import TrainConfig
    from sparse_context.training.trainable import prepare

    host, twin = klein(), klein()
    torch.manual_seed(7)
    settings = {"r": 2, "lora_alpha": 2, "init_lora_weights": "gaussian", "target_modules": ["to_q", "to_out.0"]}
    twin.transformer.add_adapter(LoraConfig(**settings))
    with untouched():
        prepare(host, TrainConfig(rank=2, lora_alpha=2, lora_layers=("to_q", "to_out.0"), seed=7))
    wanted = {name: weight for name, weight in twin.transformer.named_parameters() if "lora_A" in name}
    found = dict(host.transformer.named_parameters())
    assert wanted and all(torch.equal(found[name], weight) for name, weight in wanted.items())
