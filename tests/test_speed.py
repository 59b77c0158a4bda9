"""What the benchmark counts and compares. No test here looks at a time."""

import dataclasses
import errno
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline, Flux2Pipeline
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparse_context import ReferenceCache, apply_sparse_context
from sparse_context.bench import calls, report, run, turns
from sparse_context.bench.blocks import bench_blocks
from sparse_context.bench.build import build_pipeline, build_transformer, draw_weights
from sparse_context.bench.calls import bench
from sparse_context.bench.config import BenchConfig
from sparse_context.bench.figures import Figures, Measurement, Setting, Spread
from sparse_context.bench.flops import call_flops, forward_flops, passes
from sparse_context.bench.methods import METHODS, downscaled_grid, make_pipes, merge_tokens, reference_tokens
from sparse_context.bench.report import compare, read_quality, table
from sparse_context.bench.shapes import SHAPES
from sparse_context.bench.turns import take_turns
from sparse_context.cli import main
from sparse_context.families import FAMILIES
from sparse_context.families.flux2.bench import FLUX2, shape_of
from sparse_context.families.shape import Shape, Tokens, with_blocks
from sparse_context.pipelines.memory import Peak
from sparse_context.pipelines.timing import timed
from sparse_context.tokens import ReferenceTokens

CALL = {"prompt": "the cat", "max_sequence_length": 12, "text_encoder_out_layers": [1, 2], "guidance_scale": 1.0}
SMALL = Shape(FLUX2, 2, 5, 20, 24, {}, head_size=128, channels=8)
OTHERS = ("flux3-klein", "kontext", "longcat-edit", "qwen-edit")


def small(name):
    """The real shape with one head and few blocks, so that a forward takes milliseconds."""
    shape = SHAPES[name]
    return dataclasses.replace(
        shape, heads=1, double_blocks=2, single_blocks=min(3, shape.single_blocks), text_width=24, channels=8, text=12
    )


@pytest.fixture(scope="module")
def pipe():
    return tiny.build_flux2(Flux2KleinPipeline, is_distilled=True)


# FLOPs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [False, True])
def test_flops_are_those_that_torch_counts(guidance):
    transformer = tiny.tiny_transformer(guidance)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in transformer.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    shape, tokens, cache = shape_of(transformer, tiny.TOKEN, 5, 2), Tokens(5, 7, 11), None
    for mode in (None, "extract", "cached"):
        image = 7 if mode == "cached" else 18
        extra = {None: {}, "extract": {"num_ref_tokens": 11}, "cached": {"kv_cache": cache}}[mode]
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the others are not counted
            made = transformer(
                hidden_states=torch.randn(1, image, 8),
                encoder_hidden_states=torch.randn(1, 5, shape.text_width),
                img_ids=torch.zeros(image, 4),
                txt_ids=torch.zeros(5, 4),
                timestep=torch.ones(1),
                guidance=torch.ones(1) if guidance else None,
                return_dict=False,
                kv_cache_mode=mode,
                **extra,
            )
        cache = made[-1] if mode == "extract" else cache
        assert counter.get_total_flops() == forward_flops(shape, tokens, mode) - 2 * shape.width * (256 - 32) * (
            (2 if mode == "extract" else 1) * (2 if guidance else 1)  # the tiny one's timesteps have 32 channels
        )


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("references", [0, 11, 1100])
def test_flops_of_every_kind_are_those_that_torch_counts(name, references):
    shape, tokens = small(name), Tokens(5, 7, references)
    transformer = build_transformer(shape, torch.device("cpu"), torch.bfloat16).eval()
    arguments = shape.kind.arguments(transformer, shape, tokens, None)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        (made,) = transformer(**arguments, return_dict=False)
    assert made.shape == (1, 7 if name == "flux3-klein" else 7 + references, 8) and made.isfinite().all()
    assert counter.get_total_flops() == forward_flops(shape, tokens)


