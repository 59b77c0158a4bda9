"""How the embedded base learns overviews."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_scenes import make_assets, save_assets
from torch.nn.functional import interpolate

from recipes.mini import overview, overview_export, overview_looks
from recipes.mini.attention import speed_up
from recipes.mini.model import decode_pictures, encode_pictures
from recipes.mini.overview import first_blocks, train_overview
from recipes.mini.overview_export import export_overview
from recipes.mini.overview_gates import Gate, fingerprint_of, run_gate, tokens_of
from recipes.mini.overview_looks import (
    COPYING,
    READING,
    looking_loss,
    reading_loss,
    watched_blocks,
    watched_copies,
)
from recipes.mini.overview_sets import OverviewConfig, TokenSet, composite, composites, draw_set, reference_tokens
from recipes.mini.run_folder import save_config
from recipes.mini.scenes import make_scene
from sparse_context.pipelines import embedded
from sparse_context.pipelines.embedded import ADAPTERS, adapter_record
from sparse_context.pipelines.load import load
from sparse_context.pipelines.overview_blocks import FIRST, NEW, grown, is_learnt
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.trained import Trained, trained_for
from sparse_context.training.checkpoints import newest_step

NONE = np.zeros(0, np.int64)  # sharp tokens


@pytest.fixture
def scene(assets):
    return make_scene(assets, "edit_global", 0)


@pytest.fixture
def inputs():
    """Of a forward: output and reference tokens, a prompt, a noise level."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 24, 32, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 128, generator=generator),
        "timestep": torch.tensor([0.3, 0.9]),
        "img_ids": torch.arange(24)[:, None].expand(24, 4).float(),
        "txt_ids": torch.zeros(5, 4),
        "return_dict": False,
    }


@torch.no_grad()
def test_new_blocks_change_nothing_until_they_are_trained(pipe, inputs):
    student = grown(pipe.transformer)
    assert len(student.single_transformer_blocks) == len(pipe.transformer.single_transformer_blocks) + NEW
    assert torch.equal(student(**inputs)[0], pipe.transformer(**inputs)[0])
    student.single_transformer_blocks[FIRST].attn.to_out.weight.fill_(0.01)
    assert not torch.equal(student(**inputs)[0], pipe.transformer(**inputs)[0])


def test_a_set_is_that_of_its_seed_and_holds_what_its_kind_says(scene):
    config = OverviewConfig()
    sets = [draw_set(config, [scene], [0, 3, step]) for step in range(60)]
    again = [draw_set(config, [scene], [0, 3, step]) for step in range(60)]
    assert all(np.array_equal(a.kept, b.kept) and a[:2] == b[:2] for a, b in zip(sets, again, strict=True))
    assert {tokens.kind for tokens in sets} == {"plain", "alone", "sharp"}
    for kind, factor, kept in sets:
        assert np.array_equal(kept, np.unique(kept)) and kept.dtype == np.int64
        assert factor in ((2, 4) if kind in ("alone", "sharp") else (0,))
        assert len(kept) == 0 if kind == "alone" else 8 <= len(kept) <= 128
    alone = [draw_set(config, [scene], [0, 3, step], overviews_alone=True) for step in range(60)]
    assert {tokens.kind for tokens in alone} == {"alone", "sharp"}


def test_objects_that_move_have_overviews_and_scenes_without_a_known_source_have_none(assets):
    for task, kinds in (("subject_pair", {"plain", "alone", "sharp"}), ("edit_remove", {"plain"})):
        drawn = make_scene(assets, task, 0)
        assert {draw_set(OverviewConfig(), [drawn], [0, 3, step]).kind for step in range(40)} == kinds


@torch.no_grad()
def test_a_composite_is_the_picture_where_it_is_sharp_and_what_the_overviews_tokens_hold_elsewhere(pipe, scene):
    picture = torch.from_numpy(scene.references[0].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    whole = composite(pipe.vae, picture, (16, 16), 4, np.arange(256))
    assert torch.equal(whole, picture)
    alone = composite(pipe.vae, picture, (16, 16), 4, NONE)
    tokens, _ = reference_tokens(pipe.vae, [picture], [encode_pictures(pipe.vae, picture)], TokenSet("alone", 4, NONE))
    small = decode_pictures(pipe.vae, tokens.transpose(1, 2).unflatten(2, (4, 4)))
    large = interpolate(small.clamp(-1, 1), size=(128, 128), mode="bicubic", align_corners=False)
    assert torch.allclose(alone, large.clamp(-1, 1), atol=1e-5)
    mixed = composite(pipe.vae, picture, (16, 16), 4, np.array([17]))
    assert torch.equal(mixed[..., 8:16, 8:16], picture[..., 8:16, 8:16])
    mixed[..., 8:16, 8:16] = alone[..., 8:16, 8:16]
    assert torch.equal(mixed, alone)


@torch.no_grad()
def test_each_reference_of_a_set_has_a_composite_of_its_own_tokens(pipe):
    pictures = [torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) for side in (64, 128)]
    grids = [(8, 8), (16, 16)]
    held = composites(pipe.vae, pictures, grids, TokenSet("sharp", 4, np.array([5, 64 + 17])))
    for i, kept in enumerate(([5], [17])):
        assert torch.equal(held[i], composite(pipe.vae, pictures[i], grids[i], 4, np.array(kept)))
        assert not torch.equal(held[i], composite(pipe.vae, pictures[i], grids[i], 4, NONE))


