"""Training with overviews: which sets a batch draws, what the transformer sees of them, where heads are taught to look,
and what a run leaves."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline, Flux2Pipeline, FluxKontextPipeline
from safetensors.torch import load_file
from test_finetune import SMALL, batches, example, klein, parts, randomise
from tiny import CASES, build_flux2, build_kontext, call_flux2, embeds, picture

from sparse_context.families import find_host
from sparse_context.overview import LAYOUTS, Overview, overview_grid
from sparse_context.pipelines.embedded import adapter_record
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.samples import check_samples, read_samples
from sparse_context.selectors.residual import Residual
from sparse_context.sparsify import apply_sparse_context, last_selection
from sparse_context.tokens import ReferenceTokens
from sparse_context.trained import Trained, trained_for
from sparse_context.training.batch import Encoding, TokenSet, aligned_source, encode, kept_tokens, prepare_batch
from sparse_context.training.cache import Cache
from sparse_context.training.card import model_card
from sparse_context.training.config import TrainConfig
from sparse_context.training.data import open_example
from sparse_context.training.dropping import Dropping, draw_selection
from sparse_context.training.finetune import Run, Watch, finetune
from sparse_context.training.loss import FlowMatching, flow_matching_loss
from sparse_context.training.teaching import looking_loss, wanted_tokens
from sparse_context.training.trainable import prepare

GRID = (16, 16)
PICTURE = np.asarray(picture(128, 128))
BESIDE = {"dense": 0.0, "overview_none": 0.0, "overview_alone": 0.0, "overview_residual": 0.0}
WITH = Dropping(mix={"random": 1.0}, dense=0.0, overview_factors=(2, 4), overview_none=0.0)


def draws(count=600, grids=(GRID,), pictures=(PICTURE,), **settings):
    dropping = Dropping(**{"mix": {"random": 1.0}, "overview_factors": (2, 4), **settings})
    return [draw_selection(dropping, pictures, grids, [7, number, 0]) for number in range(count)]


# Which sets a batch draws ---------------------------------------------------------------------------------------------


def test_without_factors_there_are_no_overviews_and_other_shares_move_nothing():
    settings = {"overview_none": 0.0, "overview_alone": 1.0, "overview_residual": 1.0, "overview_layout": "reference"}
    plain, moved = draws(50, overview_factors=()), draws(50, overview_factors=(), **settings)
    assert all(np.array_equal(a.index, b.index) and not b.overviews for a, b in zip(plain, moved, strict=True))


def test_batches_come_in_the_shares_that_are_asked_for():
    drawn = draws(1000, dense=0.2, overview_none=0.3, overview_alone=0.25)
    dense = [s for s in drawn if s.kept == s.total]
    others = [s for s in drawn if s.kept < s.total]
    none = [s for s in others if not s.overviews]
    alone = [s for s in others if s.overviews and not len(s.index)]
    for found, share, of in ((dense, 0.2, drawn), (none, 0.3, others), (alone, 0.25, others)):
        assert abs(len(found) / len(of) - share) < 3 * np.sqrt(share * (1 - share) / len(of)) + 0.01
    by = [s.overviews[0].factor for s in others if s.overviews]
    assert set(by) == {2, 4} and abs(by.count(2) / len(by) - 0.5) < 3 * np.sqrt(0.25 / len(by))


def test_a_batch_has_one_factor_and_each_reference_an_overview_of_it():
    for selection in draws(60, [GRID, (8, 12)], [PICTURE, np.asarray(picture(96, 64))], **BESIDE):
        if selection.overviews:
            (factor,) = {each.factor for each in selection.overviews.values()}
            for i, each in selection.overviews.items():
                assert each.grid == overview_grid(selection.references[i].grid, factor)


@pytest.mark.parametrize("settings", [{}, {"overview_layout": "reference"}])
def test_the_layout_is_the_one_that_is_asked_for(settings):
    (selection,) = draws(1, overview_none=0.0, dense=0.0, **settings)
    assert selection.overviews[0].layout == settings.get("overview_layout", "spread")


def test_as_many_ratios_lie_below_few_as_above_and_a_ratio_counts_the_overview():
    kept = np.array([s.kept / s.total for s in draws(1500, overview_factors=(4,), **BESIDE)])
    assert kept.min() == 1 / 16 and kept.max() > 0.95
    assert abs((kept < 0.15).mean() - 0.5) < 3 * np.sqrt(0.25 / 1500) + 0.01
    below, above = np.sort(kept[kept < 0.15]), np.sort(kept[kept >= 0.15])
    for part, low, high in ((below, 1 / 16, 0.15), (above, 0.15, 1.0)):  # log-uniform: Kolmogorov and Smirnov
        law = np.log(part / low) / np.log(high / low)
        assert np.abs(law - np.arange(1, len(part) + 1) / len(part)).max() < 1.63 / np.sqrt(len(part)) + 0.03
    by_2 = np.array([s.kept / s.total for s in draws(300, overview_factors=(2,), **BESIDE)])
    assert by_2.min() >= 0.25  # what the overview takes is above that already


@pytest.mark.parametrize(
    ("settings", "share", "below"),
    [
        ({}, 0.882, 0.5),  # by 2 or 4: 0.45 of the sets are by 2, and so above; of those alone 0.125 are by 4
        ({"overview_factors": (4,)}, 1 / 3, 0.5),  # a quarter is alone
        ({"overview_factors": (2,)}, 0.9, 0.09),  # only the tenth without an overview may lie below
        ({"overview_factors": (4,), "overview_alone": 0.9}, 0.1, 0.91),
    ],
)
def test_few_are_as_frequent_as_more_as_far_as_overviews_leave_the_choice(settings, share, below):
    assert Dropping(**{"overview_factors": (2, 4)} | settings).few_share == pytest.approx(share, abs=1e-3)
    kept = np.array([s.kept / s.total for s in draws(1000, dense=0.0, mix={"uniform": 1}, **settings)])
    assert abs((kept < 0.15).mean() - below) < 3 * np.sqrt(below * (1 - below) / 1000) + 0.01


def test_without_an_overview_as_many_lie_below_few_too():
    drawn = draws(1500, dense=0.0, overview_none=1.0, overview_alone=0.0)
    kept = np.array([s.kept / s.total for s in drawn])
    assert not any(s.overviews for s in drawn) and kept.min() < 0.06
    assert abs((kept < 0.15).mean() - 0.5) < 3 * np.sqrt(0.25 / 1500) + 0.01


def test_a_share_of_the_sharp_tokens_is_chosen_by_the_residual_of_the_batch_s_factor():
    drawn = draws(300, **BESIDE | {"overview_residual": 0.4}, keep_max=0.5)
    labels = [s.references[0].selector for s in drawn]
    assert set(labels) == {"random", "residual"} and all(s.coverage == (0.0,) for s in drawn)
    assert abs(labels.count("residual") / 300 - 0.4) < 3 * np.sqrt(0.24 / 300)
    for selection in drawn:
        if selection.references[0].selector == "residual":
            scores = Residual(selection.overviews[0].factor)(PICTURE, GRID, np.random.default_rng(0))
            assert np.array_equal(selection.references[0].scores, scores)
    assert all(s.references[0].selector == "residual" for s in draws(9, **BESIDE, mix={"residual": 1}, keep_max=0.5))


def test_a_tiny_reference_is_kept_whole_where_its_overview_is_as_large():
    (selection,) = draws(1, [(1, 1)], [PICTURE], **BESIDE | {"overview_alone": 1.0})
    assert selection.kept == 1 and not selection.overviews


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overview_factors": (1, 4)}, r"overview_factors is \[1, 4\]: pass whole numbers from 2 to 16"),
        ({"overview_factors": (4.0,)}, r"overview_factors is \[4.0\]: pass whole"),
        ({"overview_layout": "over"}, "overview_layout is 'over': choose one of spread, reference"),
        ({"overview_none": -0.1}, "overview_none is -0.1: pass a share"),
        ({"overview_residual": 2}, "overview_residual is 2: pass a share"),
        ({"overview_none": 0.6, "overview_alone": 0.6}, "which is more than all batches"),
        ({"merge": (0.0, 0.3)}, "leave one of the two out"),
        ({"keep_max": 0.2}, "overview_factors has 2, which takes 0.25 of the tokens, and keep_max is 0.2"),
    ],
)
def test_settings_of_overviews_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Dropping(**{"overview_factors": (2, 4), **changes})


def test_what_weights_are_trained_for_follows_from_the_sets():
    assert Dropping().trained() == Trained((), "spread", False, (0.05, 1.0))
    assert Dropping(overview_factors=(8, 2)).trained(kv=True) == Trained((2, 8), "spread", True, (1 / 64, 1.0))
    settings = {"overview_factors": (8,), "overview_alone": 0.0, "overview_layout": "reference"}
    assert Dropping(**settings).trained() == Trained((8,), "reference", False, (0.05, 1.0))
    for never in ({"overview_none": 1.0}, {"dense": 1.0}):
        assert Dropping(**settings | never).trained() == Dropping().trained()


# What the transformer sees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", [Flux2Pipeline, Flux2KleinPipeline, Flux2KleinKVPipeline])
def test_the_host_hands_over_the_overviews_that_the_pipeline_does(cls, layout, factor):
    """The same tokens and position ids of all references and overviews, bit by bit; a picture of 120 rows is padded."""
    pipe = build_flux2(cls)
    pictures = [picture(96, 64), picture(64, 120, 1)]
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(dict(k)), with_kwargs=True)
    apply_sparse_context(pipe, keep=0.4, selector="edges", overview=factor, overview_layout=layout)
    call_flux2(pipe, pictures)
    selection = last_selection(pipe)
    assert list(selection.overviews) == [0, 1]
    host = find_host(build_flux2(cls), {})
    host.encode_text = lambda prompts, pictures: {"prompt_embeds": embeds()}  # dev's encoder is too large
    made = replace(example(), references=tuple(pictures), masks=(None, None))
    encoded = encode(host, prepare_batch(host, [made], ["x"]), overviews=[(0, factor), (1, factor)])
    kept = kept_tokens(host, encoded, TokenSet.of(selection))
    assert len(kept) == selection.kept
    first = 0 if cls is Flux2KleinKVPipeline else 64
    latents = seen[0]["hidden_states"]
    output = latents[:, :64] if first else latents[:, -64:]
    noisy = ReferenceTokens(output, host.target_tokens(encoded.target).ids)
    mine = []
    host.transformer.register_forward_pre_hook(lambda m, a, k: mine.append(dict(k)), with_kwargs=True)
    with torch.no_grad():
        host.velocity(noisy, torch.tensor([1.0]), {"prompt_embeds": embeds()}, kept)
    hook.remove()
    for name in ("hidden_states", "img_ids"):
        assert torch.equal(mine[0][name], seen[0][name]), name
    if cls is Flux2KleinKVPipeline:
        assert mine[0]["num_ref_tokens"] == seen[0]["num_ref_tokens"] == selection.kept


def test_the_loss_is_that_of_the_sharp_tokens_and_the_overviews():
    host = klein()
    encoded, sigma, noise = parts(host)
    pixels = prepare_batch(host, [example()], ["x"])
    encoded = encode(host, pixels, overviews=[(1, 4)])
    overview = Overview(4, "spread", (2, 3))
    index = np.arange(0, 160, 3)
    small = host.encode_pictures(torch.nn.functional.avg_pool2d(pixels.references[1], 4))
    assert torch.equal(encoded.overviews[1, 4], small) and small.shape[-2:] == (2, 3)
    whole = host.reference_tokens(encoded.references)
    row, column = torch.meshgrid(torch.tensor([1.5, 5.5]), torch.tensor([1.5, 5.5, 9.5]), indexing="ij")
    ids = torch.stack([torch.full((2, 3), 22.0), row, column, torch.zeros(2, 3)], -1).flatten(0, 1)[None]
    kept = whole.keep(index).join(ReferenceTokens(host.pipe._pack_latents(small), ids))
    noisy = host.target_tokens(0.3 * encoded.target + 0.7 * noise)
    velocity = host.velocity(noisy, sigma, encoded.text, kept)
    expected = (velocity - host.target_tokens(noise - encoded.target).latents).square().mean()
    loss = flow_matching_loss(host, encoded, index, sigma, noise, overviews={1: overview})
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert loss != flow_matching_loss(host, encoded, index, sigma, noise)


def test_what_an_overview_shows_is_not_unseen():
    host = klein()
    encoded, sigma, noise = parts(host)
    encoded = encode(host, prepare_batch(host, [example()], ["x"]), overviews=[(1, 4)])

    def loss(source, unseen, overviews):
        shown = replace(encoded, source=torch.full((1, 64), source))
        index = np.arange(0, 160, 2)
        return flow_matching_loss(host, shown, index, sigma, noise, unseen=unseen, overviews=overviews).item()

    overviews = {1: Overview(4, "spread", (2, 3))}
    half = torch.tensor([[5] * 32 + [4] * 32])
    encoded = replace(encoded, source=half)
    weighed = flow_matching_loss(host, encoded, np.arange(0, 160, 2), sigma, noise, unseen=0.25, overviews=overviews)
    assert weighed.item() != pytest.approx(loss(4, 0.25, overviews), rel=1e-4)  # of the first reference, which has none
    encoded = replace(encoded, source=half + 64)
    shown = flow_matching_loss(host, encoded, np.arange(0, 160, 2), sigma, noise, unseen=0.25, overviews=overviews)
    assert shown.item() == pytest.approx(loss(4, 1.0, overviews), rel=1e-6)


def test_the_subsets_of_a_batch_have_overviews_of_their_own_and_each_is_encoded_once(monkeypatch):
    host = klein()
    config = TrainConfig(subsets=4, dropping=WITH, **SMALL)
    prepare(host, config)
    sizes, encode_pictures = [], host.encode_pictures
    host.encode_pictures = lambda pixels: (sizes.append(tuple(pixels.shape[-2:])), encode_pictures(pixels))[1]
    counts, velocity = [], host.velocity
    host.velocity = lambda noisy, sigma, text, references: (
        counts.append(len(references)),
        velocity(noisy, sigma, text, references),
    )[1]
    loss = FlowMatching(host, batches, config)
    values = [loss(number).item() for number in range(4)]
    assert len(set(values)) == 4
    made = prepare_batch(host, batches(0), ["x", "x"])
    seeds = [[0, 3, 0, 0], *([0, 3, 0, 0, subset] for subset in (1, 2, 3))]
    sets = [draw_selection(WITH, made.pictures, made.grids(host.token), seed) for seed in seeds]
    assert counts == [each.kept for each in sets] and all(each.overviews for each in sets)
    assert sizes[:3] == [(64, 64), (64, 64), (64, 96)]
    by_factor = {2: [(32, 32), (32, 48)], 4: [(16, 16), (16, 24)]}
    assert sorted(sizes[3:]) in [sorted(by_factor[2]), sorted(by_factor[4]), sorted(by_factor[2] + by_factor[4])]
    assert FlowMatching(host, batches, config)(2).item() == values[2]  # resumed in the middle of a batch


def test_processes_that_prepare_batches_change_nothing():
    host = klein()
    config = TrainConfig(dropping=WITH, **SMALL)
    prepare(host, config)
    by_processes, by_a_thread = (FlowMatching(host, batches, config, encoding=Encoding(workers)) for workers in (2, 0))
    assert [by_processes(n).item() for n in (4, 5)] == [by_a_thread(n).item() for n in (4, 5)]


def test_cached_latents_hold_overviews_too(tmp_path):
    host = klein()
    batch, overviews = prepare_batch(host, batches(0), ["a", "b"]), [(0, 2), (1, 4)]
    plain = encode(host, batch, overviews=overviews)
    for _ in range(2):
        cached = encode(host, batch, Cache(tmp_path, host.pipe.vae), overviews=overviews)
        assert cached.overviews.keys() == plain.overviews.keys() == {(0, 2), (1, 4)}
        assert all(torch.allclose(cached.overviews[key], plain.overviews[key], atol=1e-5) for key in plain.overviews)
        host.encode_pictures = None  # the second time, all comes from the disk
    assert len(list(tmp_path.rglob("*.safetensors"))) == 6 + 4


# Where heads look -----------------------------------------------------------------------------------------------------


def attention_of(host, head, block, noisy, kept, text, sigma):
    """Where one head of a single block looks, from what the block itself hands to its attention."""
    from diffusers.models.transformers import transformer_flux2

    seen, dispatch = [], transformer_flux2.dispatch_attention_fn

    def watch(query, key, *args, **kwargs):
        seen.append((query, key))
        return dispatch(query, key, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_flux2, "dispatch_attention_fn", watch)
        host.velocity(noisy, sigma, text, kept)
    # In KV mode there are two of each block: the references look at themselves alone
    seen = [(query, key) for query, key in seen if query.shape[1] > len(kept)]
    query, key = seen[len(host.transformer.transformer_blocks) + block]
    scores = torch.einsum("bqd,bkd->bqk", query[:, :, head], key[:, :, head]) * query.shape[-1] ** -0.5
    return scores.softmax(-1)


@pytest.mark.parametrize("kv", [False, True])
def test_looks_are_the_attention_of_the_named_heads(kv):
    host = klein(kv)
    encoded, sigma, noise = parts(host)
    kept = host.reference_tokens(encoded.references).keep(np.arange(0, 160, 3))
    noisy, count = host.target_tokens(noise), len(kept)
    for block, head in ((0, 1), (1, 0)):
        with host.watch_heads([(block, head)]) as looks:
            host.velocity(noisy, sigma, encoded.text, kept)
        (look,) = looks(64, count)
        weights = attention_of(host, head, block, noisy, kept, encoded.text, sigma)
        text = weights.shape[-1] - 64 - count
        columns = weights[:, -64:, text : text + count] if kv else weights[:, text : text + 64, -count:]
        assert look.shape == (1, 64, 1 + count)
        assert torch.allclose(look.exp()[..., 1:], columns, atol=1e-5)
        assert torch.allclose(look.exp().sum(-1), torch.ones(1, 64), atol=1e-5)
    assert not host.transformer.single_transformer_blocks[0].attn.norm_q._forward_hooks


def test_blocks_that_hide_their_heads_are_told():
    with klein().watch_heads([(0, 0)]) as looks:
        pass
    with pytest.raises(ValueError, match="do not show where their heads look, as compiled ones do not"):
        looks(64, 1)


def test_an_output_token_is_to_look_at_its_sharp_token_or_at_the_overview_that_covers_it():
    grids = [(4, 4), (2, 4)]
    kept = TokenSet(np.array([1, 6, 17]), None, {0: Overview(2, "spread", (2, 2)), 1: Overview(4, "spread", (1, 1))})
    source = torch.tensor([[-1, 0, 1, 6, 7, 15, 16, 17, 23]])
    # Sharp tokens are 0 to 2, the first overview's 3 to 6, the second's 7
    assert wanted_tokens(source, grids, kept).tolist() == [[-1, 3, 0, 1, 4, 6, 7, 2, 7]]
    plain = replace(kept, overviews={})
    assert wanted_tokens(source, grids, plain).tolist() == [[-1, -1, 0, 1, -1, -1, -1, 2, -1]]
    into = np.full(24, -1)
    into[[0, 1, 6, 17]] = [1, 1, 6, 17]
    assert wanted_tokens(source, grids, replace(plain, into=into)).tolist() == [[-1, 0, 0, 1, -1, -1, -1, 2, -1]]
    by_4 = replace(kept, index=np.zeros(0, np.int64), overviews={0: Overview(4, "spread", (1, 1))})
    assert wanted_tokens(source, grids, by_4).tolist() == [[-1, 0, 0, 0, 0, 0, -1, -1, -1]]


def test_the_loss_of_looking_is_the_cross_entropy_of_both_kinds_of_tokens():
    looks = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    source, wanted = torch.tensor([[5, 6, -1], [-1, -1, -1]]), torch.tensor([[2, -1, -1], [-1, -1, -1]])
    expected = -looks[0, 0, 3] - (looks[0, 1, 0] + looks[0, 2, 0]) / 2
    assert torch.allclose(looking_loss([looks], source, wanted), expected)
    assert torch.allclose(looking_loss([looks, looks], source, wanted), expected)


@pytest.mark.parametrize(("kv", "checkpointing"), [(False, False), (False, True), (True, False)])
def test_teaching_makes_heads_look_where_they_should(kv, checkpointing):
    host = klein(kv)
    shown = [replace(example(0, sizes=((64, 64),)), aligned=True)]
    dropping = replace(WITH, overview_factors=(4,), overview_alone=1.0)
    config = TrainConfig(
        kv=kv, teach=1.0, teach_heads=("1.0", "1.1"), dropping=dropping, gradient_checkpointing=checkpointing, **SMALL
    )
    trained = prepare(host, config)
    taught, plain = (
        FlowMatching(host, lambda number: shown, replace(config, teach=t, teach_heads=h))
        for t, h in ((1.0, ("1.0", "1.1")), (0.0, ()))
    )
    optimiser = torch.optim.AdamW(trained.parameters(), lr=2e-2)
    values = []
    for _ in range(8):
        loss = taught(0)
        with torch.no_grad():
            values.append(loss.item() - plain(0).item())
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in trained.parameters() if p.grad is not None)
        optimiser.step()
        optimiser.zero_grad()
    assert values[-1] < 0.9 * values[0] and values[0] > 1


def test_checkpointing_changes_no_gradient_of_teaching():
    grads = []
    for checkpointing in (False, True):
        host = klein()
        shown = [replace(example(0, sizes=((64, 64),)), aligned=True)]
        config = TrainConfig(
            teach=1.0, teach_heads=("1.0",), dropping=WITH, gradient_checkpointing=checkpointing, **SMALL
        )
        trained = prepare(host, config)
        randomise(host.transformer)
        FlowMatching(host, lambda number: shown, config)(0).backward()  # noqa: B023
        grads.append([p.grad for p in trained.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_without_a_correspondence_nothing_is_taught():
    host = klein()
    config = TrainConfig(dropping=WITH, **SMALL)
    prepare(host, config)
    taught = replace(config, teach=3.0, teach_heads=("0.0",))
    plain, same = (FlowMatching(host, batches, each)(0).item() for each in (config, taught))
    aligned = [replace(each, aligned=True) for each in batches(0)]
    assert plain == same != FlowMatching(host, lambda number: aligned, taught)(0).item()


def test_a_batch_that_is_held_to_the_dense_answer_is_not_taught():
    host = klein()
    config = TrainConfig(preservation=2.0, dropping=Dropping(dense=1.0), **SMALL)
    prepare(host, config)
    randomise(host.transformer)
    shown = [replace(example(), aligned=True)]
    plain, taught = (
        FlowMatching(host, lambda number: shown, each)(0).item()
        for each in (config, replace(config, teach=3.0, teach_heads=("0.0",)))
    )
    assert plain == taught


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teach": 0.1}, "teach is 0.1 and teach_heads empty: pass a weight and heads"),
        ({"teach_heads": ("1.0",)}, "teach is 0.0 and teach_heads 1.0: pass a weight and heads"),
        ({"teach": -1.0, "teach_heads": ("1.0",)}, "teach is -1.0"),
        ({"teach": 0.1, "teach_heads": ("1",)}, "teach_heads has '1': write block and head, counted from 0"),
        (
            {"teach": 0.1, "teach_heads": ("1.0",), "compile": True},
            "compiled blocks do not show where their heads look: leave one of the two out",
        ),
    ],
)
def test_settings_of_teaching_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize("head", ["2.0", "0.2"])
def test_heads_that_the_transformer_has_not_are_named(head):
    with pytest.raises(ValueError, match=f"teach_heads has {head}, but the transformer has 2 single blocks of 2 heads"):
        prepare(klein(), TrainConfig(teach=0.1, teach_heads=(head,)))


def test_teaching_is_refused_where_it_is_not_built():
    host = find_host(build_kontext(FluxKontextPipeline), {})
    with pytest.raises(
        ValueError, match="^teach_heads is for FLUX.2: the heads of FluxKontextPipeline cannot be taught"
    ):
        prepare(host, TrainConfig(teach=0.1, teach_heads=("0.0",)))


def test_aligned_output_tokens_show_their_own_place():
    assert np.array_equal(aligned_source((2, 3), (2, 3)), np.arange(6).reshape(2, 3))
    assert aligned_source((2, 2), (4, 4)).tolist() == [[5, 7], [13, 15]]
    assert aligned_source((4, 4), (2, 2)).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    host = klein()
    given = [replace(example(0), aligned=True), example(0)]
    batch = prepare_batch(host, given, ["a", "b"])
    assert batch.source.tolist() == [list(range(64)), [-1] * 64]
    own = replace(given[0], source=np.full((8, 8), 70))
    assert prepare_batch(host, [own], ["a"]).source.unique().tolist() == [70]


def test_a_manifest_says_which_samples_are_aligned(tmp_path):
    picture(96, 64).save(tmp_path / "a.png")
    row = {"references": ["a.png"], "image": "a.png", "prompt": ""}
    rows = [row, {**row, "aligned": True}, {**row, "aligned": False}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = read_samples(tmp_path / "m.jsonl")
    assert [sample.aligned for sample in samples] == [False, True, False]
    assert [open_example(sample, 64, 64).aligned for sample in samples] == [False, True, False]
    (tmp_path / "bad.jsonl").write_text(json.dumps({**row, "aligned": "yes"}))
    assert check_samples(tmp_path / "bad.jsonl") == ["line 1: 'aligned' is 'yes': write true or false."]


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_flux2(Flux2KleinPipeline, is_distilled=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kv", [False, True])
def test_a_lora_that_was_trained_for_overviews_gets_them_by_default(kv, model, tmp_path):
    """From the run to the call: its file says it, loading notes it, and a call without a word of overviews has one."""
    config = TrainConfig(kv=kv, dropping=replace(WITH, overview_alone=0.5), **SMALL)
    result = finetune(klein(kv), batches, Run(tmp_path / "run", "tiny", "x"), config)
    record = adapter_record(result)
    assert record["overview"] == {"factors": [2, 4], "layout": "spread", "none": 0.0, "alone": 0.5, "residual": 0.5}
    assert record["kv"] is kv and record["keep"] == [0.05, 1.0]
    pipe = load(ModelSpec(str(model), lora=str(result), kv=kv, dtype="float32", device="cpu"))
    pipe.set_progress_bar_config(disable=True)
    assert trained_for(pipe.transformer, kv) == Trained((2, 4), "spread", kv, (0.05, 1.0))
    for keep, task, factor in ((0.2, "global", 4), (0.4, "global", 2), (0.4, "edit", 4)):
        apply_sparse_context(pipe, keep=keep, selector="edges", task=task)
        call_flux2(pipe, [picture(64, 64)])
        selection = last_selection(pipe)
        assert [(each.factor, each.layout) for each in selection.overviews.values()] == [(factor, "spread")]
        assert selection.kept == int(64 * keep + 0.5)
        assert str(selection).endswith("the weights were trained for overviews by 2 or 4, laid out as 'spread'")
    pipe.unload_lora_weights()
    call_flux2(pipe, [picture(64, 64)])
    assert not last_selection(pipe).overviews


def test_all_weights_that_were_trained_for_overviews_get_them_by_default(model, tmp_path):
    config = TrainConfig(full=True, dropping=WITH, **SMALL | {"max_train_steps": 1})
    host = klein()
    result = finetune(host, batches, Run(tmp_path / "run", "tiny", "x"), config)
    host.pipe.transformer = type(host.transformer).from_pretrained(result)
    host.pipe.save_pretrained(tmp_path / "tuned")
    record = json.loads((result / "sparse_context.json").read_text())
    assert record["overview"]["factors"] == [2, 4]
    (tmp_path / "tuned" / "transformer" / "sparse_context.json").write_text(json.dumps(record))
    pipe = load(ModelSpec(str(tmp_path / "tuned"), dtype="float32", device="cpu"))
    assert trained_for(pipe.transformer).factors == (2, 4)


def test_a_pipeline_that_caches_is_trained_in_kv_mode_whatever_the_settings_say(tmp_path):
    settings = {"max_sequence_length": 12, "text_encoder_out_layers": [1, 2]}
    host = find_host(build_flux2(Flux2KleinKVPipeline), settings)
    config = TrainConfig(dropping=WITH, **SMALL | {"max_train_steps": 1})
    assert adapter_record(finetune(host, batches, Run(tmp_path, "tiny", "x"), config))["kv"] is True


def test_a_resumed_run_with_overviews_ends_at_equal_weights(tmp_path):
    shown = lambda number: [replace(each, aligned=True) for each in batches(number)]  # noqa: E731
    config = TrainConfig(
        dropping=WITH,
        teach=0.5,
        teach_heads=("1.0",),
        subsets=2,
        **SMALL | {"max_train_steps": 4, "checkpointing_steps": 1, "ema": 0.5},
    )
    whole = finetune(klein(), shown, Run(tmp_path / "whole", "tiny", "x"), config)

    def killed(number):
        if number >= 3:
            raise KeyboardInterrupt
        return shown(number)

    with pytest.raises(KeyboardInterrupt):
        finetune(klein(), killed, Run(tmp_path / "cut", "tiny", "x"), config)
    other = replace(config, dropping=replace(WITH, overview_factors=(4,)))
    with pytest.raises(ValueError, match="dropping was .* and is now"):
        finetune(klein(), shown, Run(tmp_path / "cut", "tiny", "x", resume=True), other)
    cut = finetune(klein(), shown, Run(tmp_path / "cut", "tiny", "x", resume=True), config)
    one, same = load_file(whole), load_file(cut)
    assert one.keys() == same.keys() and all(torch.equal(one[name], same[name]) for name in one)


def test_validation_has_the_overview_that_is_trained(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "sparse_context.training.validation.label", lambda picture, text: (seen.append(text), picture)[1]
    )
    host = klein()
    host.pipe.register_to_config(_name_or_path=str(tmp_path))
    (tmp_path / "call.json").write_text(json.dumps({"num_inference_steps": 1, **host.settings}))
    config = TrainConfig(dropping=WITH, validation_steps=1, **SMALL | {"max_train_steps": 1})
    finetune(host, batches, Run(tmp_path / "run", "tiny", "x"), config, watch=Watch(validation=[example()]))
    assert seen == ["all tokens", "keep 0.2, overview by 4", "truth"]


@pytest.mark.parametrize(("factors", "call"), [((2, 4), "keep=0.2, overview=4"), ((2,), "keep=0.3, overview=2")])
def test_the_card_asks_for_the_overview_that_plain_diffusers_notes_nothing_of(factors, call, tmp_path):
    record = asdict(TrainConfig(dropping=Dropping(overview_factors=factors)))
    record |= {"base": "owner/name", "data": "x", "steps": 1, "processes": 1, "version": "0"}
    pipe = CASES["klein"].build()
    card = model_card(record, pipe, pipe.transformer)
    assert f'apply_sparse_context(pipe, {call}, overview_layout="spread")' in card
    by = " or ".join(map(str, factors))
    assert (
        f"| overviews | by {by}, layout spread; of the batches that drop, 0.1 without and 0.25 with nothing else"
        in card
    )
    law = "as many below 0.15 as above" if 4 in factors else "log-uniform"  # by 2 alone, none lies below
    assert f"0.05 to 1 of each reference, {law} |" in card
    plain = model_card({**record, "dropping": asdict(Dropping())}, pipe, pipe.transformer)
    assert "apply_sparse_context(pipe, keep=0.2)\n" in plain and "overview" not in plain