@pytest.mark.parametrize(
    ("references", "ceiling", "fifth", "tenth", "kv", "fifth_kv"),
    [(1, 2.14, 1.77, 1.94, 1.58, 2.01), (2, 3.5, 2.46, 2.90, 1.99, 3.09), (4, 6.94, 3.67, 4.87, 2.53, 5.44)],
)
def test_what_klein_9b_can_gain(references, ceiling, fifth, tenth, kv, fifth_kv):
    """1024 x 1024 pixels, 4 steps."""

    def faster(keep, kv=False):
        tokens = [Tokens(512, 4096, round(k * 4096 * references)) for k in (1.0, keep)]
        shape = SHAPES["klein-9b"]
        return round(call_flops(shape, tokens[0], 4) / call_flops(shape, tokens[1], 4, kv), 2)

    assert (faster(0), faster(0.2), faster(0.1), faster(1.0, True)) == (ceiling, fifth, tenth, kv)
    assert faster(0.2, True) == fifth_kv


def test_a_call_is_made_of_its_forwards():
    some, none = Tokens(4, 9, 20), Tokens(4, 9, 0)
    assert passes(4, some, kv=False) == passes(4, none, kv=True) == [(None, 4)]
    assert passes(4, some, kv=True) == [("extract", 1), ("cached", 3)]
    assert passes(1, some, kv=True) == [("extract", 1)]
    assert call_flops(SMALL, some, 4) == 4 * forward_flops(SMALL, some)
    assert call_flops(SMALL, some, 4, kv=True) == forward_flops(SMALL, some, "extract") + 3 * forward_flops(
        SMALL, some, "cached"
    )


# Shapes --------------------------------------------------------------------------------------------------------------


def test_the_table_agrees_with_itself_and_with_diffusers():
    for shape in SHAPES.values():
        assert not shape.encoder or shape.text_width == 3 * shape.encoder["hidden_size"]
    with torch.device("meta"):
        default = shape_of(build_meta(), 16, 512, 28)
    assert default == dataclasses.replace(SHAPES["flux2-dev"])


def build_meta():
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel()


@pytest.mark.parametrize(("name", "billions"), [("klein-4b", 3.88), ("klein-9b", 9.08), ("flux2-dev", 32.22)])
def test_the_shapes_have_as_many_parameters_as_the_models(name, billions):
    shape = SHAPES[name]
    with torch.device("meta"):
        from diffusers import Flux2Transformer2DModel

        transformer = Flux2Transformer2DModel(
            num_layers=shape.double_blocks,
            num_single_layers=shape.single_blocks,
            num_attention_heads=shape.heads,
            joint_attention_dim=shape.text_width,
            guidance_embeds=shape.guidance,
        )
    assert round(sum(p.numel() for p in transformer.parameters()) / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("name", "own", "billions"),
    [
        ("kontext", {"guidance_embeds": True}, 11.90),
        ("longcat-edit", {"num_layers": 10, "num_single_layers": 20}, 6.27),
        ("qwen-edit", {}, 20.43),
        ("flux3-klein", {"flow_map": True}, 5.55),
    ],
)
def test_the_other_shapes_are_diffusers_own_but_for_what_the_table_says(name, own, billions):
    shape = SHAPES[name]
    with torch.device("meta"):
        transformer = shape.kind.build(shape)
    parameters = inspect.signature(type(transformer).__init__).parameters
    defaults = {key: one.default for key, one in parameters.items()}
    assert {key: value for key, value in transformer.config.items() if key in defaults} == {
        key: value for key, value in (defaults | own).items() if key != "self"
    }
    assert round(sum(p.numel() for p in transformer.parameters()) / 1e9, 2) == billions


def test_every_family_has_shapes_and_a_kind_of_transformer_is_of_one_family():
    kinds = {shape.kind.build.__module__.split(".")[-2] for shape in SHAPES.values()}
    assert kinds == {family.folder for family in FAMILIES.values()}
    assert len({shape.kind for shape in SHAPES.values()}) == 5
    assert list(SHAPES) == ["klein-4b", "klein-9b", "flux2-dev", *OTHERS]


def test_few_blocks_are_of_each_kind_that_a_shape_has():
    for name, blocks in (("klein-9b", (2, 2)), ("qwen-edit", (2, 0))):
        few = with_blocks(SHAPES[name], 2)
        assert (few.double_blocks, few.single_blocks) == blocks


