"""The embedded model: its scenes, its recipe's agreement with the pipeline, and what is shipped."""

import copy
import hashlib
import json
import math
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from elsewhere import open_files
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from transformers import Qwen2Tokenizer
from typer.testing import CliRunner

from recipes.mini import base, vae
from recipes.mini import export as exporting
from recipes.mini.__main__ import app
from recipes.mini.base import SIDES, BaseConfig, batch_number, batch_scenes, compiled_blocks, restore, train_base
from recipes.mini.data import (
    SHA256,
    SPLITS,
    Assets,
    _clip_art_key,
    _emoji_key,
    _free_files,
    _misses_a_link,
    _square,
    fetch,
    load_assets,
    split_of,
)
from recipes.mini.export import export
from recipes.mini.loss import encode_text, flow_matching_loss, position_ids, tokenise
from recipes.mini.model import encode_pictures, make_tokenizer, make_vae
from recipes.mini.run_folder import check_config, to_tensor
from recipes.mini.samples import scene_samples, tasks_of
from recipes.mini.scenes import COLOURS, PLACES, SHOWS, SUBJECTS, TASKS, TOKEN, draw_scene, make_scene
from recipes.mini.teaching import COPYING, correspondence_loss, watched_heads
from recipes.mini.vae import DecoderConfig, VaeConfig, decoded_sheet, load_vae, train_decoder, train_vae
from sparse_context import SparseContextConfig
from sparse_context.embedded.demo import read_examples, run_demo
from sparse_context.embedded.demo import table as demo_table
from sparse_context.pipelines.embedded import ADAPTERS, WEIGHTS, read_call_settings
from sparse_context.pipelines.engine import Engine
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec, Request
from sparse_context.training.cache import fingerprint
from sparse_context.training.checkpoints import load_average, newest_step


@pytest.fixture(scope="module")
def assets():
    """Three objects (a disc, a bar, a ring) and two photographs, made here."""
    y, x = np.mgrid[:128, :128] - 63.5
    shapes = [np.hypot(x, y) < 60, np.abs(x) < 20, np.abs(np.hypot(x, y) - 45) < 15]
    rng = np.random.default_rng(0)
    objects = np.zeros((3, 128, 128, 4), np.uint8)
    for rgba, shape in zip(objects, shapes, strict=True):
        rgba[shape] = [*rng.integers(0, 256, 3), 255]
    photos = rng.integers(0, 256, (2, 288, 288, 3), dtype=np.uint8)
    return Assets(objects, photos, ["disc", "bar", "ring"], np.array([0, 1, 2]), np.array([0, 1]))


@pytest.fixture(scope="module")
def pipe():
    """The dense base."""
    return load(ModelSpec(device="cpu", lora="none"))


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_is_a_scene(assets, task):
    one, other = make_scene(assets, task, 5), make_scene(assets, task, 5)
    assert one.prompt == other.prompt and np.array_equal(one.target, other.target)
    assert all(np.array_equal(a, b) for a, b in zip(one.references, other.references, strict=True))
    assert not np.array_equal(one.target, make_scene(assets, task, 6).target)
    for picture in (*one.references, one.target):
        assert picture.dtype == np.uint8
    assert one.target.shape == (128, 128, 3) and one.mask.shape == (128, 128)
    assert one.references[0].shape == (192, 192, 3) if task in SUBJECTS else one.references[0].shape == (128, 128, 3)
    assert [m.shape for m in one.reference_masks] == [r.shape[:2] for r in one.references]


def test_the_size_of_a_subject_s_references_is_a_choice_and_a_background_s_is_not(assets):
    assert [r.shape[0] for r in make_scene(assets, "subject_scene", 1).references] == [192, 128]
    assert [r.shape[0] for r in make_scene(assets, "subject_scene", 1, side=128).references] == [128, 128]
    assert [r.shape[0] for r in make_scene(assets, "edit_global", 1, side=160).references] == [128]


@pytest.mark.parametrize("side", SIDES)
def test_subjects_move_by_whole_tokens(assets, side):
    """Where the object is in the output, a crop of the reference at a whole number of tokens has the same pixels."""
    for seed in range(6):
        scene = make_scene(assets, "subject_place", seed, side)
        inside = scene.mask > 0.999
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        solid = scene.reference_masks[0] > 0.999
        shift = np.flatnonzero(solid.any(1))[0] - rows[0], np.flatnonzero(solid.any(0))[0] - columns[0]
        moved = tuple(slice(s.start + d, s.stop + d) for s, d in zip(box, shift, strict=True))
        assert shift[0] % TOKEN == shift[1] % TOKEN == 0
        difference = np.abs(scene.target[box].astype(int) - scene.references[0][moved])[inside[box]]
        assert difference.max() <= 1


def test_the_background_edit_keeps_the_object_and_nothing_else(assets):
    scene = make_scene(assets, "edit_background", 3)
    inside, outside = scene.mask == 1, scene.mask == 0
    colour = next(rgb for name, rgb in COLOURS.items() if name in scene.prompt)
    assert inside.sum() > 300
    assert np.abs(scene.target[inside].astype(int) - scene.references[0][inside]).max() <= 1
    assert np.abs(scene.target[outside].astype(int) - colour).max() <= 1


