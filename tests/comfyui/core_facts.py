"""Facts about the nodes' patch on tiny models in a real core, as JSON on the last line: name -> value or error.

A process of its own (`runs/comfyui_core.py` says why). `test_core.py` reads the facts and judges them.
"""

import json
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "runs")]

import comfyui_core as core  # noqa: E402

WANTED = sys.argv[1:]
VERSION = core.start_core()
core.load_pack()

import comfy.ldm.qwen_image.model as qwen  # noqa: E402
import comfy_extras.nodes_flux as nodes_flux  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402
from sparse_context_nodes.choosing import References, Settings, choose, needs_details  # noqa: E402
from sparse_context_nodes.families import FAMILIES, place_overviews  # noqa: E402
from sparse_context_nodes.patch import COUNTS, KEY, SparsePatch, install  # noqa: E402

FACTS = {}
NOTHING = References()
GRIDS = {"one": [(8, 8)], "two": [(8, 8), (6, 10)]}


def fact(function):
    FACTS[function.__name__] = function
    return function


class Undropped(SparsePatch):
    """The oracle's half: overviews at their places, and every token still there."""

    def __call__(self, args):
        options = args["transformer_options"]
        chosen = options[KEY]
        target = args["img_ids"].shape[1] - sum(options[COUNTS])
        ids = place_overviews(args["img_ids"][:, target:], chosen.grids, chosen.overviews, self.family)
        args["img_ids"] = torch.cat([args["img_ids"][:, :target].float(), ids], dim=1)
        return args


class Shifted(SparsePatch):
    """A patch with a bug: the position ids of kept tokens are those of their neighbours."""

    def __call__(self, args):
        args = super().__call__(args)
        target = args["img_ids"].shape[1] - sum(args["transformer_options"][COUNTS])
        args["img_ids"] = torch.cat([args["img_ids"][:, :target], args["img_ids"][:, target:].roll(1, 1)], dim=1)
        return args


def patched(model, kind, settings, cls=SparsePatch, references=NOTHING, told=None):
    """A clone of a model with a patch, and the patch."""

    def chooser(grids, details, kv):
        return choose(settings, references, grids, details)

    patch = cls(
        chooser,
        FAMILIES[kind],
        model.model.diffusion_model.patch_size,
        ([] if told is None else told).append,
        needs_details(settings, references),
    )
    return install(model, patch, WrappersMP.OUTER_SAMPLE, WrappersMP.DIFFUSION_MODEL), patch


def dropped_keys(patch):
    """Bool over text, output, references and overviews: the keys that the sparse model does not have."""
    (selection,), forward = patch.last.selections, next(iter(patch.last.forwards))
    sharp = [~each.mask.ravel() for each in selection.references]
    coarse = [np.zeros(each.overview.tokens, bool) for each in selection.references if each.overview]
    return torch.from_numpy(np.concatenate([np.zeros(forward.text + forward.output, bool), *sharp, *coarse]))


def with_mask(model, kind, dropped):
    """A clone whose every attention leaves out these keys. (Qwen-Image takes no such mask: `masking` gives it one.)"""
    clone = model.clone()
    if kind == "qwen_image":
        return clone

    def wrapper(executor, *args, **kwargs):
        length = len(dropped)
        mask = torch.zeros(1, 1, length, length).masked_fill(dropped, float("-inf"))
        return executor(*args, **{**kwargs, "attention_mask": mask})

    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "oracle", wrapper)
    return clone


class masking:  # noqa: N801
    """Within it, Qwen-Image's attention leaves out the keys `dropped`."""

    def __init__(self, kind, dropped):
        self.kind, self.dropped = kind, dropped

    def __enter__(self):
        self.attention = qwen.optimized_attention_masked

        def attention(query, key, value, heads, mask, **more):
            assert mask is None
            length = len(self.dropped)
            mask = torch.zeros(1, 1, length, length).masked_fill(self.dropped, float("-inf"))
            return self.attention(query, key, value, heads, mask, **more)

        if self.kind == "qwen_image":
            qwen.optimized_attention_masked = attention

    def __exit__(self, *error):
        qwen.optimized_attention_masked = self.attention


