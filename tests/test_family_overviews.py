"""What must hold with overviews, for every family that takes them (the letters are DESIGN.md's).

A family joins by its `overview_ids` in tiny.py.
"""

from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinAutoBlocks
from diffusers.modular_pipelines.flux2.encoders import Flux2VaeEncoderStep
from test_families import TOLERANCE, distance, embedded_tokens, masked, seen_by_transformer, state_of
from tiny import CASES, QUICK, STEPS, WITH_OVERVIEWS, build_flux2_modular, cases, dense_answer, picture

from sparse_context import apply_sparse_context, last_selection, remove_sparse_context
from sparse_context.preview import draw_selection
from sparse_context.tokens import ReferenceTokens

KEEP, FACTOR = 0.3, 4


@pytest.fixture(params=cases(*WITH_OVERVIEWS), scope="module")
def case(request):
    return CASES[request.param]


@pytest.fixture
def pipe(case):
    return case.build()


with_layouts = pytest.mark.parametrize(
    ("case", "layout"),
    [pytest.param(*p.values, layout, marks=p.marks) for p in cases(*WITH_OVERVIEWS) for layout in CASES[p.id].layouts],
    indirect=["case"],
)


def see_overviews(pipe, **changes):
    apply_sparse_context(pipe, **{"keep": KEEP, "overview": FACTOR, "selector": QUICK, **changes})