def cut(picture):
    """(rows * columns, 8, 8, ...): the tokens of a picture, row by row."""
    rows, columns = (side // TOKEN for side in picture.shape[:2])
    cells = picture.reshape(rows, TOKEN, columns, TOKEN, *picture.shape[2:]).swapaxes(1, 2)
    return cells.reshape(rows * columns, TOKEN, TOKEN, *picture.shape[2:])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("task", [t for t in SUBJECTS if t != "subject_scale"] + ["edit_background"])
def test_the_source_of_a_token_shows_the_same(assets, task, side):
    """Tokens wholly inside objects equal their sources; those with little or nothing of an object have none."""
    compared = 0
    for seed in range(6):
        scene = draw_scene(assets, task, np.random.default_rng(seed), side)
        source, covered = scene.source.ravel(), cut(scene.mask)
        target, references = cut(scene.target), np.concatenate([cut(r) for r in scene.references])
        full = covered.min((1, 2)) > 0.999
        assert (source[full] >= 0).all() and source.max() < len(references)
        difference = np.abs(target[full].astype(int) - references[source[full]])
        assert difference.max(initial=0) <= 1
        compared += full.sum()
        bare = covered.mean((1, 2)) < (0.5 if task == "subject_scene" else SHOWS)
        if task == "subject_scene":  # what the object covers less than half of is the second reference, where it was
            assert np.array_equal(source[bare], (side // TOKEN) ** 2 + np.flatnonzero(bare))
        else:
            assert (source[bare] == -1).all()
    assert compared > 20


def test_edits_of_the_picture_have_each_token_s_source_in_its_place(assets):
    for task in ("edit_object", "edit_global"):
        assert np.array_equal(make_scene(assets, task, 2).source.ravel(), np.arange(256))
    assert (make_scene(assets, "edit_remove", 2).source == -1).all()  # what fills the gap may come from anywhere
    assert (make_scene(assets, "subject_scale", 2).source == -1).all()  # at another scale no token is the same


def test_objects_are_in_focus_unless_the_whole_picture_is_edited(assets):
    scene = make_scene(assets, "subject_place", 1)
    assert np.allclose(scene.focus.ravel(), cut(scene.mask).mean((1, 2)))
    assert (make_scene(assets, "edit_global", 1).focus == 0).all()


def test_heads_that_look_at_the_source_lose_nothing():
    """Two output tokens, three of one reference, behind one of the text; a head whose queries find their keys."""
    keys = 40 * torch.eye(6, 8)[None]  # text, two outputs, three of the reference
    query = torch.zeros(1, 6, 8)
    query[0, 1, 5] = query[0, 2, 3] = 40.0  # the first output looks at the last token, the second at the first
    still = torch.ones(6, 8), torch.zeros(6, 8)
    right, wrong = torch.tensor([[2, 0]]), torch.tensor([[0, 2]])
    assert correspondence_loss([(query, keys)], still, right, text_tokens=1) < 1e-6
    scale = 40 * 40 / 8**0.5
    assert correspondence_loss([(query, keys)], still, wrong, text_tokens=1).item() == pytest.approx(scale, rel=1e-5)
    second_bare = torch.tensor([[2, -1]])  # it should not look at a reference, but its three other tokens are ignored
    assert correspondence_loss([(query, keys)], still, second_bare, text_tokens=1).item() == pytest.approx(
        scale - math.log(3), rel=1e-5
    )
    query[0, 2] = 40 * torch.eye(8)[0]  # at the text
    assert correspondence_loss([(query, keys)], still, second_bare, text_tokens=1) < 1e-6
    both = torch.cat([query, query]), torch.cat([keys, keys])
    unknown = torch.tensor([[2, -1], [-1, -1]])  # nothing is known of the second sample
    assert correspondence_loss([both], still, unknown, text_tokens=1) < 1e-6


def test_watched_heads_are_those_that_attend_and_are_let_go(pipe):
    def call(**settings):
        return flow_matching_loss(
            pipe.transformer,
            torch.zeros(1, 32, 128),
            torch.ones(1, 32, 4, 4),
            [torch.zeros(1, 32, 4, 6)],
            torch.Generator().manual_seed(0),
            **settings,
        )

    with torch.no_grad():
        alone = call()
        with watched_heads(pipe.transformer, COPYING) as pairs:
            assert call() == alone
        assert [(q.shape, k.shape) for q, k in pairs] == [((1, 32 + 16 + 24, 64),) * 2] * len(COPYING)
        blocks = [pipe.transformer.single_transformer_blocks[b] for b, _ in COPYING]
        assert not any(block._forward_pre_hooks for block in blocks)
        inside = []  # what the blocks' own attention makes of the same call
        norms = [norm for block in blocks for norm in (block.attn.norm_q, block.attn.norm_k)]
        hooks = [norm.register_forward_hook(lambda _, __, output: inside.append(output)) for norm in norms]
        call()
        for hook in hooks:
            hook.remove()
        seen = [tensor for pair in pairs for tensor in pair]
        heads = [head for _, head in COPYING for _ in range(2)]
        for watched, made, head in zip(seen, inside, heads, strict=True):
            assert torch.allclose(watched, made[:, :, head], atol=1e-5)
        source = torch.arange(16)[None]
        ids = torch.cat(
            [torch.tensor([[0, 0, 0, i] for i in range(32)]), position_ids(4, 4, 0), position_ids(4, 6, 10)]
        )
        taught = correspondence_loss(pairs, pipe.transformer.pos_embed(ids), source, 32)
        assert call(source=source, teach=0.5).item() == pytest.approx((alone + 0.5 * taught).item(), rel=1e-6)
        assert call(source=torch.full((1, 16), -1), teach=0.5) == alone


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of torch's compiler, by itself
def test_compiled_blocks_are_swapped_in_and_out(pipe):
    block, still = pipe.transformer.single_transformer_blocks[0], torch.ones(1, 3, 256)
    rotary = torch.ones(3, 64), torch.zeros(3, 64)

    def run(of):
        with torch.no_grad():
            return of(
                hidden_states=still, encoder_hidden_states=None, temb_mod=torch.ones(1, 768), image_rotary_emb=rotary
            )

    alone, within, plain = run(block), compiled_blocks(pipe.transformer), block.forward
    with torch.compiler.set_stance("force_eager"), within():
        assert block.forward != plain and torch.equal(run(block), alone)
    assert block.forward == plain and "forward" not in vars(block)
    other = copy.deepcopy(block).requires_grad_(False)
    other.attn.to_out.weight.zero_()
    assert torch.equal(run(other), still) and torch.equal(run(block), alone)


def test_repeated_batches_come_in_turns():
    assert [batch_number(step, 1) for step in range(5)] == [0, 1, 2, 3, 4]
    assert [batch_number(step, 2) for step in range(10)] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="repeats is 0: pass a whole number, 1 or more"):
        BaseConfig(repeats=0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_batch_that_is_repeated_is_composed_once(assets, tmp_path, monkeypatch):
    save_assets(assets, tmp_path)
    restore(WEIGHTS, tmp_path)
    composed, noises, shares = [], [], set()
    make, draw = base.make_batch, base.flow_matching_loss

    def noted(*given):
        composed.append(given[-1])
        shares.add(given[1].steps)
        return make(*given)

    def drawn(transformer, text, target, references, generator, *rest):
        noises.append((target.flatten()[0].item(), generator.initial_seed()))
        return draw(transformer, text, target, references, generator, *rest)

    monkeypatch.setattr(base, "make_batch", noted)
    monkeypatch.setattr(base, "flow_matching_loss", drawn)
    train_base(tmp_path, BaseConfig(steps=6, batch=1, repeats=2), show_every=0)
    assert shares == {3}  # of the batches, as many as are composed
    assert composed[:4] == [0, 1, 2, 3] and len(composed) <= 5  # one may be made ahead
    pictures, seeds = zip(*noises, strict=True)
    assert pictures[4:] == pictures[:2] and len(set(pictures)) == 4 and len(set(seeds)) == 6


@pytest.mark.parametrize("data", [None, "{", "{}", "[1]", '{"seed": 0}'])
def test_without_its_settings_no_run_of_the_recipe_goes_on(data, tmp_path):
    (tmp_path / "step-0000001").mkdir()
    if data is not None:
        (tmp_path / "config.json").write_text(data)
    with pytest.raises(ValueError, match="config.json (cannot be read|is no record of a run)"):
        check_config(tmp_path, VaeConfig())
    (tmp_path / "step-0000001").rename(tmp_path / "step-0000000")
    check_config(tmp_path, VaeConfig())  # what was restored has seen no settings


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nothing tells what is mapped")
def test_a_vae_is_read_into_memory_so_that_another_can_take_its_place(pipe, tmp_path):
    """Windows moves no file that is mapped."""
    pipe.vae.save_pretrained(tmp_path / "vae" / "final")
    vae = load_vae(tmp_path)
    assert not [path for path in open_files() if path.startswith(os.path.realpath(tmp_path) + os.sep)]
    assert all(torch.equal(weight, pipe.vae.state_dict()[name]) for name, weight in vae.state_dict().items())


def test_what_is_shipped_can_be_trained_further(pipe, tmp_path):
    restore(WEIGHTS, tmp_path)
    parts = torch.nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    before = {name: weight.clone() for name, weight in parts.state_dict().items()}
    assert load_average(tmp_path / "base", parts) == 0
    assert all(torch.equal(weight, before[name]) for name, weight in parts.state_dict().items())
    assert (tmp_path / "vae" / "final").is_dir() and Qwen2Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tokenizer", "vae"]  # and no half of one
    assert json.loads((tmp_path / "base" / "before.json").read_text()) == json.loads(
        (WEIGHTS / "call.json").read_text()
    )
    with pytest.raises(FileExistsError, match="is there already: move it away"):
        restore(WEIGHTS, tmp_path)


def save_assets(assets, folder):
    tensors = {
        "objects": assets.objects,
        "photos": assets.photos,
        "object_split": assets.object_split,
        "photo_split": assets.photo_split,
    }
    save_file(tensors, folder / "assets.safetensors", metadata={"names": json.dumps(assets.object_names)})


@pytest.fixture
def few_pictures(monkeypatch):
    """The latents of a VAE are measured on 32 pictures instead of 512, which take half a minute."""
    monkeypatch.setattr(vae, "measure_latents", partial(vae.measure_latents, pictures=32))


def read_sheet(folder):
    with Image.open(folder / "sheet-0000002.png") as file:
        return np.asarray(file)


@pytest.mark.usefixtures("few_pictures")
def test_a_restored_vae_goes_on_and_a_run_of_it_is_never_restored_over(assets, pipe, tmp_path):
    save_assets(assets, tmp_path)
    restore(WEIGHTS, tmp_path)
    train_vae(tmp_path, VaeConfig(steps=2, batch=2, crop=32, lr=1e-6), workers=1)
    vae, before = load_vae(tmp_path).state_dict(), pipe.vae.state_dict()
    learned = [name for name in vae if not name.startswith("bn.")]
    assert any(not torch.equal(vae[name], before[name]) for name in learned)
    assert all(torch.allclose(vae[name], before[name], atol=1e-4) for name in learned)  # two small steps from there
    assert not torch.equal(vae["bn.running_mean"], before["bn.running_mean"])  # measured anew, on these pictures
    sheet = read_sheet(tmp_path / "vae")
    assert sheet.shape == (4 * 128, 4 * 256, 3)  # sixteen pictures, each beside its decoding
    picture = make_scene(assets.split("validation"), "edit_background", 100).references[0]
    assert np.array_equal(sheet[:128, :128], picture)
    assert np.abs(sheet[:128, 128:256].astype(int) - picture).mean() < 30  # the photographs here are noise
    assert np.array_equal(sheet, decoded_sheet(load_vae(tmp_path), assets))  # of the averaged weights
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileExistsError, match="vae is there already: move it away"):
        restore(WEIGHTS, tmp_path)
    longer = VaeConfig(steps=100, batch=2, crop=32)
    with pytest.raises(ValueError, match="was begun with steps 2, not 100: continue it with its own"):
        train_vae(tmp_path, longer)
    (tmp_path / "moved").rename(tmp_path / "base")
    with pytest.raises(ValueError, match="was trained after the base, which has to follow: run `base`"):
        export(tmp_path, tmp_path / "weights")
    other = tmp_path / "other"
    other.mkdir()
    save_assets(assets, other)
    train_vae(other, longer, seconds=60, stop_after=0)  # one step, and time is left
    assert newest_step(other / "vae") == 1 and not (other / "vae" / "final").exists()
    train_vae(other, longer, seconds=1e-3)  # by the clock: one step more
    assert newest_step(other / "vae") == 2 and (other / "vae" / "final").is_dir()
    with pytest.raises(ValueError, match="crop is 30: pass a multiple of 4"):
        VaeConfig(crop=30)


@pytest.mark.usefixtures("few_pictures")
def test_a_kill_after_the_last_step_of_a_restored_vae_loses_nothing(assets, tmp_path, monkeypatch):
    save_assets(assets, tmp_path)
    restore(WEIGHTS, tmp_path)
    final, config = tmp_path / "vae" / "final", VaeConfig(steps=1, batch=2, crop=32)
    before = load_vae(tmp_path).state_dict()

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vae, "measure_latents", killed)
        with pytest.raises(KeyboardInterrupt):
            train_vae(tmp_path, config)
    assert newest_step(tmp_path / "vae") == 1
    final.rename(final.with_suffix(".old"))  # as a kill leaves it between the renames
    assert all(torch.equal(weight, before[name]) for name, weight in load_vae(tmp_path).state_dict().items())
    train_vae(tmp_path, config)
    assert not torch.equal(load_vae(tmp_path).state_dict()["encoder.conv_in.weight"], before["encoder.conv_in.weight"])
    at = final.stat().st_ino
    train_vae(tmp_path, config)  # done, and so left as it is, with whatever a decoder's run made of it
    assert final.stat().st_ino == at


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.usefixtures("few_pictures")
def test_the_recipe_as_commands_ends_at_the_same_model_however_often_it_is_stopped(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "TASKS", ("edit_background",))  # of the sheets, and of the tokenizer's prompts
    monkeypatch.setattr(exporting, "EXAMPLES", {"one": ("edit_background", 6)})
    three = Assets(
        assets.objects,
        np.concatenate([assets.photos, assets.photos[:1]]),
        assets.object_names,
        assets.object_split,
        np.array([0, 1, 2]),
    )

    def run(folder, *arguments):
        done = CliRunner().invoke(app, [*map(str, arguments), "--folder", str(folder)], catch_exceptions=False)
        assert done.exit_code == 0, done.output

    made = []
    for name, stops in (("whole", [()]), ("stopped", [("--stop-after", 0)] * 2)):
        folder = tmp_path / name
        folder.mkdir()
        save_assets(three, folder)
        for step, batch in (("vae", 2), ("base", 1), ("decoder", 2)):
            for stop in stops:
                run(folder, step, "--steps", 2, "--batch", batch, *stop)
            assert (folder / step / "sheet-0000002.png").is_file()
        run(folder, "export", "--destination", folder / "weights")
        run(folder, "examples", "--destination", folder / "examples")
        assert not [*folder.rglob("*.partial"), *folder.rglob("*.old")]
        assert read_examples(folder / "examples")[0]["truth"].size == (128, 128)
        files = (folder / "weights").rglob("*.safetensors")
        made.append({file.relative_to(folder): file.read_bytes() for file in files})
    assert len(made[0]) == 3 and made[0] == made[1]


def test_a_scene_of_a_photograph_alone_has_nothing_in_it(assets):
    scenes = [make_scene(assets.without_objects(), "edit_global", seed) for seed in range(8)]
    assert not any(scene.mask.any() or scene.reference_masks[0].any() for scene in scenes)
    assert any(make_scene(assets, "edit_global", seed).mask.any() for seed in range(8))


def test_a_file_that_is_no_assets_is_one_sentence(assets, tmp_path):
    save_assets(assets, tmp_path)
    file = tmp_path / "assets.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], b"", whole.replace(b'"names"', b'"mames"')):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))} is no file of assets, or damaged .*: delete it"):
            load_assets(file)