@torch.no_grad()
def test_the_tokens_of_a_set_are_the_sharp_ones_and_then_the_overview(pipe):
    picture = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    latents = torch.randn(1, 32, 16, 16)
    tokens, ids = reference_tokens(pipe.vae, [picture], [latents], TokenSet("sharp", 4, np.array([3, 18])))
    assert torch.equal(tokens[:, :2], latents.flatten(2).transpose(1, 2)[:, [3, 18]]) and tokens.shape == (1, 18, 32)
    assert ids[:2].tolist() == [[10, 0, 3, 0], [10, 1, 2, 0]] and ids[2].tolist() == [12, 1.5, 1.5, 0]
    small = reference_tokens(pipe.vae, [picture], [latents], TokenSet("alone", 4, np.zeros(0, np.int64)))[0]
    assert torch.equal(small, tokens[:, 2:])


def looks_of(monkeypatch, source, tokens, grids=((16, 16),)):
    """Where heads are to look: of reading heads by their cells, of the first copying one by "copying"."""
    heads = [*(head for head, _ in READING), COPYING[0]]
    seen = []
    monkeypatch.setattr(
        overview_looks, "look_loss", lambda q, k, rotary, wanted, text: seen.append(wanted) or torch.zeros(())
    )
    rotary = torch.zeros(1), torch.zeros(1)
    looking_loss(heads, [(None, None)] * len(heads), rotary, source, grids, tokens, 0)
    return dict(zip([*(cell for _, cell in READING), "copying"], seen, strict=True))


def test_every_cell_has_a_head_of_its_own():
    assert len({head for head, _ in READING}) == 4 * NEW == 16
    assert {cell for _, cell in READING} == {(row, column) for row in range(4) for column in range(4)}


def test_a_token_is_looked_at_by_the_head_of_its_cell(monkeypatch):
    source = torch.tensor([[0, 17, 3, 36, -1]])  # cells (0, 0), (1, 1), (0, 3), (2, 4), none; 36 is sharp
    looks = looks_of(monkeypatch, source, TokenSet("sharp", 4, np.array([36])))
    assert looks[0, 0].tolist() == [[1, -1, -1, -1, -1]]  # the first coarse token, behind the one sharp token
    assert looks[1, 1].tolist() == [[-1, 1, -1, -1, -1]]
    assert looks[0, 3].tolist() == [[-1, -1, 1, -1, -1]]
    assert looks["copying"].tolist() == [[-1, -1, -1, 0, -1]]
    others = [looks[cell] for _, cell in READING if cell not in ((0, 0), (1, 1), (0, 3))]
    assert all((wanted == -1).all() for wanted in others)


def test_a_token_of_a_later_reference_is_found_in_that_references_overview(monkeypatch):
    source = torch.tensor([[7, 64 + 17, 64 + 36]])  # of 8 x 8 tokens the cell (0, 7), of 16 x 16 (1, 1) and a sharp one
    looks = looks_of(monkeypatch, source, TokenSet("sharp", 4, np.array([64 + 36])), [(8, 8), (16, 16)])
    assert looks[0, 3].tolist() == [[1 + 1, -1, -1]]  # the second of the first reference's four coarse tokens
    assert looks[1, 1].tolist() == [[-1, 1 + 4, -1]]  # the first of the second reference's
    assert looks["copying"].tolist() == [[-1, -1, 0]]


