"""What overviews have to care for in single hosts: Kontext, LongCat, FLUX.3 and Qwen-Image-Edit."""

import copy
from functools import partial

import pytest
import torch
from diffusers import Flux3AutoBlocks
from diffusers.modular_pipelines.flux3.before_denoise import Flux3PrepareImageCondLatentsStep
from PIL import ImageOps
from test_context import at_first_step
from test_families import TOLERANCE, distance, seen_by_transformer
from test_family_overviews import FACTOR, KEEP, coarse_tokens, see_overviews
from tiny import CASES, EACH_FAMILY, TEXT_WIDTH, TOKEN, cases, embeds, picture, pooled, run

from sparse_context import last_selection
from sparse_context.families.qwen.drop import place_overviews
from sparse_context.overview import Overview

HOSTS = [name for name in CASES if name.startswith(("flux3", "kontext", "longcat", "qwen"))]


def encoded_pixels(pipe):
    """A list that fills with what the VAE encodes, (B, 3, H, W)."""
    seen, encode = [], pipe.vae.encode

    def watched(pixels, *args, **kwargs):
        seen.append(pixels.squeeze(2) if pixels.ndim == 5 else pixels)
        return encode(pixels, *args, **kwargs)

    pipe.vae.encode = watched
    return seen


@pytest.mark.parametrize("name", cases(*HOSTS))
def test_what_is_encoded_is_the_picture_that_the_vae_sees_scaled_down(name):
    case = CASES[name]
    pipe = case.build()
    seen = encoded_pixels(pipe)
    references = case.references()
    see_overviews(pipe)
    case.call(pipe, references)
    grids = [(TOKEN * rows, TOKEN * columns) for rows, columns in map(case.grid, references)]
    whole = [next(pixels for pixels in seen if pixels.shape[-2:] == grid) for grid in grids]
    for pixels in whole:
        lacks = [-side % (TOKEN * FACTOR) for side in pixels.shape[-2:]]
        full = torch.nn.functional.pad(pixels, (0, lacks[1], 0, lacks[0]), mode="reflect")
        small = full.unflatten(-1, (-1, FACTOR)).unflatten(-3, (-1, FACTOR)).mean((-1, -3))
        alike = [other for other in seen if other.shape == small.shape]
        assert any(torch.allclose(other, small, atol=1e-6) for other in alike)


# Copies, calls within calls, batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases(*EACH_FAMILY))
def test_a_copy_called_within_a_call_has_an_overview_of_its_own(name):
    case = CASES[name]
    references = case.references()
    expected = []
    for factor in (4, 2):
        pipe = case.build()
        see_overviews(pipe, overview=factor)
        expected.append(case.call(pipe, references))
    pipe, made = case.build(), []
    see_overviews(pipe, overview=4)
    twin = copy.copy(pipe)
    see_overviews(twin, overview=2)
    at_first_step(pipe, lambda: made.append(case.call(twin, references)))
    outer = case.call(pipe, references)
    assert torch.equal(outer, expected[0]) and torch.equal(made[0], expected[1])
    assert {each.factor for each in last_selection(pipe).overviews.values()} == {4}


@pytest.mark.parametrize("name", cases("kontext", "qwen-edit"))
def test_each_item_of_a_batch_has_the_overview_of_its_own_picture(name):
    case = CASES[name]
    pipe = case.build()
    pictures = [picture(*case.sizes[0]), ImageOps.invert(picture(*case.sizes[0]))]
    see_overviews(pipe, keep=coarse_tokens(case, pictures[:1])[0])
    both = case.call(pipe, [pictures], prompts=2)
    latents = torch.randn(both.shape, generator=torch.Generator().manual_seed(0))
    both = case.call(pipe, [pictures], prompts=2, latents=latents)
    assert distance(both, case.call(pipe, [pictures[::-1]], prompts=2, latents=latents)) > 1e-4


@pytest.mark.parametrize("name", cases("kontext", "flux3"))
def test_latents_have_no_overview(name):
    case = CASES[name]
    pipe = case.build()
    latents = {
        "kontext": {"image": torch.randn(1, 2, 16, 20)},
        "flux3": {"image_cond_latents": [torch.randn(1, 8, 8, 10)]},
    }
    see_overviews(pipe, selector="uniform")
    with pytest.raises(ValueError, match="Reference 1 was passed as latents, and an overview is made from pixels"):
        case.call(pipe, [], **latents[name])


@pytest.mark.parametrize("name", cases("qwen-edit", "qwen-edit-inpaint", "qwen-edit-2511", "longcat"))
def test_the_text_encoder_sees_no_overview(name, monkeypatch):
    case = CASES[name]
    seen = []

    def remember_image(encode_prompt, *args, image, **kwargs):
        seen.append(image)
        own = {"image": image} if name == "longcat" else {}
        return encode_prompt(*args, **own, **kwargs)

    for keep in (1.0, KEEP):
        pipe = case.build()
        monkeypatch.setattr(pipe, "encode_prompt", partial(remember_image, pipe.encode_prompt))
        see_overviews(pipe, keep=keep)
        case.call(pipe, case.references())
    assert len(seen) == 2 and seen[0] == seen[1]


# Kontext, LongCat -----------------------------------------------------------------------------------------------------