# Under autocast torch says once that RMS norm, whose weights stay float32, is not fused
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_decoder_is_trained_and_latents_stay(assets, pipe, tmp_path):
    save_assets(assets, tmp_path)
    restore(WEIGHTS, tmp_path)
    train_decoder(tmp_path, DecoderConfig(steps=2, batch=2))
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == ["final"]
    vae = load_vae(tmp_path)
    changed = {
        name.split(".")[0]
        for name, weight in vae.state_dict().items()
        if not torch.equal(weight, pipe.vae.state_dict()[name])
    }
    assert changed == {"decoder", "post_quant_conv"}
    assert np.array_equal(read_sheet(tmp_path / "decoder"), decoded_sheet(vae, assets))
    assert newest_step(tmp_path / "decoder") == 0  # run again, it does so once more


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_base_from_nothing_leaves_its_sample_sheet_and_a_whole_tokenizer(assets, pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "TASKS", ("edit_background",))  # of the sheet, and of the tokenizer's prompts
    save_assets(assets, tmp_path)
    pipe.vae.save_pretrained(tmp_path / "vae" / "final")
    (tmp_path / "tokenizer.partial").mkdir()
    (tmp_path / "tokenizer.partial" / "half").touch()  # what a kill left
    train_base(tmp_path, BaseConfig(steps=2, batch=1))
    sheet = read_sheet(tmp_path / "base")
    assert sheet.shape == (128, 2 * 3 * 128, 3)  # two scenes: reference, truth and output
    for left, seed in ((0, 100), (3 * 128, 101)):
        scene = make_scene(assets.split("validation"), "edit_background", seed)
        assert np.array_equal(sheet[:, left : left + 256], np.hstack([scene.references[0], scene.target]))
    assert Qwen2Tokenizer.from_pretrained(tmp_path / "tokenizer").chat_template
    assert not (tmp_path / "tokenizer" / "half").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_restored_base_trains_and_is_exported_without_the_adapter_of_the_old_one(assets, pipe, tmp_path):
    save_assets(assets, tmp_path)
    restore(WEIGHTS, tmp_path)
    weights = tmp_path / "weights"
    weights.mkdir()
    about = {"base_weights": fingerprint(pipe.transformer)}
    adapters = [weights / own.name for own in ADAPTERS.values()]
    for adapter in adapters:
        save_torch({"weight": torch.ones(1)}, adapter, {"sparse_context": json.dumps(about)})
    export(tmp_path, weights)
    assert all(adapter.is_file() for adapter in adapters)  # these are the weights that they were trained on
    before = read_call_settings(WEIGHTS)["training_steps"]
    assert read_call_settings(weights)["training_steps"] == before
    train_base(tmp_path, BaseConfig(steps=2, batch=1), stop_after=0)  # one step
    record = json.loads((tmp_path / "base" / "config.json").read_text())
    assert (record["seed"], record["alone_until"], record["small_until"]) == (before, 0, 0)
    with pytest.raises(ValueError, match="begun with steps 2, not 3: continue it with its own"):
        train_base(tmp_path, BaseConfig(steps=3, batch=1))
    export(tmp_path, weights)
    assert not any(adapter.exists() for adapter in adapters)
    assert read_call_settings(weights)["training_steps"] == before + 1
    export(tmp_path, tmp_path / "exact", torch.float32)  # for another run to go on from
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "exact").rglob("*.json"))
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.rglob("*.old")]
    restore(tmp_path / "exact", tmp_path / "next")
    modules = torch.nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    parts = [copy.deepcopy(modules), copy.deepcopy(modules)]
    for part, folder in zip(parts, (tmp_path, tmp_path / "next"), strict=True):
        load_average(folder / "base", part)
    trained, gone_on = (part.state_dict() for part in parts)
    assert all(torch.equal(weight, gone_on[name]) for name, weight in trained.items())
    assert not all(torch.equal(weight, weight.bfloat16().float()) for weight in trained.values())


