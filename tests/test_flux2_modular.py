"""The drop as a block of modular FLUX.2, for pipelines that are built with it."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import diffusers.utils.dynamic_modules_utils as dynamic_modules
import numpy as np
import pytest
import torch
from diffusers import (
    Flux2AutoBlocks,
    Flux2KleinAutoBlocks,
    Flux2KleinBaseAutoBlocks,
    Flux2KleinBaseModularPipeline,
    Flux2KleinModularPipeline,
    Flux2KleinPipeline,
    Flux2ModularPipeline,
    Flux3AutoBlocks,
    ModularPipelineBlocks,
)
from diffusers.commands.custom_blocks import CustomBlocksCommand
from PIL import Image
from tiny import build_flux2, build_flux2_modular, call_flux2, call_flux2_modular, picture, watch_inputs

from sparse_context import SparseContextConfig, apply_sparse_context, last_selection, mask
from sparse_context.families.flux2.modular import DIALS, SparseContextStep, _all_blocks, insert_sparse_context

PACKAGED = Path(__file__).parents[1] / "examples" / "flux2_modular"
BLOCKS = {
    Flux2ModularPipeline: Flux2AutoBlocks,
    Flux2KleinModularPipeline: Flux2KleinAutoBlocks,
    Flux2KleinBaseModularPipeline: Flux2KleinBaseAutoBlocks,
}


@pytest.fixture
def references():
    return [picture(64, 64), picture(96, 72, 1), picture(64, 120, 2)]


@pytest.mark.parametrize("cls", BLOCKS, ids=lambda cls: cls.__name__)
def test_the_pipeline_takes_keep(cls, references):
    dense = build_flux2_modular(BLOCKS[cls](), cls)
    built = build_flux2_modular(insert_sparse_context(BLOCKS[cls]()), cls)
    assert {"keep", "selector", "task", "coverage", "merge"} <= set(built.blocks.input_names)
    whole = call_flux2_modular(dense, references)
    assert torch.equal(call_flux2_modular(built, references, keep=1.0), whole)
    assert torch.equal(call_flux2_modular(built, []), call_flux2_modular(dense, []))
    # What the step keeps is what apply_sparse_context keeps
    applied = build_flux2_modular(BLOCKS[cls](), cls)
    for settings in (
        {},
        {"keep": 0.3},
        {"keep": [4, 5, 6], "selector": "edges", "coverage": 0.2},
        {"task": "edit", "merge": 0.5},
        {"keep": 0.3, "overview": 4},
        {"keep": [0.3, 0.2, 0.1], "overview": ["auto", None, 4], "overview_layout": "spread"},
        {"overview": None},
    ):
        apply_sparse_context(applied, **settings)
        expected = call_flux2_modular(applied, references)
        assert torch.equal(call_flux2_modular(built, references, **settings), expected)
        assert not torch.equal(expected, whole)


def test_it_tells_what_it_kept(references):
    built = build_flux2_modular(insert_sparse_context(Flux2KleinAutoBlocks()))
    seen = []
    watch_inputs(built.transformer, seen)
    state = built(prompt_embeds=torch.zeros(1, 12, 32), image=references, height=64, width=64, num_inference_steps=1)
    selection = state.get("selection")
    assert [kept.grid for kept in selection.references] == [(8, 8), (9, 12), (15, 8)]
    assert selection.kept == sum(round(0.2 * size) for size in (64, 108, 120))
    assert [tokens for tokens, _ in seen] == [64 + selection.kept]
    state = built(prompt_embeds=torch.zeros(1, 12, 32), height=64, width=64, num_inference_steps=1)
    assert state.get("selection") is None


def test_it_is_the_plain_pipeline(references):
    """Transformer outputs at every step, on the same parts: dense, and under every way to choose."""
    plain = build_flux2(Flux2KleinPipeline)
    built = build_flux2_modular(insert_sparse_context(Flux2KleinAutoBlocks()))
    built.update_components(transformer=plain.transformer, vae=plain.vae)
    outputs = []
    plain.transformer.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    drawn = [np.zeros((r.height, r.width), np.uint8) for r in references]
    for m in drawn:
        m[: m.shape[0] // 2] = 255
    for settings in ({"keep": 1.0}, {"keep": 0.2}, {"keep": "auto"}, {"selector": mask(drawn), "keep": 0.25}):
        outputs.clear()
        apply_sparse_context(plain, **settings)
        call_flux2(plain, references)
        call_flux2_modular(built, references, **settings)
        assert len(outputs) == 4
        assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


def test_a_mask_follows_the_scaling_of_a_large_picture():
    reference = picture(1400, 1100)
    alpha = Image.new("L", reference.size)
    alpha.paste(255, (0, 0, 700, 550))
    reference.putalpha(alpha)
    plain = build_flux2(Flux2KleinPipeline)
    modular = build_flux2_modular(Flux2KleinAutoBlocks())
    for pipe, call in ((plain, call_flux2), (modular, call_flux2_modular)):
        apply_sparse_context(pipe, keep=50, selector="mask", coverage=0)
        call(pipe, [reference])
    one, other = (last_selection(pipe).references[0] for pipe in (plain, modular))
    assert one.grid == other.grid and np.array_equal(one.picture, other.picture)
    assert np.array_equal(one.index, other.index)


def test_latents_have_no_pixels_to_look_at():
    built = build_flux2_modular(insert_sparse_context(Flux2KleinAutoBlocks()))
    latents = [torch.randn(1, 8, 8, 10), torch.randn(1, 8, 4, 4)]
    call_flux2_modular(built, [], image_latents=latents, keep=0.25, selector="uniform")
    with pytest.raises(ValueError, match="'edges' needs the picture's pixels"):
        call_flux2_modular(built, [], image_latents=latents, keep=0.25, selector="edges")


def test_bad_settings_are_one_sentence(references):
    built = build_flux2_modular(insert_sparse_context(Flux2KleinAutoBlocks()))
    with pytest.raises(ValueError, match=r"keep is 1\.2"):
        call_flux2_modular(built, references, keep=1.2)
    with pytest.raises(ValueError, match="has a SparseContextStep among its blocks, which drops tokens already"):
        apply_sparse_context(built, keep=0.2)
    assert last_selection(built) is None
    with pytest.raises(ValueError, match="have a SparseContextStep already: insert it once.$"):
        insert_sparse_context(insert_sparse_context(Flux2KleinAutoBlocks()))
    with pytest.raises(ValueError, match="have no step that makes image_latent_ids: pass FLUX.2's blocks"):
        insert_sparse_context(Flux3AutoBlocks())


def watched(run, kept):
    """A step's call that leaves its selection in the list, too."""

    def call(step, components, state):
        result = run(step, components, state)
        kept.append(state.get("selection"))
        return result

    return call