@pytest.mark.parametrize("factor, cells", [(2, [(1, 1), (1, 2), (2, 1), (2, 2)]), (4, [cell for _, cell in READING])])
def test_every_token_is_looked_at_by_one_head_and_for_a_factor_of_two_by_one_of_the_inner(monkeypatch, factor, cells):
    looks = looks_of(monkeypatch, torch.arange(256)[None], TokenSet("alone", factor, np.zeros(0, np.int64)))
    looked = torch.stack([looks[cell] for cell in cells])
    assert ((looked >= 0).sum(0) == 1).all()
    row, column = torch.arange(256) // 16 // factor, torch.arange(256) % 16 // factor
    assert torch.equal(looked.amax(0)[0], row * (16 // factor) + column)
    assert all((looks[cell] == -1).all() for _, cell in READING if cell not in cells)


@torch.no_grad()
def test_what_heads_add_is_what_their_block_adds_but_for_the_rest_of_it(pipe, inputs):
    """With the other heads' and the MLP's part of its projection at zero, the heads are all that the block adds."""
    transformer = copy.deepcopy(pipe.transformer)
    projection = transformer.single_transformer_blocks[4].attn.to_out.weight
    projection[:, :128] = 0
    projection[:, 256:] = 0
    shown = slice(5, 25)
    with (
        watched_blocks(transformer, [3, 4], shown) as states,
        watched_copies(transformer, [(4, 2), (4, 3)], shown) as seen,
    ):
        transformer(**inputs)
    assert (states[1] - states[0]).abs().max() > 1e-3 and seen[0].abs().max() > 1e-3
    assert torch.allclose(seen[0] + seen[1], states[1] - states[0], atol=1e-5)


@torch.no_grad()
def test_the_first_blocks_are_the_transformers_own(pipe, inputs):
    short = first_blocks(pipe.transformer, 5)
    assert len(short.single_transformer_blocks) == 5
    assert short.single_transformer_blocks[4] is pipe.transformer.single_transformer_blocks[4]
    with watched_blocks(pipe.transformer, [4], slice(5, 29)) as whole, watched_blocks(short, [4], slice(5, 29)) as part:
        pipe.transformer(**inputs)
        short(**inputs)
    assert torch.equal(whole[0], part[0])  # each hook sees both, for they share the block
    assert len(whole) == 2 and torch.equal(whole[0], whole[1])


def test_a_gate_keeps_the_same_share_of_each_reference_overviews_included(assets):
    pair, edit = make_scene(assets, "subject_pair", 0), make_scene(assets, "edit_global", 0)
    for scene, tokens, coarse in ((pair, 576, 36), (edit, 256, 16)):
        for gate, sharp in (
            (Gate("base", keep=1), tokens),
            (Gate("dropper", keep=0.2), round(0.2 * tokens)),
            (Gate("student", 4, 0.2), round(0.2 * tokens) - coarse),
            (Gate("student", 4), 0),
        ):
            of_each = np.bincount(tokens_of(gate, scene).kept // tokens, minlength=len(scene.references))
            assert of_each.tolist() == [sharp] * len(scene.references)
    chosen = tokens_of(Gate("student", 4, 0.1, "mask"), pair).kept
    shown = np.concatenate([mask.reshape(24, 8, 24, 8).mean((1, 3)).ravel() for mask in pair.reference_masks])
    assert shown[chosen].mean() > 0.5 > shown[tokens_of(Gate("student", 4, 0.1), pair).kept].mean()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_gate_measures_the_weights_that_ship_and_adds_a_record(tmp_path):
    save_assets(make_assets(), tmp_path)
    gates = (Gate("base", keep=1), Gate("student", 4, 0.2), Gate("ceiling", 4))
    figures = run_gate(tmp_path, None, 1, gates, ("edit_global", "subject_quarters"))
    labels = {"edit_global": "student by 4, 0.2 residual", "subject_quarters": "student by 4, 0.2 mask"}
    assert set(figures) == {"base", "ceiling by 4", *labels.values()}
    for task, label in labels.items():
        assert figures["base"][task] > figures[label][task]
    (line,) = (tmp_path / "shipped" / "gates.jsonl").read_text().splitlines()
    weights = fingerprint_of(embedded.OVERVIEW)
    assert json.loads(line) == {"step": 0, "scenes": 1, "weights": weights, "psnr": figures}


def test_reading_is_judged_where_the_overview_alone_shows_the_source():
    added, wanted = torch.zeros(1, 3, 2), torch.tensor([[[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]]])
    blurred = torch.tensor([[True, False, True]])
    assert reading_loss(added, [wanted], blurred) == 1
    added[0, 0] = 1
    assert reading_loss(added, [wanted / 2, wanted / 2], blurred).item() == pytest.approx(2 / 3)
    assert reading_loss(added, [wanted], torch.zeros(1, 3, dtype=torch.bool)) == 0


@pytest.fixture
def student(pipe):
    return learned(pipe.transformer)


def learned(base):
    """A student whose first new block and the one behind the new ones have learned something, of rank 2."""
    student = grown(base)
    generator = torch.Generator().manual_seed(0)
    blocks = student.single_transformer_blocks
    for block in (blocks[FIRST], blocks[FIRST + NEW]):
        change = torch.randn(256, 2, generator=generator) @ torch.randn(2, 1024, generator=generator)
        block.attn.to_out.weight.data += 0.01 * change
    return student


def test_of_a_transformer_that_has_new_blocks_already_a_copy_is_made(student):
    again = grown(student)
    assert again is not student and again.config.num_single_layers == student.config.num_single_layers
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in student.state_dict().items())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_an_export_is_what_users_load_and_what_later_runs_begin_at(tmp_path, monkeypatch):
    """In the package's place, as `lora="overview"`: its new blocks and those behind as eight-bit floats; and the model
    without it stays as it was."""
    path, plain = tmp_path / "overview.safetensors", load(ModelSpec(device="cpu")).transformer
    begun, student = grown(plain).state_dict(), learned(plain)

    def load_average(folder, module):
        module.load_state_dict(student.state_dict())
        return 3

    monkeypatch.setattr(overview_export, "load_average", load_average)
    monkeypatch.setattr("sparse_context.pipelines.load.OVERVIEW", path)
    config = OverviewConfig(keep=(0.1, 0.4), mix=(("plain", 0.5), ("alone", 0.3), ("sharp", 0.2)))
    save_config(tmp_path / "overview", config)
    assert export_overview(tmp_path, "overview", path) == path
    record = adapter_record(path)
    assert (record["steps"], record["plain"], record["overview"]["alone"]) == (3, 0.5, 0.3)
    assert record["base_weights"] == adapter_record(ADAPTERS["plain"])["base_weights"]
    assert trained_for(load(ModelSpec(device="cpu")).transformer).factors == ()
    loaded = load(ModelSpec(device="cpu", lora="overview")).transformer
    assert trained_for(loaded) == Trained((2, 4), "spread", False, (0.1, 0.65), ("edit", "global"))
    for name, tensor in student.state_dict().items():
        change = (loaded.state_dict()[name] - tensor).norm()
        if is_learnt(name):  # eight bits
            assert change <= 0.05 * tensor.norm()
        else:
            assert torch.equal(loaded.state_dict()[name], begun[name])
    after = load(ModelSpec(device="cpu")).transformer.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in plain.state_dict().items())


COMPILES = pytest.mark.filterwarnings(  # of torch's compiler, by itself
    "ignore:.*torch.jit.script_method:DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf"
)


@pytest.mark.slow
@COMPILES
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_compiled_attention_is_the_hosts(pipe, inputs):
    """In bfloat16, to within what rounding makes of it; gradients, too."""
    answers, gradients = [], []
    for transformer in (grown(pipe.transformer), grown(pipe.transformer)):
        if answers:
            speed_up(transformer)
        with torch.autocast("cpu", torch.bfloat16):
            answer = transformer(**inputs)[0].float()
        answer.square().sum().backward()
        answers.append(answer.detach())
        gradients.append(transformer.single_transformer_blocks[FIRST + NEW].attn.to_qkv_mlp_proj.weight.grad)
    for plain, compiled in (answers, gradients):
        assert (plain - compiled).norm() < 0.05 * plain.norm()
    assert not torch.equal(*answers)  # else nothing was compiled


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_run_trains_the_new_blocks_and_those_behind_them_alone_and_goes_on(tmp_path, pipe, monkeypatch):
    monkeypatch.setattr(overview, "speed_up", lambda transformer: None)  # compiles for half a minute
    save_assets(make_assets(), tmp_path)
    config = OverviewConfig(steps=2, batch=4, subsets=1, warmup=1, reading=1)
    train_overview(tmp_path, config, stop_after=0.0)
    assert newest_step(tmp_path / "overview") == 1
    train_overview(tmp_path, config)
    assert newest_step(tmp_path / "overview") == 2
    with pytest.raises(ValueError, match="was begun with batch 4"):
        train_overview(tmp_path, OverviewConfig(steps=2, batch=16, subsets=1, warmup=1, reading=1))
    trained = load_file(tmp_path / "overview" / "step-0000002" / "weights.safetensors")
    before = load(ModelSpec(device="cpu", lora="overview")).transformer.state_dict()  # where a run begins
    changed = {name.split(".")[1] for name, weight in trained.items() if not torch.equal(weight, before[name])}
    frozen = {str(number) for number in range(FIRST)}
    assert changed & frozen == set() and {str(number) for number in range(FIRST, FIRST + NEW + 4)} <= changed