def test_global_edits_are_functions_of_the_reference(assets):
    scenes = {scene.task: scene for scene in (make_scene(assets, "edit_global", seed) for seed in range(40))}
    negative, grey = scenes["edit_negative"], scenes["edit_grey"]
    assert np.abs(255 - negative.references[0].astype(int) - negative.target).max() <= 1
    luma = grey.references[0] @ [0.299, 0.587, 0.114]
    assert np.abs(grey.target - luma[..., None]).max() <= 1.5
    sepia, warmer, posterised = (scenes[f"edit_{name}"] for name in ("sepia", "warmer", "posterise"))
    luma = sepia.references[0] @ [0.299, 0.587, 0.114]
    assert np.abs(sepia.target - np.minimum(luma[..., None] * [1.07, 0.86, 0.64], 255)).max() <= 1.7
    warm = np.minimum(warmer.references[0] * [1.2, 1.0, 0.72], 255)
    assert np.abs(warmer.target - warm).max() <= 1.7
    assert set(np.unique(posterised.target)) <= {0, 85, 170, 255}
    between = np.abs(posterised.references[0] / 85 % 1 - 0.5) < 0.02  # either neighbour is right there
    assert np.abs(posterised.target - np.round(posterised.references[0] / 85) * 85)[~between].max() == 0