def test_what_diffusers_keeps_in_float32_stays_in_it():
    transformer = build_transformer(small("flux3-klein"), torch.device("cpu"), torch.bfloat16)
    exact = {name for name, weight in transformer.named_parameters() if weight.dtype == torch.float32}
    assert len(exact) == 2 * (3 * 2 + 3) and all(".norm_q." in name or ".norm_k." in name for name in exact)


def test_drawn_weights_are_real_and_repeat():
    first, again = (build_transformer(SMALL, torch.device("cpu"), torch.bfloat16, blocks=1) for _ in range(2))
    assert len(first.transformer_blocks) == len(first.single_transformer_blocks) == 1
    for (name, weight), other in zip(first.named_parameters(), again.parameters(), strict=True):
        assert weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        assert torch.equal(weight, other) and weight.isfinite().all()
        assert weight.ndim < 2 or 0.019 < weight.float().std() < 0.021 or weight.numel() < 10_000, name
    with torch.device("meta"):
        vae = tiny.tiny_vae()
    draw_weights(vae, torch.device("cpu"), torch.float32)
    assert (vae.bn.running_var == 1).all() and (vae.bn.running_mean == 0).all()


# Methods -------------------------------------------------------------------------------------------------------------


def test_methods_share_the_weights_and_leave_the_pipeline_alone(pipe):
    before = {k: id(v) for k, v in vars(pipe).items()}
    processors = {k: type(v) for k, v in pipe.transformer.attn_processors.items()}
    pipes = make_pipes(pipe)
    assert type(pipes.plain) is Flux2KleinPipeline and type(pipes.kv) is Flux2KleinKVPipeline
    assert pipes.plain.config.is_distilled
    assert pipes.plain.transformer is pipe.transformer is not pipes.kv.transformer
    own, twin = dict(pipe.transformer.named_parameters()), dict(pipes.kv.transformer.named_parameters())
    assert own.keys() == twin.keys() and all(own[name] is twin[name] for name in own)
    assert {k: type(v) for k, v in pipe.transformer.attn_processors.items()} == processors
    assert {k: id(v) for k, v in vars(pipe).items()} == before
    assert make_pipes(tiny.build_flux2(Flux2Pipeline)).kv is None


def test_every_method_gives_the_transformer_as_many_tokens_as_it_says(pipe):
    pipes, references = make_pipes(pipe), [tiny.picture(64, 64), tiny.picture(96, 64, 1)]
    grids, keep, made = [(8, 8), (8, 12)], 0.3, {}
    counted = {
        "dense": 160,
        "kv": 160,
        "downscaled": 48,
        "merged": 48,
        "sparse": 48,
        "sparse_cached": 48,
        "sparse_kv": 48,
        "no_references": 0,
    }
    assert counted.keys() == METHODS.keys()
    for name, method in [*METHODS.items(), *METHODS.items()]:  # in turns: none leaves anything behind
        seen = []
        hooks = [turns.watch_tokens(h.transformer, seen, 8) for h in (pipes.plain, pipes.kv)]
        host, given = method.prepare(pipes, references, keep)
        generator = torch.Generator().manual_seed(0)
        call = {k: v for k, v in CALL.items() if k != "guidance_scale" or host is pipes.plain}
        out = host(
            image=given or None,
            height=64,
            width=64,
            num_inference_steps=2,
            output_type="latent",
            generator=generator,
            **call,
        ).images
        for hook in hooks:
            hook.remove()
        expected = reference_tokens(name, grids, keep)
        assert expected == pytest.approx(counted[name], abs=4)
        assert expected == counted[name] or name == "downscaled"
        later = 0 if method.kv else expected
        assert seen == [Tokens(12, 64, expected), Tokens(12, 64, later)]
        assert name not in made or torch.equal(made[name], out)
        made[name] = out
    plain = pipe(
        image=references,
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **CALL,
    ).images
    assert torch.equal(made["dense"], plain)
    assert torch.equal(made["sparse"], made["sparse_cached"])
    assert pipes.cache.hits == 4