def test_bfloat16_rounds_no_place_of_an_overview():
    """At 136 rows of tokens there are places such as 129.5, for which bfloat16 has no digit left."""
    case = CASES["kontext"]
    pipe = case.build()
    for model in (pipe.vae, pipe.transformer):
        model.bfloat16()
    text = {"prompt_embeds": embeds(width=TEXT_WIDTH).bfloat16(), "pooled_prompt_embeds": pooled().bfloat16()}
    seen, places = seen_by_transformer(case, pipe), []
    pipe.transformer.pos_embed.register_forward_pre_hook(lambda module, args: places.append(args[0]))
    see_overviews(pipe, overview_layout="spread")
    reference = picture(64, 136 * TOKEN)
    run(pipe, image=reference, height=64, width=64, max_area=64 * 64, _auto_resize=False, **text)
    kept = last_selection(pipe).references[0]
    coarse = seen[0][1][0, -kept.overview.tokens :]
    expected = case.overview_ids([torch.tensor([[1.0, 0, 0]])], [(136, 8)], FACTOR, "spread")
    assert coarse.dtype == torch.float32 and torch.equal(coarse, expected)
    assert not torch.equal(coarse.bfloat16().float(), expected)
    assert torch.equal(places[0][-len(coarse) :], expected)


@pytest.mark.parametrize("layout", ["spread", "reference"])
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (64, 64)])
def test_as_a_further_reference_an_overview_lies_beside_the_only_one(size, layout):
    """To the right of a tall one, below another, where no token of the reference is."""
    case = CASES["kontext"]
    pipe = case.build()
    seen = seen_by_transformer(case, pipe)
    reference = picture(*size)
    see_overviews(pipe, overview_layout=layout)
    case.call(pipe, [reference])
    grid = case.grid(reference)
    expected = case.overview_ids([torch.tensor([[1.0, 0, 0]])], [grid], FACTOR, layout)
    assert torch.equal(seen[0][1][0, -len(expected) :], expected)
    inside = (expected[:, 1] < grid[0]) & (expected[:, 2] < grid[1])
    assert layout == "spread" or not inside.any()


# FLUX.3 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["spread", "reference"])
def test_places_are_scaled_as_the_steps_of_the_pipeline_scale_them(layout):
    case = CASES["flux3"]
    blocks = copy.deepcopy(Flux3AutoBlocks())  # whose inner blocks are of the class, so all pipelines share them

    def scale(block):
        for name, inner in block.sub_blocks.items():
            if isinstance(inner, Flux3PrepareImageCondLatentsStep):
                block.sub_blocks[name] = Flux3PrepareImageCondLatentsStep(image_rope_scale=0.25)
            scale(inner)

    scale(blocks)
    pipe = case.build()
    for name in ("prompt_upsampler", "text_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    pipe._blocks = blocks
    seen, references = seen_by_transformer(case, pipe), case.references()
    see_overviews(pipe, overview_layout=layout)
    case.call(pipe, references)
    expected = case.overview_ids([], [*map(case.grid, references)], FACTOR, layout)
    expected[:, 1:3] /= 2
    assert torch.equal(seen[0][1][0, -len(expected) :], expected)


def test_beside_an_overview_padding_is_kept_last():
    """FLUX.3 pads this picture by 12 pixels a side: one whole token, and half of the next."""
    pipe = CASES["flux3"].build()
    see_overviews(pipe, keep=50, selector="uniform", coverage=0)
    CASES["flux3"].call(pipe, [picture(40, 72)])
    (kept,) = last_selection(pipe).references
    assert kept.grid == (9, 8) and kept.overview.tokens == 6 and len(kept.index) == 44
    assert not kept.mask[:, [0, -1]].any()


# Qwen -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["spread", "reference"])
@pytest.mark.parametrize("name", cases("qwen-edit", "qwen-edit-2511"))
def test_the_text_keeps_its_rotary_rows(name, layout):
    case = CASES[name]
    seen = []
    for keep in (1.0, 0.5):
        pipe = case.build()
        pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["image_rotary_emb"][1]), with_kwargs=True
        )
        see_overviews(pipe, keep=keep, overview=2, overview_layout=layout)
        case.call(pipe, case.references())
    assert torch.equal(seen[0], seen[-1])


def test_an_overview_is_modulated_as_its_reference_is():
    """In Edit-Plus 2511, whose references are at t = 0: index 1, and the output's tokens at index 0."""
    case = CASES["qwen-edit-2511"]
    pipe, seen = case.build(), []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["modulate_index"]), with_kwargs=True
    )
    see_overviews(pipe)
    case.call(pipe, case.references())
    kept = last_selection(pipe).kept
    assert seen[0].shape == (1, 64 + kept) and seen[0].sum() == seen[0][:, -kept:].sum() == kept


@pytest.mark.parametrize("count", [1, 3, 6])
def test_no_two_tokens_of_qwen_share_a_rotary_row(count):
    """References of one size at frames 0 to count - 1 here, and every second one has an overview."""
    grid, factors = (7, 9), [2, 3, 4, 8]
    overviews = {
        i: Overview(factors[i % 4], "spread", (-(-7 // factors[i % 4]), -(-9 // factors[i % 4])))
        for i in range(0, count, 2)
    }
    rows, shapes = place_overviews([grid] * count, overviews)
    frames = torch.cat([torch.full((r * c,), i) for i, (_, r, c) in enumerate([(1, *grid)] * count + shapes)])
    assert len(rows.unique()) == len(rows) == sum(each.tokens for each in overviews.values())
    start = 0
    for i, each in overviews.items():
        own = frames[rows[start : start + each.tokens]].unique().tolist()
        assert own == [i + max(4, count) * {2: 1, 3: 2, 4: 2, 8: 3}[each.factor]]
        start += each.tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("qwen-edit-inpaint", "qwen-edit-2511"))
def test_qwen_with_overviews_is_one_graph(name):
    case = CASES[name]
    for layout in case.layouts:
        plain, pipe, graphs = case.build(), case.build(), []

        def count(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=count)
        for each in (plain, pipe):
            see_overviews(each, overview_layout=layout)
        made = case.call(pipe, case.references())
        assert len(graphs) == 1 and distance(made, case.call(plain, case.references())) < TOLERANCE