def test_a_recoloured_object_has_its_shading_in_the_named_colour_and_nothing_else_changes(assets):
    for seed in range(6):
        scene = make_scene(assets, "edit_object", seed)
        colour = next(rgb for name, rgb in COLOURS.items() if f" {name}" in scene.prompt)
        before, after = scene.references[0].astype(int), scene.target.astype(int)
        outside, inside = scene.mask == 0, scene.mask > 0.999
        assert inside.sum() > 300 and np.abs(after - before)[outside].max() <= 1
        luma = before[inside] @ [0.299, 0.587, 0.114] / 255
        tinted = np.minimum(np.multiply.outer(0.25 + luma, colour), 255)
        assert np.abs(after[inside] - tinted).max() <= 3


def test_a_removed_object_leaves_the_picture_as_it_is_elsewhere(assets):
    for seed in range(6):
        scene = make_scene(assets, "edit_remove", seed)
        there = cv2.dilate((scene.mask > 0).astype(np.uint8), np.ones((41, 41))) > 0  # and its shadow
        assert (~there).any() and np.array_equal(scene.target[~there], scene.references[0][~there])
        inside = scene.mask > 0.999
        assert np.abs(scene.target.astype(int) - scene.references[0])[inside].mean() > 10


def numbers_of(scene):
    """For each quarter of the target, by its corner (down, right), the references that its tokens come from."""
    first = np.cumsum([0] + [r.shape[0] * r.shape[1] // TOKEN**2 for r in scene.references])
    found = np.searchsorted(first, scene.source, side="right")  # 1 for the first; 0 where there is none
    return {
        (down, right): set(found[8 * down : 8 * down + 8, 8 * right : 8 * right + 8].ravel()) - {0}
        for down in (0, 1)
        for right in (0, 1)
    }


def test_the_numbers_in_a_prompt_are_those_of_the_references(assets):
    quarter = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
    for seed in range(8):
        pair = numbers_of(make_scene(assets, "subject_pair", seed))
        assert pair[0, 0] | pair[1, 0] == {1} and pair[0, 1] | pair[1, 1] == {2}
        scene = make_scene(assets, "subject_quarters", seed)
        listed = re.findall(r"(\d) ((?:top|bottom) (?:left|right))", scene.prompt)
        assert len(listed) == len(scene.references) >= 3
        assert {quarter[place]: {int(number)} for number, place in listed} == {
            place: numbers for place, numbers in numbers_of(scene).items() if numbers
        }


@pytest.mark.parametrize("task", ["subject_pair", "subject_quarters"])
def test_each_object_is_painted_where_its_number_says(assets, task):
    """Objects of one colour each, drawn in turn: the target shows the first reference's where the prompt has it."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    objects = np.zeros((4, 128, 128, 4), np.uint8)
    for rgba, colour in zip(objects, colours, strict=True):
        rgba[8:120, 8:120] = [*colour, 255]
    for seed in range(6):
        scene = make_scene(replace(assets, objects=objects), task, seed)
        for number, (reference, mask) in enumerate(zip(scene.references, scene.reference_masks, strict=True), start=1):
            shown = np.median(reference[mask > 0.999], axis=0)
            places = [place for place, numbers in numbers_of(scene).items() if number in numbers]
            assert places
            for down, right in places:
                corner = slice(64 * down, 64 * down + 64), slice(64 * right, 64 * right + 64)
                solid = scene.mask[corner] > 0.999
                assert solid.any() and np.abs(scene.target[corner][solid] - shown).max() <= 2


def test_the_scale_of_an_object_changes_where_the_task_says_so(assets):
    ratios = []
    for seed in range(12):
        scene = make_scene(assets, "subject_scale", seed)
        ratios.append(scene.reference_masks[0].sum() / scene.mask.sum())
    assert min(ratios) < 0.7 and max(ratios) > 1.4
    moved = make_scene(assets, "subject_place", 1)
    assert moved.reference_masks[0].sum() == pytest.approx(moved.mask.sum(), rel=0.01)


def test_the_place_follows_from_the_prompt(assets):
    for seed in range(8):
        scene = make_scene(assets, "subject_place", seed)
        where = max((name for name in PLACES if name in scene.prompt), key=len)
        rows, columns = np.nonzero(scene.mask > 0.5)
        centre = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
        assert np.hypot(*np.subtract(centre, PLACES[where])) < 6


README = """The pictures of this activity

Public domain, https://example.org/a
Files: monument.webp
  gate.jpg

License: CC-BY 4.0, by someone; the frame is public domain
Files: castle.webp

CC0
Files: bridge.avif

GFDL
Files: tower.webp
"""


def test_only_photographs_that_are_free_are_taken():
    assert _free_files(README) == ["monument.webp", "gate.jpg", "bridge.avif"]
    assert _free_files("Files: of-nobody.webp") == []


def test_a_package_is_fetched_once_and_checked_each_time(tmp_path, monkeypatch):
    """By a client of the same name, for the registry is not there in a test."""
    file, content = "openmoji-17.0.0.tgz", b"what the registry has"
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/calls\nprintf '{content.decode()}' > {file}\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(client.parent), prepend=":")
    packages = tmp_path / "packages"
    with pytest.raises(RuntimeError, match="has SHA-256 .* it is another version than openmoji@17.0.0, or damaged"):
        fetch(packages, file)
    monkeypatch.setitem(SHA256, file, hashlib.sha256(content).hexdigest())
    assert fetch(packages, file).read_bytes() == content
    assert (tmp_path / "calls").read_text() == "pack --silent openmoji@17.0.0\n"  # that of the first time
    assert [path.name for path in packages.iterdir()] == [file]


def test_a_client_that_fails_leaves_nothing_and_says_where_the_package_belongs(tmp_path, monkeypatch):
    for status in (None, 1):
        if status is not None:
            client = tmp_path / "bin" / "npm"
            client.parent.mkdir()
            client.write_text(f"#!/bin/sh\nprintf half > openmoji-17.0.0.tgz\nexit {status}\n")
            client.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin") + (":/usr/bin:/bin" if status else ""))
        place = re.escape(str(tmp_path / "packages" / "openmoji-17.0.0.tgz"))
        with pytest.raises(
            RuntimeError, match=f"`npm pack .* failed; fetch the package another way and put it at {place}"
        ):
            fetch(tmp_path / "packages", "openmoji-17.0.0.tgz")
        assert not [*(tmp_path / "packages").iterdir()]


def test_splits_are_disjoint_and_by_name(assets):
    assert [assets.split(name).object_names for name in ("train", "validation", "test")] == [
        ["disc"],
        ["bar"],
        ["ring"],
    ]
    assert [len(assets.split(name).photos) for name in SPLITS] == [1, 1, 0]
    assert np.array_equal(assets.split("validation").photos[0], assets.photos[1])
    with pytest.raises(ValueError, match="'dev'.*train, validation, test"):
        assets.split("dev")
    assert split_of("face") == split_of("clock") == 0
    trained = replace(assets, object_names=["Red disc 01", "a ring", "barrow"])
    unlike = assets.unlike(trained)  # "a" is no word, and "bar" not that of the barrow
    assert unlike.object_names == ["bar"] and np.array_equal(unlike.objects, assets.split("validation").objects)
    assert unlike.object_split.tolist() == [1] and np.array_equal(unlike.photos, assets.photos)
    shares = np.bincount([split_of(f"shape {i}") for i in range(4000)], minlength=3) / 4000
    assert np.abs(shares - [0.8, 0.1, 0.1]).max() < 0.02


@pytest.mark.parametrize(
    "name, group, subgroup, key, split",
    [
        ("woman running", "people-body", "person-activity", "person", "train"),
        ("waving hand", "people-body", "hand-fingers-open", "hand", "train"),
        ("women’s room", "symbols", "transport-sign", "symbol", "train"),
        ("END arrow", "symbols", "arrow", "symbol", "train"),
        ("grinning face", "smileys-emotion", "face-smiling", "face", "train"),
        ("heart with arrow", "smileys-emotion", "heart", "heart", "train"),
        ("hourglass done", "travel-places", "time", "clock", "train"),
        ("woman’s hat", "objects", "clothing", "hat", "train"),
        ("white flower", "animals-nature", "plant-flower", "flower", "train"),
        ("red apple", "food-drink", "food-fruit", "apple", "validation"),
        ("deciduous tree", "animals-nature", "plant-other", "tree", "test"),
        ("locked with key", "objects", "lock", "key", "test"),
    ],
)
def test_emoji_are_split_by_the_last_word_or_their_group(name, group, subgroup, key, split):
    entry = {"annotation": name, "group": group, "subgroups": subgroup}
    assert (_emoji_key(entry), SPLITS[split_of(key)]) == (key, split)


@pytest.mark.parametrize(
    "name, key, split",
    [
        ("a_man_singing_01", "man", "validation"),  # words of three letters or more count
        ("woman01", "woman", "test"),  # as an emoji both are persons, which are trained on
        ("another_apple_01", "another", "train"),
        ("apple_bw", "apple", "validation"),
        ("plain_tree_01", "plain", "train"),
        ("tree_02", "tree", "test"),
        ("keyboard_key_yemu", "keyboard", "train"),
        ("key_enter", "key", "test"),
        ("flower_01", "flower", "train"),
        ("red_flower_01", "red", "test"),
        ("blue_fedora", "blue", "train"),
        ("red_fedora", "red", "test"),  # the same drawing
        ("Smiling_cat", "face", "train"),
        ("broken_heart_01", "heart", "train"),
        ("01", "symbol", "train"),
    ],
)
def test_clip_art_is_split_by_the_first_word(name, key, split):
    assert (_clip_art_key(name), SPLITS[split_of(key)]) == (key, split)


def test_objects_are_cropped_to_their_alpha():
    rgba = np.zeros((300, 200, 4), np.uint8)
    rgba[40:240, 60:160] = [10, 200, 30, 255]
    square = _square(rgba)
    rows, columns = np.nonzero(square[..., 3])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 127, 32, 95)
    assert (square[64, 64] == [10, 200, 30, 255]).all()
    assert _square(np.full((64, 64, 4), 255, np.uint8)) is None  # nothing is transparent: no outline


def test_objects_move_no_farther_than_they_may(assets):
    for seed in range(6):
        scene = draw_scene(assets, "subject_place", np.random.default_rng(seed), 128, reach=1)
        here, there = (np.argwhere(mask > 0.5).mean(0) for mask in (scene.mask, scene.reference_masks[0]))
        assert np.abs(here - there).max() <= TOKEN + 1e-6


def test_clip_art_with_a_card_that_says_link_not_found_is_no_object():
    rgba = np.zeros((128, 128, 4), np.uint8)
    rgba[30:100, 30:100] = [90, 140, 60, 255]
    assert not _misses_a_link(rgba)
    rgba[40:90, 40:90] = [255, 255, 255, 143]
    assert not _misses_a_link(rgba)  # glass, perhaps
    rgba[45:55, 60:70] = [255, 0, 0, 143]
    assert _misses_a_link(rgba)


def test_the_references_of_a_batch_have_one_shape_and_batches_cost_the_same(assets):
    config = BaseConfig(steps=100, alone_until=0.2, small_until=0.5)
    seen = []
    for step in range(100):
        scenes = batch_scenes(assets, config, step)
        (shape,) = {tuple(r.shape for r in scene.references) for scene in scenes}
        tokens = 32 + 256 + sum(rows * columns // 64 for rows, columns, _ in shape)
        assert len(scenes) == max(4, round(16 * 544 / tokens))
        seen.append(({scene.task for scene in scenes}, len(shape), max(rows for rows, _, _ in shape)))
    assert {count for _, count, _ in seen[:20]} == {1} and {1, 2, 4} <= {count for _, count, _ in seen[20:]}
    assert {side for _, _, side in seen[:50]} == {128} and {side for _, _, side in seen[50:]} == {96, 128, 192}
    assert all({"edit_background", "subject_place"} & tasks for tasks, count, side in seen if (count, side) == (1, 128))
    assert all(len(tasks) == 1 for tasks, count, _ in seen if count > 1)


def test_unknown_tasks_are_named(assets):
    with pytest.raises(ValueError, match="'paint'.*edit_background"):
        make_scene(assets, "paint", 0)


def test_the_tokenizer_keeps_its_ids_when_reloaded(tmp_path):
    tokenizer = make_tokenizer(["Make the background plain red."] * 3, vocabulary=300)
    tokenizer.save_pretrained(tmp_path)
    again = Qwen2Tokenizer.from_pretrained(tmp_path)
    for text in ("Make the background red.", "ein Kätzchen 猫", ""):
        chat = [{"role": "user", "content": text}]
        assert tokenizer(text)["input_ids"] == again(text)["input_ids"]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == again.apply_chat_template(chat, tokenize=False)


def test_the_recipe_sees_what_the_pipeline_sees(pipe):
    settings = read_call_settings(WEIGHTS)
    prompts = ["Make the background plain red.", "Turn the picture grey."]
    text, _ = pipe.encode_prompt(
        prompts,
        max_sequence_length=settings["max_sequence_length"],
        text_encoder_out_layers=settings["text_encoder_out_layers"],
    )
    with torch.no_grad():
        assert torch.allclose(encode_text(pipe.text_encoder, *tokenise(pipe.tokenizer, prompts)), text, atol=1e-5)
    pictures = to_tensor([np.full((128, 128, 3), 90, np.uint8)])
    with torch.no_grad():
        assert torch.allclose(encode_pictures(pipe.vae, pictures), pipe._encode_vae_image(pictures, None), atol=1e-5)
    ids = pipe._prepare_image_ids([torch.zeros(1, 4, 3, 5)] * 2)[0]
    assert torch.equal(ids, torch.cat([position_ids(3, 5, 10), position_ids(3, 5, 20)]))


def test_the_base_learns_at_uniform_noise_levels_moved_towards_noise(pipe):
    seen = []
    hook = pipe.transformer.time_guidance_embed.register_forward_pre_hook(lambda _, given: seen.append(given[0] / 1000))
    with torch.no_grad():
        flow_matching_loss(
            pipe.transformer,
            torch.zeros(2000, 1, 128),
            torch.zeros(2000, 32, 1, 1),
            [],
            torch.Generator().manual_seed(0),
        )
    hook.remove()
    uniform = seen[0] / (5 - 4 * seen[0])  # the shift undone
    assert torch.allclose(uniform.quantile(torch.tensor([0.1, 0.5, 0.9])), torch.tensor([0.1, 0.5, 0.9]), atol=0.03)


def test_one_token_is_eight_pixels():
    with torch.no_grad():
        assert encode_pictures(make_vae().eval(), torch.zeros(1, 3, 64, 40)).shape == (1, 32, 8, 5)


def test_plain_diffusers_loads_what_is_shipped(pipe):
    plain = Flux2KleinPipeline.from_pretrained(WEIGHTS)
    plain.set_progress_bar_config(disable=True)
    assert type(plain) is type(pipe) and plain.config.is_distilled
    example, settings = read_examples()[0], read_call_settings(WEIGHTS)
    taken = ("height", "width", "max_sequence_length", "text_encoder_out_layers", "num_inference_steps")
    image = plain(
        image=example["references"],
        prompt=example["prompt"],
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        **{k: settings[k] for k in taken},
    ).images[0]
    made = Engine(pipe=pipe)(Request(example["prompt"], example["references"], SparseContextConfig(keep=1.0)))
    assert np.array_equal(image, made.image)
    assert not list(WEIGHTS.rglob("*.bin"))
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*")) < 34 * 2**20
    assert sum(weight.numel() for weight in pipe.transformer.parameters()) <= 12e6
    # With shifting that goes by the picture's size the last of eight steps would jump from half of the noise to none
    assert (pipe.scheduler.config.use_dynamic_shifting, pipe.scheduler.config.shift) == (False, 2.0)
    assert not any("checkpoints" in file.read_text() for file in WEIGHTS.rglob("*.json"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, pipe):
    """A LoRA of the base, as training leaves it, with weights by chance."""
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    transformer = load(ModelSpec(device="cpu", lora="none")).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "to_qkv_mlp_proj"]))
    layers = {name: 0.1 * torch.randn_like(weight) for name, weight in get_peft_model_state_dict(transformer).items()}
    folder = tmp_path_factory.mktemp("adapter")
    Flux2KleinPipeline.save_lora_weights(folder, transformer_lora_layers=layers, weight_name="a.safetensors")
    return folder / "a.safetensors"


@pytest.mark.parametrize("kv", [False, True])
def test_an_adapter_in_the_package_is_the_default(pipe, adapter, monkeypatch, kv):
    """Folded into the weights it says what plain diffusers makes of the file."""
    files = {mode: adapter if (mode == "kv") == kv else adapter.with_name("no") for mode in ADAPTERS}
    monkeypatch.setattr("sparse_context.pipelines.load.ADAPTERS", files)
    tuned, base = load(ModelSpec(device="cpu", kv=kv)), load(ModelSpec(device="cpu", lora="none"))
    assert type(tuned).__name__ == ("Flux2KleinKVPipeline" if kv else "Flux2KleinPipeline")
    plain = Flux2KleinPipeline.from_pretrained(WEIGHTS)
    plain.load_lora_weights(adapter.parent, weight_name=adapter.name, use_safetensors=True)
    assert not getattr(tuned.transformer, "peft_config", None)  # no layers beside the layers, which would take time
    call = dict(
        hidden_states=torch.rand(1, 40, 32),
        encoder_hidden_states=torch.rand(1, 8, 128),
        timestep=torch.tensor([0.7]),
        img_ids=position_ids(5, 8, 0),
        txt_ids=torch.zeros(8, 4),
    )
    with torch.no_grad():
        dense, none, folded, beside = (
            each.transformer(**call, return_dict=False)[0] for each in (pipe, base, tuned, plain)
        )
    torch.testing.assert_close(folded, beside, rtol=1e-3, atol=1e-4)
    assert torch.equal(dense, none) and (folded - dense).abs().max() > 0.01


def slopes(picture):
    """The differences of neighbouring grey levels, across and down: outlines and detail, whatever the colours."""
    grey = np.asarray(picture, float).mean(-1)
    return np.concatenate([np.diff(grey, axis=0).ravel(), np.diff(grey, axis=1).ravel()])


def test_aligned_edits_of_unseen_objects_show_the_object_and_its_detail(pipe):
    """Dense outputs follow the outlines and the detail of their own truth, and of no other scene's.

    A flat or blurred patch of the right colour has next to no slopes to agree with, and fails.
    """
    examples = [e for e in read_examples() if e["task"].startswith("edit")]
    assert {"edit_background", "edit_negative", "edit_grey"} <= {e["task"] for e in examples}
    for example in examples:
        made = slopes(
            Engine(pipe=pipe)(Request(example["prompt"], example["references"], SparseContextConfig(keep=1.0))).image
        )
        assert np.corrcoef(made, slopes(example["truth"]))[0, 1] > 0.6, example["name"]
        others = [e for e in read_examples() if not np.array_equal(e["references"][0], example["references"][0])]
        assert max(np.corrcoef(made, slopes(other["truth"]))[0, 1] for other in others) < 0.3, example["name"]


@pytest.mark.parametrize(
    "name, keep", [("side-by-side", 1.0), ("in-front", 1.0), ("side-by-side", 0.2), ("quarters", 0.2)]
)
def test_unseen_objects_that_move_keep_their_detail(pipe, name, keep):
    """With all tokens by the dense base, with a fifth as the package has it; a blur of the truth does not follow it."""
    examples = {example["name"]: example for example in read_examples()}
    example = examples.pop(name)
    config = SparseContextConfig(keep=keep, task=example["tasks"])
    model = pipe if keep == 1 else load(ModelSpec(device="cpu"))
    made = slopes(Engine(pipe=model)(Request(example["prompt"], example["references"], config)).image)
    truth = slopes(example["truth"])
    assert np.corrcoef(made, truth)[0, 1] > 0.6
    assert max(np.corrcoef(made, slopes(other["truth"]))[0, 1] for other in examples.values()) < 0.2
    assert np.corrcoef(slopes(cv2.GaussianBlur(np.asarray(example["truth"]), (0, 0), 3)), truth)[0, 1] < 0.6


def test_four_references_at_a_fraction_of_the_tokens(pipe):
    example = next(e for e in read_examples() if len(e["references"]) == 4)
    config = SparseContextConfig(keep=0.15, task="subject")
    made = Engine(pipe=pipe)(Request(example["prompt"], example["references"], config))
    assert made.selection.total == 4 * 576 and made.selection.kept == 4 * round(0.15 * 576)
    assert made.image.size == (128, 128)


def test_the_demo_leaves_its_pictures_and_a_report(tmp_path, monkeypatch):
    examples = read_examples()
    first = [next(e for e in examples if e["tasks"] == ["global"]), examples[-1]]
    monkeypatch.setattr("sparse_context.embedded.demo.read_examples", lambda: first)
    run_demo(tmp_path / "demo", keep=0.25)
    toned, name = (example["name"] for example in first)
    files = ["demo.png", "report.json", f"{toned}.png", f"{name}.png"]
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == sorted(files)
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report[0]["sparse"]["selection"]["kept"] == report[0]["sparse"]["selection"]["total"] == 256
    with Image.open(tmp_path / "demo" / f"{toned}.png") as sheet:
        dense, sparse = (np.asarray(sheet.crop((left, 0, left + 192, 192))) for left in (2 * 200, 3 * 200))
    assert np.array_equal(dense, sparse)  # with all tokens without the adapter
    kept = report[1]["sparse"]["selection"]
    assert kept["kept"] == round(0.25 * kept["total"])
    assert report[1]["sparse kv"]["selection"]["kept"] == kept["kept"]
    assert set(report[1]["speedup"]) == {"sparse", "sparse kv"}
    assert [line.split()[0] for line in demo_table(report).splitlines()] == ["scene", toned, name]
    with Image.open(tmp_path / "demo" / f"{name}.png") as sheet:
        assert sheet.width == 8 * 192 + 7 * 8  # four references, the truth, three outputs


def test_the_demo_keeps_of_each_reference_what_its_task_needs(tmp_path, monkeypatch):
    examples = [example for example in read_examples() if example["name"] == "in-front"]
    monkeypatch.setattr("sparse_context.embedded.demo.read_examples", lambda: examples)
    (row,) = run_demo(tmp_path / "demo")
    assert examples[0]["tasks"] == ["subject", "edit"]
    for way in ("sparse", "sparse kv"):
        kept = [reference["kept"] for reference in row[way]["selection"]["references"]]
        assert kept == [round(0.2 * 576), round(0.5 * 256)]
    assert row["dense"]["selection"]["kept"] == 576 + 256
    with Image.open(tmp_path / "demo" / "in-front.png") as file:
        sheet = np.asarray(file.convert("RGB"))
    shown = [sheet[:192, left : left + 192] for left in range(2 * 200, 6 * 200, 200)]  # truth, dense, sparse, KV
    made = {}
    for keep, adapter in ((1.0, "none"), ([0.2, 0.5], None)):
        config = SparseContextConfig(keep=keep, task=examples[0]["tasks"])
        model = load(ModelSpec(device="cpu", lora=adapter))
        image = Engine(pipe=model)(Request(examples[0]["prompt"], examples[0]["references"], config)).image
        made[adapter] = np.asarray(image.resize((192, 192), Image.Resampling.LANCZOS))
    assert np.array_equal(shown[1], made["none"]) and np.array_equal(shown[2], made[None])  # with its adapter


def test_the_demo_refuses_a_bad_keep_before_it_starts(tmp_path):
    with pytest.raises(ValueError, match="keep is 1.5"):
        run_demo(tmp_path / "demo", keep=1.5)
    assert not (tmp_path / "demo").exists()


def test_scenes_are_samples_that_lose_nothing(assets):
    samples, scenes = scene_samples(assets, 16, 10_000)
    assert [s.task for s in samples[:8]].count("subjects") == 4
    assert [s.task for s in samples].count("edits") == [s.task for s in samples].count("global edits") == 4
    assert len({scene.target.tobytes() for scene, _, _ in scenes.values()}) == 16
    _, others = scene_samples(assets, 3, 10_000, ["subject_pair", "edit_object"])
    assert [drawn[1:] for drawn in others.values()] == [
        ("subject_pair", 10_000),
        ("edit_object", 10_000),
        ("subject_pair", 10_001),
    ]
    for sample in samples:
        scene, kind, seed = scenes[sample.name]
        again = make_scene(assets, kind, seed)
        assert np.array_equal(np.asarray(sample.open_image()), again.target)
        assert all(
            np.array_equal(np.asarray(picture), truth)
            for picture, truth in zip(sample.open_references(), again.references, strict=True)
        )
        assert np.abs(np.asarray(sample.open_mask()) / 255 - again.mask).max() <= 0.5 / 255 + 1e-6
        assert len(sample.open_reference_masks()) == len(again.references)
    by_kind = {kind: scene for scene, kind, _ in scenes.values()}
    assert tasks_of(by_kind["edit_object"]) == ["edit"] and tasks_of(by_kind["edit_global"]) == ["global"]
    assert tasks_of(by_kind["subject_place"]) == ["subject"]
    assert tasks_of(by_kind["subject_scene"]) == ["subject", "edit"]