@pytest.mark.parametrize(
    ("grid", "keep", "smaller"),
    [((16, 16), 0.15, (6, 6)), ((64, 64), 0.2, (29, 29)), ((64, 64), 0.1, (20, 20)), ((8, 12), 0.25, (4, 6))],
)
def test_downscaled_grids_keep_the_shape(grid, keep, smaller):
    rows, columns = downscaled_grid(grid, keep)
    assert abs(rows * columns / (keep * grid[0] * grid[1]) - 1) <= 0.1
    assert (rows, columns) == smaller


def grid_tokens(rows, columns, latents):
    ids = torch.cartesian_prod(torch.tensor([10]), torch.arange(rows), torch.arange(columns), torch.tensor([0]))
    return ReferenceTokens(latents, ids)


def test_merging_joins_what_is_alike_at_its_centre():
    latents = torch.zeros(1, 4, 4, 2)
    latents[:, :, 2:] = 5
    merged = merge_tokens(grid_tokens(4, 4, latents.view(1, 16, 2)), [(4, 4)], 2 / 16)
    assert merged.latents.tolist() == [[[0, 0], [5, 5]]]
    assert merged.ids.tolist() == [[10, 1.5, 0.5, 0], [10, 1.5, 2.5, 0]]
    latents[:, 3, 0] = 100  # what is unlike all others stays alone
    merged = merge_tokens(grid_tokens(4, 4, latents.view(1, 16, 2)), [(4, 4)], 6 / 16)
    assert [10, 3, 0, 0] in merged.ids.tolist() and [100, 100] in merged.latents[0].tolist()


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 1), (5, 7), (16, 16)])
def test_merging_reaches_every_count_and_keeps_the_mean(grid):
    tokens = grid_tokens(*grid, torch.randn(2, grid[0] * grid[1], 3))
    for count in range(1, len(tokens) + 1, max(1, len(tokens) // 7)):
        merged = merge_tokens(tokens, [grid], count / len(tokens))
        assert len(merged) == count and (merged.ids[:, 0] == 10).all()
    (whole,) = merge_tokens(tokens, [grid], 1e-9).latents[0]
    assert torch.allclose(whole, tokens.latents[0].mean(0), atol=1e-5)


def test_merging_treats_each_reference_alone():
    tokens = grid_tokens(4, 4, torch.randn(1, 16, 3))
    both = ReferenceTokens(torch.cat([tokens.latents] * 2, 1), torch.cat([tokens.ids, tokens.ids + 10]))
    apart = merge_tokens(both, [(4, 4), (4, 4)], [0.25, 1.0])
    assert len(apart) == 4 + 16 and torch.equal(apart.latents[:, 4:], both.latents[:, 16:])
    merged = merge_tokens(both, [(4, 4), (4, 4)], 0.5)
    assert torch.equal(merged.latents[:, :8], merged.latents[:, 8:])
    assert torch.equal(merged.ids[8:], merged.ids[:8] + 10)


# The benchmark -------------------------------------------------------------------------------------------------------


def test_turns_are_interleaved_and_the_first_does_not_count():
    order = []
    jobs = [lambda first, name=name: order.append((name, first)) or name for name in "ab"]
    assert take_turns(jobs, BenchConfig(turns=2)) == [["a", "a"], ["b", "b"]]
    assert order == [("a", True), ("b", True)] + [("a", False), ("b", False)] * 2
    assert take_turns(jobs, BenchConfig(turns=9, minutes=1e-9)) == [["a"], ["b"]]


def test_ratios_are_taken_within_a_turn():
    tokens = [Tokens(5, 10, n) for n in (20, 0)]
    rows = [
        Measurement(Setting(8, 1, method, None), t, {"denoise": s, "total": s})
        for method, t, s in zip(("dense", "no_references"), tokens, ([8.0, 3.0, 9.0], [2.0, 3.0, 1.0]), strict=True)
    ]
    first, second = compare(rows, SMALL)
    assert first.speedup["denoise"] == Spread(median=1, min=1, max=1)
    assert second.speedup["denoise"] == Spread(median=4, min=1, max=9)
    assert second.seconds["total"] == Spread(median=2, min=1, max=3)
    predicted = call_flops(SMALL, Tokens(5, 10, 20), 4) / call_flops(SMALL, Tokens(5, 10, 0), 4)
    assert second.flops_speedup == round(predicted, 3) and second.share_of_flops == round(4 / predicted, 3)
    assert (first.share_of_ceiling, second.share_of_ceiling) == (0.25, 1)


def test_whole_calls(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "call_settings", lambda pipe: {**CALL, "num_inference_steps": 2})
    config = BenchConfig(references=(1, 3), keep=(0.5, 0.25), size=(64,), turns=1)
    figures = bench(pipe, [tiny.picture(40, 50)], "the cat", config)
    assert (figures.turns, figures.steps) == (1, 2)
    rows = {(row.references, row.method, row.keep): row for row in figures.rows}
    assert len(rows) == len(figures.rows) == 2 * (3 + 5 * 2)
    assert rows[3, "sparse", 0.25].tokens == Tokens(text=12, output=64, references=48)
    assert rows[3, "dense", None].tokens.references == 192
    for row in figures.rows:
        medians = {phase: seconds.median for phase, seconds in row.seconds.items()}
        assert medians["total"] >= medians["denoise"] > 0 and medians["text"] > 0 and medians["decode"] > 0
        assert (medians["encode"] > 0) == (row.method not in ("no_references", "sparse_cached"))
        assert (medians["selection"] > 0) == (row.method.startswith("sparse") or row.method == "merged")
        assert row.memory.keys() <= {"text", "encode", "denoise", "decode"}
    assert len(table(figures).splitlines()) == 1 + len(rows)
    assert Figures(**json.loads(json.dumps(dataclasses.asdict(figures)))) == figures
    pytest.importorskip("matplotlib")
    point = {"method": "sparse", "keep": 0.25, "references": 3, "value": 0.9, "metric": "SSIM"}
    (tmp_path / "quality.json").write_text(json.dumps([point]))
    report.plot(figures, tmp_path / "plot.png", read_quality(tmp_path / "quality.json"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    alone = dataclasses.replace(figures, rows=[row for row in figures.rows if row.references == 3])
    unknown = point | {"keep": 0.1}  # which no row has
    for of, known, panels in ((figures, point, 2), (figures, unknown, 1), (alone, point, 1), (alone, unknown, 1)):
        report.plot(of, tmp_path / "plot.png", [known])
        with Image.open(tmp_path / "plot.png") as drawn:
            assert drawn.width == panels * 768


RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize("path", [*RESULTS.glob("bench_*.json"), RESULTS / "choosing_gpu.json"], ids=lambda p: p.stem)
def test_published_benchmarks_are_read_as_records(path):
    figures = Figures(**json.loads(path.read_text(encoding="utf-8"))["figures"])
    dense = [row for row in figures.rows if row.method == "dense"]
    assert dense and all(spread == Spread(1, 1, 1) for row in dense for spread in row.speedup.values())


@pytest.mark.parametrize("change", [{"keep": [0.2]}, {"value": "good"}, {"references": "4"}, {"method": None}])
def test_quality_that_could_not_be_drawn_is_refused(tmp_path, change):
    point = {"method": "sparse", "keep": None, "references": 4, "value": 1, "metric": "PSNR"}
    (tmp_path / "quality.json").write_text(json.dumps([point]))
    assert read_quality(tmp_path / "quality.json") == [point]
    (tmp_path / "quality.json").write_text(json.dumps([point, point | change]))
    with pytest.raises(ValueError, match="quality.json holds no quality figures: pass a JSON list of"):
        read_quality(tmp_path / "quality.json")


def test_quality_that_may_not_be_read_is_told_so(tmp_path, monkeypatch):
    (tmp_path / "quality.json").write_text("[]")

    def refused(path, **given):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(ValueError, match=r"quality.json cannot be read \(Permission denied\): make it readable\.$"):
        read_quality(tmp_path / "quality.json")


def test_what_ends_a_call_before_its_first_step_is_what_is_raised(monkeypatch):
    pipe = tiny.build_flux2(Flux2KleinPipeline, is_distilled=True)
    monkeypatch.setattr(calls, "_call", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    config = BenchConfig(references=(1,), keep=(0.25,), methods=("sparse",), turns=1, steps=1, size=(64,))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        bench(pipe, [Image.new("RGB", (64, 64))], "x", config)


def test_watchers_of_shared_parts_may_leave_in_any_order():
    first = tiny.build_flux2(Flux2KleinPipeline, is_distilled=True)
    second = Flux2KleinPipeline(**first.components)
    before = dict(vars(first.vae))
    one, two = timed(first), timed(second)
    one.__enter__()
    two.__enter__()
    first.vae.encode(torch.zeros(1, 3, 32, 32))
    one.__exit__(None, None, None)
    with timed(first) as times:
        first.vae.encode(torch.zeros(1, 3, 32, 32))
    assert times.encode > 0 == times.decode
    two.__exit__(None, None, None)
    assert vars(first.vae) == before


def test_a_plot_without_matplotlib_is_refused_before_anything_is_timed(monkeypatch, tmp_path):
    monkeypatch.setattr("sparse_context.evaluation.plots.find_spec", lambda name: None)
    monkeypatch.setattr(run, "bench", lambda *args: pytest.fail("it was timed"))
    with pytest.raises(ValueError, match=r"A plot needs matplotlib: pip install 'sparse-context\[plots\]'"):
        run.run_bench(BenchConfig(), plot_to=tmp_path / "plot.png")


ENCODER = {
    "num_hidden_layers": 28,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 151_936,
    "hidden_size": 4,
    "intermediate_size": 8,
}


@pytest.mark.parametrize("encoder", [ENCODER, {}])
def test_a_pipeline_of_a_shape_makes_whole_calls(encoder):
    """With a text encoder, of which klein takes layers 9, 18 and 27, and without, where embeddings are drawn."""
    shape = Shape(FLUX2, 1, 1, 1, 12, encoder, steps=2, guidance=not encoder)
    pipe = build_pipeline(shape, torch.device("cpu"), torch.float32)
    assert type(pipe) is (Flux2KleinPipeline if encoder else Flux2Pipeline)
    assert (pipe.text_encoder is None) == (not encoder) and pipe.transformer.config.num_single_layers == 1
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    methods = {"dense": 16, "sparse": 4} | ({"sparse_kv": 4} if encoder else {})  # FLUX.2 dev has no pipeline for KV
    config = BenchConfig(references=(1,), keep=(0.25,), size=(64,), turns=1, steps=2, methods=tuple(methods))
    figures = bench(pipe, [tiny.picture(64, 64)], "a cat", config)
    assert figures.steps == 2 and {row.method: row.tokens for row in figures.rows} == {
        method: Tokens(text=512, output=16, references=references) for method, references in methods.items()
    }
    drawn = torch.randn(1, 512, 12, generator=torch.Generator().manual_seed(0))
    assert len(seen) == 2 * 2 * len(methods)  # the warm-up and a turn of two steps
    assert all(torch.equal(embeds, seen[0]) for embeds in seen) and torch.equal(seen[0], drawn) == (not encoder)


def test_blocks_alone():
    config = BenchConfig(references=(2,), keep=(0.25,), size=(64,), turns=2)
    figures = bench_blocks(SMALL, 1, torch.device("cpu"), torch.float32, config)
    assert (figures.blocks, figures.of, figures.turns) == ((1, 1), (5, 20), 2)
    rows = {row.method: row for row in figures.rows}
    assert {name: row.tokens.references for name, row in rows.items()} == {
        "dense": 32,
        "kv": 32,
        "sparse": 8,
        "sparse_kv": 8,
        "no_references": 0,
    }
    for row in figures.rows:
        assert row.seconds.keys() == {"denoise"} and row.tokens.text == 512
        assert row.extrapolated == pytest.approx(12.5 * row.seconds["denoise"].median, rel=0.01, abs=0.002)
    assert table(figures)


@pytest.mark.parametrize("name", OTHERS)
def test_blocks_of_every_kind(name):
    shape, config = small(name), BenchConfig(references=(2,), keep=(0.25,), size=(64,), turns=1)
    figures = bench_blocks(shape, 1, torch.device("cpu"), torch.bfloat16, config)
    assert figures.blocks == (1, 0 if name == "qwen-edit" else 1) and figures.steps == SHAPES[name].steps
    assert {row.method: row.tokens.references for row in figures.rows} == {
        "dense": 32,
        "sparse": 8,
        "no_references": 0,
    }
    assert all((row.extrapolated is not None) == (name != "flux3-klein") for row in figures.rows)
    assert table(figures)


def test_peak_memory_on_a_cpu():
    peak = Peak(torch.device("cpu"))
    if peak.read() is None:
        pytest.skip("this system does not tell")
    held = torch.ones(16 * 2**20)
    assert peak.read() >= 60 * 2**20
    del held
    peak.reset()
    assert peak.read() < 60 * 2**20
    # What small pieces left in the allocator is not there for the next phase to take
    pieces = [torch.ones(2**15) for _ in range(512)]
    last = pieces[-1]  # above which the heap would shrink by itself
    del pieces
    peak = Peak(torch.device("cpu"))
    pieces = [torch.ones(2**15) for _ in range(512)]
    assert peak.read() >= 60 * 2**20 and len(pieces) == 512 and last.numel() == 2**15


# What our patch adds -------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """The names of the operations that were run, and copies between devices: from, to, and whether without waiting."""

    def __init__(self):
        super().__init__()
        self.names, self.copies = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        made = function(*args, **(kwargs or {}))
        if "_to_copy" in str(function) and made.device != args[0].device:
            self.copies.append((args[0].device.type, made.device.type, (kwargs or {}).get("non_blocking")))
        return made


def test_at_keep_1_the_denoise_loop_has_not_one_operation_more(pipe):
    counts = []
    for apply in (lambda: None, lambda: apply_sparse_context(pipe, keep=1.0)):
        apply()
        seen = []
        forward = pipe.transformer.forward

        def watched(*args, forward=forward, seen=seen, **kwargs):
            seen.append(len(operations.names))
            return forward(*args, **kwargs)

        pipe.transformer.forward = watched
        with Operations() as operations:
            pipe(
                image=[tiny.picture(64, 64)] * 2,
                height=64,
                width=64,
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(0),
                **CALL,
            )
        del pipe.transformer.forward
        counts.append((operations.names[seen[0] :], len(operations.names) - seen[0]))
    assert counts[0] == counts[1] and counts[0][1] > 1000


@pytest.mark.parametrize("cache", [None, ReferenceCache()])
def test_nothing_waits_for_the_device(pipe, cache):
    """Choosing and dropping read no value back from a tensor, and what goes to the device goes without waiting."""
    apply_sparse_context(pipe, keep=0.2, cache=cache)
    pixels = torch.rand(1, 3, 64, 64)
    with Operations() as operations:
        pipe.prepare_image_latents([pixels], 1, generator=None, device=torch.device("cpu"), dtype=torch.float32)
    assert not [name for name in operations.names if "_local_scalar_dense" in name or "nonzero" in name]
    tokens = ReferenceTokens(torch.empty(1, 9, 4, device="meta"), torch.empty(1, 9, 4, device="meta"))
    with Operations() as operations:
        assert len(tokens.keep(np.array([1, 4, 8]))) == 3
    assert operations.copies == [("cpu", "meta", True)] * 2


def test_blocks_are_not_compiled_anew_for_every_count():
    """Counts of many kinds make one graph for each kind of block, and `multiple_of` makes few counts of many."""
    torch._dynamo.reset()
    pipe = tiny.build_flux2(Flux2KleinPipeline, is_distilled=True)
    torch._dynamo.utils.counters.clear()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager", dynamic=True)
    for keep in (0.2, 0.3, 0.4, 0.5, 0.7):
        apply_sparse_context(pipe, keep=keep)
        tiny.call_flux2(pipe, [tiny.picture(64, 64)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    kept = set()
    for seed in range(6):
        apply_sparse_context(pipe, keep="auto", multiple_of=16, selector="edges")
        tiny.call_flux2(pipe, [tiny.picture(64, 64, seed), tiny.picture(96, 64, seed + 6)])
        kept.add(pipe._sparse_context.selection.kept)
    assert all(count % 16 == 0 for count in kept)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


# The command ---------------------------------------------------------------------------------------------------------


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["sparse-context", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--random-weights", "klein-5b"], "--random-weights is 'klein-5b': choose klein-4b, klein-9b, flux2-dev"),
        (["--random-weights", "klein-4b", "-m", "x/y"], "A model and --random-weights were given: choose one"),
        (["--blocks", "1"], "blocks is for shapes: name one with --random-weights."),
        (["--random-weights", "klein-4b", "--blocks", "0"], "blocks is 0: pass a number above 0."),
        (
            ["--random-weights", "kontext"],
            "--random-weights is 'kontext', of which only blocks can be timed: pass blocks.",
        ),
        (
            ["--random-weights", "qwen-edit", "--blocks", "1", "--method", "kv"],
            "method is 'kv', and only FLUX.2 reuses",
        ),
        (["--keep", "1"], "keep is 1.0: pass a ratio above 0 and below 1."),
        (["--keep", "nan"], "keep is nan: pass a ratio above 0 and below 1."),
        (["--references", "0"], "references is 0: pass a number above 0."),
        (["--references", "9"], "references is 9, and this model takes at most"),
        (["--method", "magic"], "method is 'magic': choose among dense, kv"),
        (["--turns", "0"], "turns is 0: pass a number above 0."),
        (["--minutes", "nan"], "minutes is nan: pass a number above 0."),
        (["--steps", "0"], "steps is 0: pass a number above 0."),
        (["--size", "100"], "size is 100: this model makes multiples of 8."),
        (["--dtype", "int8"], "dtype is 'int8': choose auto"),
        (["--device", "cuda:99"], "device is 'cuda:99', but this machine has"),
        (["--output", "no/where.json"], "'no/where.json' cannot be written: the folder"),
        (["--output", "."], "'.' is a folder; give the name of a file inside it"),
        (["--plot", "no/where.png"], "cannot be written: the folder"),
        (["--plot", "p.png", "--quality", "missing.json"], "missing.json does not exist: pass a JSON list of"),
        (["--plot", "p.png", "--quality", "."], ". is a folder: pass a JSON list of"),
    ],
)
def test_bad_input_is_one_sentence(monkeypatch, capsys, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(monkeypatch, capsys, "--device", "cpu", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("sparse-context: ") and says in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_shapes_and_imports_nothing_heavy_for_it():
    script = (
        "import sys; from sparse_context.cli import app; app(['bench', '--help'], standalone_mode=False); "
        "print(sorted({'torch', 'diffusers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ",".join(SHAPES) in "".join(done.stdout.split())  # whose lines also end at hyphens
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_command(monkeypatch, capsys, tmp_path, tiny_model):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(
        monkeypatch,
        capsys,
        "-m",
        tiny_model,
        "--device",
        "cpu",
        "--references",
        2,
        "--keep",
        0.5,
        "--method",
        "sparse",
        "--turns",
        1,
        "--output",
        "bench.json",
    )
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split()[2] for line in lines[1:3]] == ["dense", "sparse"] and lines[-1] == "wrote bench.json"
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["name"] == "bench" and result["config"]["references"] == [2] and result["config"]["device"] == "cpu"
    assert [row["tokens"]["references"] for row in result["figures"]["rows"]] == [128, 64]
    turn = sum(row["seconds"]["total"]["median"] for row in result["figures"]["rows"])
    assert result["figures"]["took"] > turn and lines[-2].startswith("1 turn after the warm-up, in ")


def test_the_embedded_model_sees_references_in_the_size_of_their_task():
    from sparse_context.embedded.demo import read_examples
    from sparse_context.pipelines.load import load
    from sparse_context.pipelines.spec import ModelSpec

    scene = next(e for e in read_examples() if len(e["references"]) == 4)
    config = BenchConfig(references=(1, 2), keep=(0.25,), methods=("dense", "sparse"), turns=1, steps=1)
    rows = bench(load(ModelSpec(device="cpu")), scene["references"], scene["prompt"], config).rows
    seen = {(row.references, row.method): row.tokens.references for row in rows}
    assert seen == {(1, "dense"): 256, (1, "sparse"): 64, (2, "dense"): 1152, (2, "sparse"): 288}