def test_a_call_takes_every_setting_and_what_is_not_passed_stays_at_its_default(references, monkeypatch):
    assert set(DIALS) == {field.name for field in fields(SparseContextConfig)}
    assert {each.name: each.default for each in SparseContextStep().inputs if each.name in DIALS} == {
        field.name: field.default for field in fields(SparseContextConfig)
    }
    built = build_flux2_modular(insert_sparse_context(Flux2KleinAutoBlocks()))
    settings = {"keep": "auto", "overview": 4, "selector": "residual"}
    kept = []
    step = next(block for block in _all_blocks(built.blocks) if isinstance(block, SparseContextStep))
    monkeypatch.setattr(type(step), "__call__", watched(type(step).__call__, kept))
    for psnr in (10.0, 30.0):
        call_flux2_modular(built, references, **settings, psnr=psnr)
    few, many = kept
    assert few.kept < many.kept and all(each.psnr >= 30 for each in many.references if each.overview)
    call_flux2_modular(built, references, **settings, reference_max_pixels=5_000_000)
    assert "no larger PIL picture" in str(kept[-1])


def test_inserting_leaves_the_given_blocks_alone():
    blocks = Flux2KleinAutoBlocks()
    insert_sparse_context(blocks)
    assert "keep" not in blocks.input_names
    assert "keep" not in Flux2KleinAutoBlocks().input_names


def test_the_packaged_folder_is_what_diffusers_makes_of_it(tmp_path, monkeypatch):
    shutil.copy(PACKAGED / "block.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(FutureWarning, match="overwrite_modular_index"):
        CustomBlocksCommand().run()
    assert sorted(p.name for p in tmp_path.glob("*.*")) == sorted(p.name for p in PACKAGED.glob("*.*"))
    for made in tmp_path.glob("*.json"):
        ours, theirs = (json.loads((folder / made.name).read_text()) for folder in (PACKAGED, tmp_path))
        assert ours | {"_diffusers_version": None} == theirs | {"_diffusers_version": None}


def test_the_packaged_block_loads_and_drops(tmp_path, monkeypatch, references):
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    step = ModularPipelineBlocks.from_pretrained(str(PACKAGED), trust_remote_code=True)
    assert isinstance(step, SparseContextStep) and type(step) is not SparseContextStep
    blocks = Flux2KleinAutoBlocks.from_blocks_dict(insert_sparse_context(Flux2KleinAutoBlocks()).sub_blocks)
    places = blocks.sub_blocks["denoise"].sub_blocks["image_conditioned"].sub_blocks
    places["keep_essentials"] = step
    expected = build_flux2_modular(insert_sparse_context(Flux2KleinAutoBlocks()))
    built = build_flux2_modular(blocks)
    assert torch.equal(
        call_flux2_modular(built, references, keep=0.3), call_flux2_modular(expected, references, keep=0.3)
    )