def coarse_tokens(case, references, factor=FACTOR):
    """How many tokens the overview of each reference has."""
    return [-(-rows // factor) * -(-columns // factor) for rows, columns in map(case.grid, references)]


def shuffled(tokens):
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    return ReferenceTokens(tokens.latents[:, order], tokens.ids[..., order, :])


def test_a_keeping_all_adds_no_overview(case, pipe):
    see_overviews(pipe, keep=1.0)
    assert torch.equal(case.call(pipe, case.references()), dense_answer(case))
    assert last_selection(pipe).overviews == {}


def test_b_removing_restores_exactly(case, pipe):
    before = state_of(pipe)
    see_overviews(pipe)
    assert state_of(pipe) != before
    remove_sparse_context(pipe)
    assert state_of(pipe) == before
    see_overviews(pipe)
    assert distance(case.call(pipe, case.references()), dense_answer(case)) > 1e-4
    remove_sparse_context(pipe)
    assert torch.equal(case.call(pipe, case.references()), dense_answer(case))


def test_c_applying_again_replaces(case, pipe):
    see_overviews(pipe)
    with_overview = case.call(pipe, case.references())
    see_overviews(pipe, overview=None)
    without = case.call(pipe, case.references())
    fresh = case.build()
    see_overviews(fresh, overview=None)
    assert torch.equal(without, case.call(fresh, case.references()))
    assert distance(with_overview, without) > 1e-4


def test_d_the_order_of_tokens_does_not_matter(case, pipe, monkeypatch):
    see_overviews(pipe)
    ordered = case.call(pipe, case.references())
    join = ReferenceTokens.join
    monkeypatch.setattr(ReferenceTokens, "join", lambda self, others: shuffled(join(self, others)))
    assert 0 < distance(case.call(pipe, case.references()), ordered) < TOLERANCE


def masked_with_overviews(case, monkeypatch, layout):
    """The oracle of test_families: here all sharp tokens and the overviews, whose dropped keys nobody may look at."""
    pipe = case.build()
    see_overviews(pipe, overview_layout=layout)
    case.call(pipe, case.references())
    selection = last_selection(pipe)
    dropped = np.setdiff1d(np.arange(selection.total), selection.index)
    references = selection.total + sum(coarse_tokens(case, case.references()))
    with monkeypatch.context() as changed:
        changed.setattr(ReferenceTokens, "keep", lambda self, *index: self)
        return masked(case, pipe, dropped, references)


@with_layouts
def test_e_dropping_is_masking_in_every_block(case, pipe, layout, monkeypatch):
    see_overviews(pipe, overview_layout=layout)
    sparse = case.call(pipe, case.references())
    assert distance(sparse, masked_with_overviews(case, monkeypatch, layout)) < TOLERANCE


@with_layouts
def test_e_the_oracle_sees_wrong_position_ids_of_overviews(case, pipe, layout, monkeypatch):
    right = masked_with_overviews(case, monkeypatch, layout)
    join = ReferenceTokens.join

    def join_wrong_ids(self, overviews):
        return join(self, ReferenceTokens(overviews.latents, overviews.ids.roll(1, dims=-2)))

    monkeypatch.setattr(ReferenceTokens, "join", join_wrong_ids)
    see_overviews(pipe, overview_layout=layout)
    assert distance(case.call(pipe, case.references()), right) > 5 * TOLERANCE


@pytest.mark.parametrize("factor", [2, 4])
@with_layouts
def test_f_the_transformer_saw_the_tokens_promised(case, pipe, layout, factor):
    references = case.references()
    grids, sizes = [*map(case.grid, references)], case.tokens(references)
    coarse = coarse_tokens(case, references, factor)
    whole, cut = case.build(), pipe
    seen_whole, seen_cut = seen_by_transformer(case, whole), seen_by_transformer(case, cut)
    case.call(whole, references)
    see_overviews(cut, overview=factor, overview_layout=layout, keep=0.4)
    case.call(cut, references)
    selection = last_selection(cut)
    promised = [int(0.4 * size + 0.5) for size in sizes]
    assert [kept.count for kept in selection.references] == promised
    assert [len(kept.index) for kept in selection.references] == [n - c for n, c in zip(promised, coarse, strict=True)]
    assert [each.tokens for each in selection.overviews.values()] == coarse
    (whole_tokens, whole_ids), (cut_tokens, cut_ids) = seen_whole[0], seen_cut[0]
    assert whole_tokens - cut_tokens == sum(sizes) - sum(promised)
    # Sharp tokens of all references at their places, then the overviews, and all else as it is without
    start = 0 if case.references_first else whole_tokens - sum(sizes)
    ids = whole_ids[0]
    dense_ids = ids[start : start + sum(sizes)]
    expected = [
        ids[:start],
        dense_ids[torch.from_numpy(selection.index)],
        case.overview_ids([*dense_ids.split(sizes)], grids, factor, layout),
        ids[start + sum(sizes) :],
    ]
    assert torch.equal(cut_ids[0], torch.cat(expected).to(cut_ids.dtype))


def test_f_every_forward_has_as_many_tokens_as_without_an_overview(case, pipe):
    counts = []
    for overview in (None, FACTOR):
        seen = seen_by_transformer(case, pipe)
        see_overviews(pipe, overview=overview)
        case.call(pipe, case.references())
        counts.append([tokens for tokens, _ in seen[-STEPS:]])
    assert counts[0] == counts[1] and len(counts[1]) == STEPS


def test_g_two_pipelines_with_one_transformer_do_not_affect_each_other(case, pipe):
    shared = case.share(pipe)
    shared.set_progress_bar_config(disable=True)
    see_overviews(pipe)
    sparse = case.call(pipe, case.references())
    assert torch.equal(case.call(shared, case.references()), dense_answer(case))
    see_overviews(shared, overview=2)
    case.call(shared, case.references())
    assert torch.equal(case.call(pipe, case.references()), sparse)


@pytest.mark.parametrize("case", cases(*(name for name in WITH_OVERVIEWS if CASES[name].guidance)), indirect=True)
def test_h_guidance(case, pipe):
    seen = seen_by_transformer(case, pipe)
    see_overviews(pipe)
    case.call(pipe, case.references(), **case.guidance)
    assert len(seen) == 2 * STEPS and len({tokens for tokens, _ in seen}) == 1


def test_h_several_images_and_prompts(case, pipe):
    references = case.references(2)
    see_overviews(pipe)
    seen = seen_by_transformer(case, pipe)
    out = case.call(pipe, references, prompts=case.prompts, num_images_per_prompt=2)
    assert out.shape[0] == 2 * case.prompts
    assert seen[0][1].shape[0] in (1, 2 * case.prompts)
    assert all(torch.equal(ids, seen[0][1][0]) for ids in seen[0][1])


def test_h_cpu_offload(case, pipe):
    see_overviews(pipe)
    plain = case.call(pipe, case.references())
    case.offload(pipe)
    assert torch.equal(case.call(pipe, case.references()), plain)


@pytest.mark.slow
def test_h_compiled_blocks(case, pipe):
    see_overviews(pipe, overview_layout=case.layouts[0])
    plain = case.call(pipe, case.references())
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=not case.references_first, backend="eager")
    assert distance(case.call(pipe, case.references()), plain) < TOLERANCE


@pytest.mark.parametrize(
    "case", cases(*(name for name in WITH_OVERVIEWS if CASES[name].without_references)), indirect=True
)
def test_i_a_call_without_references_is_untouched(case, pipe):
    plain = case.call(case.build(), [])
    see_overviews(pipe)
    assert torch.equal(case.call(pipe, []), plain)
    assert last_selection(pipe) is None


def test_j_no_generator_is_drawn_from(case, pipe):
    states = []
    for overview in (None, FACTOR):
        see_overviews(pipe, overview=overview)
        torch.manual_seed(5)
        np.random.seed(5)
        generator = torch.Generator().manual_seed(3)
        case.call(pipe, case.references(), generator=generator)
        states.append((generator.get_state(), torch.get_rng_state(), np.random.get_state()[1]))
    assert all(np.array_equal(a, b) for a, b in zip(*states, strict=True))


def test_an_overview_alone_is_a_budget(case, pipe):
    """Of one reference of 8 rows; sharp tokens would have to come from the others."""
    (reference, *_) = references = case.references(1)
    rows, columns = case.grid(reference)
    coarse = coarse_tokens(case, references)[0]
    see_overviews(pipe, keep=coarse)
    case.call(pipe, references)
    (kept,) = last_selection(pipe).references
    assert len(kept.index) == 0 and kept.count == coarse and kept.grid == (rows, columns)


@pytest.mark.parametrize("case", cases(*(n for n in WITH_OVERVIEWS if max(CASES[n].counts) > 1)), indirect=True)
def test_some_references_may_have_one(case, pipe):
    references = case.references(2)
    see_overviews(pipe, overview=[None, FACTOR])
    case.call(pipe, references)
    selection = last_selection(pipe)
    assert list(selection.overviews) == [1]
    assert selection.kept == sum(int(KEEP * size + 0.5) for size in case.tokens(references))


def test_what_was_kept_can_be_drawn(case, pipe):
    see_overviews(pipe)
    case.call(pipe, case.references())
    assert draw_selection(last_selection(pipe), height=64).height > 64


def test_a_changed_picture_changes_its_overview(case, pipe):
    """Its overview alone reaches the output."""
    reference = case.references(1)[0]
    see_overviews(pipe, keep=coarse_tokens(case, [reference])[0])
    answer = case.call(pipe, [reference])
    assert distance(case.call(pipe, [picture(*reference.size, seed=9)]), answer) > 1e-4


# FLUX.2 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases("flux2-dev", "klein", "klein-kv", "klein-inpaint", "klein-modular"))
def test_the_tokens_are_those_of_the_pictures_that_the_vae_sees_scaled_down(name):
    """The pipeline gets the means of its own pixels; a picture of 120 rows lacks 8 of them to whole cells."""
    case = CASES[name]
    pipe, plain = case.build(), CASES["klein"].build()
    seen = embedded_tokens(pipe)
    references = case.references()
    see_overviews(pipe)
    case.call(pipe, references)
    expected = []
    for reference in references:
        width, height = reference.size
        pixels = plain.image_processor.preprocess(reference, height, width)
        lacks = [-side % (8 * FACTOR) for side in (width, height)]
        pixels = torch.nn.functional.pad(pixels, (0, lacks[0], 0, lacks[1]), mode="reflect")
        small = pixels.unflatten(-1, (-1, FACTOR)).unflatten(-3, (-1, FACTOR)).mean((-1, -3))
        expected.append(plain._pack_latents(plain._encode_vae_image(small, None)))
    expected = torch.cat(expected, dim=1)
    length, kept = expected.shape[1], last_selection(pipe).kept
    last = seen[0][:, kept - length : kept] if case.references_first else seen[0][:, -length:]
    assert torch.allclose(last, expected, atol=1e-5)


@pytest.mark.parametrize("name", cases("flux2-dev", "klein", "klein-modular"))
def test_ids_stay_whole_numbers_where_nothing_is_between(name):
    case = CASES[name]
    for layout, dtype in (("spread", torch.float32), ("reference", torch.int64)):
        pipe = case.build()
        seen = seen_by_transformer(case, pipe)
        see_overviews(pipe, overview_layout=layout)
        case.call(pipe, case.references())
        assert {ids.dtype for _, ids in seen} == {dtype}


def test_each_item_of_a_batch_has_the_overview_of_its_own_picture():
    """Two further references of an inpainting call of two prompts are one reference, another for each output."""
    case = CASES["klein-inpaint"]
    pipe = case.build()
    seen = embedded_tokens(pipe)
    pictures = [picture(96, 72, seed=1), picture(96, 72, seed=2)]
    see_overviews(pipe)
    case.call(pipe, [picture(64, 64), *pictures], prompts=2)
    selection = last_selection(pipe)
    assert len(selection.references) == 2
    both = seen[0][:, -9:]
    see_overviews(pipe)
    for item in (0, 1):
        seen.clear()
        case.call(pipe, [picture(64, 64), pictures[item]])
        assert torch.allclose(seen[0][0, -9:], both[item], atol=1e-5)


def test_pictures_that_are_no_batch_are_references_of_their_own():
    """Three further references of an inpainting call of two prompts are three for both."""
    case = CASES["klein-inpaint"]
    pipe = case.build()
    see_overviews(pipe)
    case.call(pipe, [picture(64, 64), *(picture(96, 72, seed=i) for i in range(3))], prompts=2)
    assert list(last_selection(pipe).overviews) == [0, 1, 2, 3]


def test_latents_have_no_overview():
    case = CASES["klein-inpaint"]
    pipe = case.build()
    latents = torch.randn(1, 8, 9, 12)
    see_overviews(pipe, selector="uniform")
    with pytest.raises(ValueError, match="Reference 2 was passed as latents, and an overview is made from pixels"):
        case.call(pipe, [picture(64, 64), latents])
    see_overviews(pipe, selector="uniform", overview=[4, None])
    case.call(pipe, [picture(64, 64), latents])
    assert list(last_selection(pipe).overviews) == [0]


def test_a_modular_pipeline_encodes_overviews_by_its_own_step():
    class Brighter(Flux2VaeEncoderStep):
        def _encode_vae_image(self, vae, image, generator):
            seen.append(tuple(image.shape))
            return super()._encode_vae_image(vae, image, generator) + 1

    seen = []
    blocks = deepcopy(Flux2KleinAutoBlocks())
    blocks.sub_blocks["vae_encoder"].sub_blocks["img_conditioning"].sub_blocks["encode"] = Brighter()
    pipe = build_flux2_modular(blocks)
    see_overviews(pipe)
    CASES["klein-modular"].call(pipe, [picture(64, 64)])
    assert seen == [(1, 3, 64, 64), (1, 3, 16, 16)]