def compare(kind, method, settings, grids, batch=1, guided=False):
    """Dense, sparse, masked and buggy answers to one call, and how far they are apart."""
    model = core.build(kind)
    references = [core.draw_latents(kind, *grid, seed=i + 1) for i, grid in enumerate(grids)]
    positive = core.draw_prompt(references, method)
    negative = core.draw_prompt(references, method, seed=1) if guided else None
    latent = core.draw_latents(kind, 8, 8, batch)

    def answer(model):
        return core.sample(model, latent, positive, negative)

    dense = answer(model)
    sparse_model, patch = patched(model, kind, settings)
    sparse = answer(sparse_model)
    run = patch.last
    undropped, _ = patched(model, kind, settings, Undropped)
    dropped = dropped_keys(patch)
    with masking(kind, dropped):
        masked = answer(with_mask(undropped, kind, dropped))
    buggy = answer(patched(model, kind, settings, Shifted)[0])
    (forward, times), *others = run.forwards.items()
    return {
        "size": dense.abs().max().item(),
        "masked": (sparse - masked).abs().max().item(),
        "dense": (sparse - dense).abs().max().item(),
        "wrong ids": (buggy - masked).abs().max().item(),
        "untouched": torch.equal(dense, answer(model)),
        "kinds": 1 + len(others),
        "times": times,
        "forward": list(forward),
        "kept": [kept.count for kept in run.selections[0].references],
        "overviews": [kept.overview.tokens if kept.overview else 0 for kept in run.selections[0].references],
        "dropped": int(dropped.sum()),
    }


for _kind, _methods in core.METHODS.items():
    for _method in _methods:
        FACTS[f"masked {_kind} {_method}"] = lambda kind=_kind, method=_method: compare(
            kind, method, Settings(keep=0.25), GRIDS["two"]
        )
    FACTS[f"batch {_kind}"] = lambda kind=_kind: compare(
        kind, None, Settings(keep=0.25, selector="random", seed=3), GRIDS["two"], batch=2, guided=True
    )
    FACTS[f"each {_kind}"] = lambda kind=_kind: compare(kind, None, Settings(keep_each="0.5, 7"), GRIDS["two"])
    FACTS[f"overview {_kind}"] = lambda kind=_kind: compare(kind, None, Settings(keep=0.25, overview=4), GRIDS["two"])
    FACTS[f"spread {_kind}"] = lambda kind=_kind: compare_spread(kind)


def compare_spread(kind):
    """As `compare`, with overviews that weights were trained for."""
    from sparse_context.trained import Trained

    trained, plain = Trained((4,), "spread"), globals()["choose"]
    globals()["choose"] = lambda *args: plain(*args, trained)
    try:
        return compare(kind, None, Settings(keep=0.25), GRIDS["two"])
    finally:
        globals()["choose"] = plain


def keep_all(kind):
    model = core.build(kind)
    references = [core.draw_latents(kind, *grid, seed=i + 1) for i, grid in enumerate(GRIDS["two"])]
    positive, latent = core.draw_prompt(references), core.draw_latents(kind, 8, 8)
    clone, patch = patched(model, kind, Settings(keep=1.0))
    equal = torch.equal(core.sample(model, latent, positive), core.sample(clone, latent, positive))
    return {"equal": equal, "kept": patch.last.selections[0].kept}


def odd_sides(kind):
    """References whose latents do not divide into whole tokens."""
    model = core.build(kind)
    reference = core.draw_latents(kind, 8, 7, seed=1)[..., :-1]
    positive, latent = core.draw_prompt([reference]), core.draw_latents(kind, 8, 8)
    clone, patch = patched(model, kind, Settings(keep=0.25, overview=4))
    made = core.sample(clone, latent, positive)
    return {
        "finite": bool(torch.isfinite(made).all()),
        "problems": patch.last.problems,
        "grid": patch.last.selections[0].references[0].grid,
    }


for _kind in core.KINDS:
    FACTS[f"all {_kind}"] = lambda kind=_kind: keep_all(kind)
for _kind in ("flux", "qwen_image"):
    FACTS[f"odd {_kind}"] = lambda kind=_kind: odd_sides(kind)


@fact
def kv_cache():
    return compare_kv(Settings(keep=0.25))


@fact
def kv_overview():
    return compare_kv(Settings(keep=0.25, overview=4))


def compare_kv(settings):
    """FluxKVCache before and behind the patch, over three steps, and what it makes of masked keys."""
    model = core.build("flux2")
    references = [core.draw_latents("flux2", *grid, seed=i + 1) for i, grid in enumerate(GRIDS["two"])]
    positive, latent = core.draw_prompt(references), core.draw_latents("flux2", 8, 8)

    def cached(model):
        return nodes_flux.FluxKVCache.execute(model).args[0]

    def answer(model):
        return core.sample(model, latent, positive, steps=3)

    def forwards(patch):
        return [[list(forward), times] for forward, times in patch.last.forwards.items()]

    behind, patch = patched(cached(model), "flux2", settings)
    before, early = patched(model, "flux2", settings)
    first, second = answer(behind), answer(cached(before))
    found = {"behind": forwards(patch), "before": forwards(early)}
    dropped = dropped_keys(patch)
    undropped, _ = patched(cached(model), "flux2", settings, Undropped)
    steps = 0

    def mask(executor, *args, **kwargs):
        """Queries of references are there in the first step alone."""
        nonlocal steps
        steps += 1
        references = len(dropped) - patch.last.forwards.most_common()[0][0].text - 64
        queries = len(dropped) - (references if steps > 1 else 0)
        masked = torch.zeros(1, 1, queries, len(dropped)).masked_fill(dropped, float("-inf"))
        return executor(*args, **{**kwargs, "attention_mask": masked})

    undropped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "oracle", mask)
    return found | {
        "orders": (first - second).abs().max().item(),
        "masked": (first - answer(undropped)).abs().max().item(),
        "dense": (first - answer(cached(model))).abs().max().item(),
        "without": (first - answer(before)).abs().max().item(),
    }


@fact
def no_references():
    told, model = [], core.build("flux2")
    positive, latent = core.draw_prompt([]), core.draw_latents("flux2", 8, 8)
    clone, patch = patched(model, "flux2", Settings(), told=told)
    return {
        "equal": torch.equal(core.sample(model, latent, positive), core.sample(clone, latent, positive)),
        "told": told,
    }


@fact
def several_conditionings():
    """A positive prompt with two references and a negative one with none, each in a forward of its own."""
    model, told = core.build("flux2"), []
    references = [core.draw_latents("flux2", *grid, seed=i + 1) for i, grid in enumerate(GRIDS["two"])]
    positive, negative = core.draw_prompt(references), core.draw_prompt([], seed=1)
    clone, patch = patched(model, "flux2", Settings(keep=0.25), told=told)
    core.sample(clone, core.draw_latents("flux2", 8, 8), positive, negative)
    return {"told": told, "forwards": list(patch.last.forwards.values())}


@fact
def wrong_number():
    """Two pictures and one reference: the answer of the untouched model, and one sentence."""
    model, told = core.build("flux2"), []
    picture = np.zeros((128, 128, 3), np.uint8)
    positive, latent = core.draw_prompt([core.draw_latents("flux2", 8, 8, seed=1)]), core.draw_latents("flux2", 8, 8)
    clone, _ = patched(model, "flux2", Settings(), references=References([[picture], [picture]]), told=told)
    return {
        "equal": torch.equal(core.sample(model, latent, positive), core.sample(clone, latent, positive)),
        "told": told,
    }


@fact
def applied_twice():
    """A second patch takes the place of the first."""
    model = core.build("flux2")
    positive = core.draw_prompt([core.draw_latents("flux2", 8, 8, seed=1)])
    latent = core.draw_latents("flux2", 8, 8)
    first, _ = patched(model, "flux2", Settings(keep=0.75))
    second, patch = patched(first, "flux2", Settings(keep=0.25))
    alone, _ = patched(model, "flux2", Settings(keep=0.25))
    return {
        "equal": torch.equal(core.sample(second, latent, positive), core.sample(alone, latent, positive)),
        "kept": patch.last.selections[0].kept,
    }


@fact
def compiled():
    """With torch.compile around the forward, as TorchCompileModel puts it (here without a code generator)."""
    import comfy_api.torch_helpers

    model = core.build("flux2")
    positive = core.draw_prompt([core.draw_latents("flux2", 8, 8, seed=1)])
    latent = core.draw_latents("flux2", 8, 8)
    clone, _ = patched(model, "flux2", Settings(keep=0.25))
    compiled = clone.clone()
    comfy_api.torch_helpers.set_torch_compile_wrapper(model=compiled, backend="eager")
    apart = core.sample(clone, latent, positive) - core.sample(compiled, latent, positive)
    return {"apart": apart.abs().max().item()}


def main():
    facts = {"version": VERSION}
    for name, function in FACTS.items():
        if WANTED and not any(part in name for part in WANTED):
            continue
        try:
            facts[name] = function()
        except Exception:
            facts[name] = {"error": traceback.format_exc()}
    print("\n" + json.dumps(facts))


main()
