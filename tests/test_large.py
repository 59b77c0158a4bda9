"""References in a larger size than their hosts make of them, at the same budget: sharp tokens of the larger picture."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    Flux2KleinAutoBlocks,
    Flux2KleinKVPipeline,
    Flux2KleinModularPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
)
from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from test_budget import references, shares
from test_families import TOLERANCE, distance, embedded_tokens, masked, seen_by_transformer
from tiny import CASES, TOKEN, build_flux2, build_flux2_modular, call_flux2_modular, cases, embeds, picture, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparse_context import (
    SparseContextConfig,
    apply_sparse_context,
    context,
    large,
    last_selection,
    mask,
    select_tokens,
)
from sparse_context.budget import choose_tokens
from sparse_context.families.pictures import to_uint8
from sparse_context.large import large_grid, large_ids, large_tokens, tiles
from sparse_context.pipelines import Engine, Request
from sparse_context.pipelines.arguments import call_of
from sparse_context.preview import draw_selection

MEGAPIXEL = 1024 * 1024
WIDE = 64  # pixels of a token of the pipelines below, so that a megapixel has 16 x 16


def wide_vae():
    torch.manual_seed(1)
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 6,
        up_block_types=("UpDecoderBlock2D",) * 6,
        block_out_channels=(2,) * 6,
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )


def build(cls):
    """A FLUX.2 pipeline that looks at pictures of megapixels in few tokens."""
    if cls is Flux2KleinModularPipeline:
        pipe = build_flux2_modular(Flux2KleinAutoBlocks())
        processor = Flux2ImageProcessor(vae_scale_factor=WIDE, vae_latent_channels=2)
        pipe.update_components(vae=wide_vae(), image_processor=processor)
        return pipe
    pipe = build_flux2(cls)
    pipe.vae = wide_vae()
    return cls(**pipe.components)


FLUX2 = {
    "flux2-dev": Flux2Pipeline,
    "klein": Flux2KleinPipeline,
    "klein-kv": Flux2KleinKVPipeline,
    "klein-modular": Flux2KleinModularPipeline,
}


class Host:
    """A tiny pipeline, and how much larger than it makes them its references are."""

    def __init__(self, name):
        self.case = CASES[name]
        self.is_flux2 = name in FLUX2
        self.pipe = build(FLUX2[name]) if self.is_flux2 else self.case.build()
        self.pipe.set_progress_bar_config(disable=True)
        self.usual = MEGAPIXEL if self.is_flux2 else 128 * 128
        self.token = WIDE if self.is_flux2 else TOKEN
        self.side = math.isqrt(self.usual)

    def picture(self, scale=2.0, aspect=1.0, seed=0):
        """With `scale` times as many pixels a side as the host makes of it."""
        return picture(round(scale * self.side * aspect), round(scale * self.side / aspect), seed)

    def apply(self, **changes):
        settings = {"keep": 0.3, "overview": 4, "selector": "detail", "coverage": 0, "overview_layout": "spread"}
        settings |= {"reference_max_pixels": 4 * self.usual} | changes
        apply_sparse_context(self.pipe, **settings)

    def call(self, references):
        if isinstance(self.pipe, Flux2KleinModularPipeline):
            return call_flux2_modular(self.pipe, references)
        if self.is_flux2:
            # classifier-free guidance would only take a second forward
            guidance = {} if isinstance(self.pipe, Flux2KleinKVPipeline) else {"guidance_scale": 1.0}
            return run(self.pipe, prompt_embeds=embeds(), image=references, height=128, width=128, **guidance)
        return self.case.call(self.pipe, references)

    def encoded(self):
        """A list that fills with what the VAE encodes."""
        seen, encode = [], self.pipe.vae.encode
        self.pipe.vae.encode = lambda x, *args, **kwargs: seen.append(x) or encode(x, *args, **kwargs)
        return seen

    def encode(self, pixels):
        """The tokens (N, C) of a picture that is encoded whole."""
        latents = self.pipe._encode_vae_image(image=pixels, generator=None)
        if self.is_flux2:
            return self.pipe._pack_latents(latents)[0]
        return self.pipe._pack_latents(latents, 1, latents.shape[1], *latents.shape[2:])[0]


@pytest.fixture(params=cases("klein", "kontext", "longcat"))
def host(request):
    return Host(request.param)


def by_hand(host, reference, grid):
    """The larger picture of a whole reference without its edges, as the VAE would get it."""
    size = grid[1] * host.token, grid[0] * host.token
    pixels = np.asarray(reference.resize(size, Image.Resampling.LANCZOS), np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def sharp_part(host, tokens, kept):
    """Of the tokens of one forward (..., N, C) those that are sharp: (..., n, C)."""
    coarse = kept.overview.tokens
    if host.case.references_first:
        return tokens[..., : kept.count - coarse, :]
    return tokens[..., -kept.count : -coarse, :]


def whole_ids(host, references):
    """Position ids (N, A) of all tokens of whole references, as a dense call has them."""
    host.apply(keep=1.0)
    seen = seen_by_transformer(host.case, host.pipe)
    host.call(references)
    total = last_selection(host.pipe).total
    ids = seen[0][1][0]
    return (ids[:total] if host.case.references_first else ids[-total:]).float()


# The oracle -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases(*FLUX2, "kontext", "longcat"))
def test_sharp_tokens_lie_where_they_are_in_the_usual_size(name):
    """Twice as many a side: at -0.25, 0.25, 0.75 ... of the usual rows and columns, and nothing else is changed."""
    host = Host(name)
    references = [host.picture()]
    origin = whole_ids(host, references)[0]
    seen = seen_by_transformer(host.case, host.pipe)
    host.apply()
    host.call(references)
    (kept,) = last_selection(host.pipe).references
    assert kept.usual == (16, 16) and kept.grid == (32, 32)
    assert kept.count == round(0.3 * 256) and kept.overview.grid == (4, 4) and len(kept.index) == kept.count - 16
    places = torch.from_numpy(np.stack(np.divmod(kept.index, 32), axis=1)) / 2 - 0.25
    expected = origin.repeat(len(places), 1)
    expected[:, 1:3] += places
    assert torch.equal(sharp_part(host, seen[0][1][0], kept).float(), expected)


@pytest.mark.parametrize("size", [(2100, 1500), (1500, 1501)])
def test_a_modular_pipeline_encodes_and_keeps_what_the_plain_one_does(size):
    plain, modular = Host("klein"), Host("klein-modular")
    reference = picture(*size)
    reference.putalpha(picture(*size, 1).convert("L"))
    found = []
    for host in (plain, modular):
        seen = host.encoded()
        host.apply(selector="mask")
        host.call([reference])
        found.append((seen, *last_selection(host.pipe).references))
    (seen, kept), (encoded, same) = found
    assert kept.usual is not None and (kept.usual, kept.grid) == (same.usual, same.grid)
    assert np.array_equal(kept.picture, same.picture) and kept.picture.shape[-1] == 4
    assert np.array_equal(kept.index, same.index)
    assert len(seen) == len(encoded) > 2 and all(map(torch.equal, seen, encoded))


def test_several_references_of_flux3_are_taken_larger_and_a_lone_one_has_its_own_size():
    case = CASES["flux3"]
    pipe = case.build()
    processor = Flux3ImageProcessor(vae_scale_factor=WIDE, vae_latent_channels=2)
    pipe.update_components(vae=wide_vae(), image_processor=processor)
    references = [picture(2100, 2048), picture(1024, 1024, 1)]
    settings = {"keep": 0.3, "overview": 4, "selector": "detail", "coverage": 0, "overview_layout": "spread"}
    seen = seen_by_transformer(case, pipe)
    apply_sparse_context(pipe, **settings, reference_max_pixels=4 * MEGAPIXEL)
    case.call(pipe, references)
    first, second = last_selection(pipe).references
    assert first.usual == (15, 16) and first.grid == (30, 32) and second.usual is None
    assert (first.count, second.count) == (round(0.3 * 240), round(0.3 * 256))
    ids = seen[0][1][0][-first.count - second.count :][len(second.index) :][: len(first.index)]
    places = torch.from_numpy(np.stack(np.divmod(first.index, 32), axis=1)) / 2 - 0.25  # of the usual rows and columns
    assert torch.equal(ids[:, 1:3], places.float() / 2) and set(ids[:, 3].tolist()) == {-1}
    shown = pipe.image_processor.preprocess(references[0], resize_mode="crop")[0]
    smaller = cv2.resize(first.picture, (16 * WIDE, 15 * WIDE), interpolation=cv2.INTER_AREA).astype(float)
    assert np.abs(smaller - to_uint8(shown)[0])[4:-4, 4:-4].mean() < 3
    case.call(pipe, references[:1])
    assert "reference 1 has its usual size" in str(last_selection(pipe))


def without_norms(module):
    """Group norms look at all of a picture; convolutions no further than they reach, here under six tokens."""
    for name, inner in module.named_children():
        if isinstance(inner, torch.nn.GroupNorm):
            setattr(module, name, torch.nn.Identity())
        without_norms(inner)


@pytest.mark.parametrize("border", [6, 0])
def test_sharp_tokens_are_those_of_the_larger_picture(host, border, monkeypatch):
    """Those of the picture encoded whole, where the border of a tile is as wide as its VAE looks."""
    without_norms(host.pipe.vae.encoder)
    monkeypatch.setattr(large, "tiles", lambda *args: tiles(*args, side=8, border=border))
    reference, tokens = host.picture(), embedded_tokens(host.pipe)
    host.apply()
    host.call([reference])
    (kept,) = last_selection(host.pipe).references
    with torch.no_grad():
        whole = host.encode(by_hand(host, reference, kept.grid))
    difference = distance(sharp_part(host, tokens[0][0], kept), whole[kept.index])
    assert difference < 1e-4 if border else difference > 1e-2


def masked_with_all(host, references, monkeypatch):
    """The oracle of test_families: here all tokens of the larger picture, whose dropped keys nobody may look at."""
    selection = last_selection(host.pipe)
    (kept,) = selection.references
    dropped = np.setdiff1d(np.arange(kept.scores.size), kept.index)
    case = SimpleNamespace(
        attention=host.case.attention,
        first_key=host.case.first_key,
        call=lambda pipe, _: host.call(references),
        references=lambda: references,
    )

    def all_tokens(large, index, ids, grid):
        return large_tokens(large, np.arange(kept.scores.size), ids, grid)

    with monkeypatch.context() as changed:
        changed.setattr(context, "large_tokens", all_tokens)
        return masked(case, host.pipe, dropped, kept.scores.size + kept.overview.tokens)


@pytest.mark.parametrize("layout", ["spread", "reference"])
@pytest.mark.parametrize("name", cases("klein-kv", "kontext"))
def test_dropping_is_masking_in_every_block(name, layout, monkeypatch):
    host = Host(name)
    without_norms(host.pipe.vae.encoder)
    monkeypatch.setattr(large, "tiles", lambda *args: tiles(*args, border=32))  # the same of all tokens as of some
    references = [host.picture()]
    host.apply(overview_layout=layout)
    sparse = host.call(references)
    right = masked_with_all(host, references, monkeypatch)
    assert distance(sparse, right) < TOLERANCE
    monkeypatch.setattr(large, "large_ids", lambda *args: large_ids(*args).roll(1, dims=-2))
    assert distance(host.call(references), right) > 5 * TOLERANCE


# What it costs --------------------------------------------------------------------------------------------------------


def count_flops(pipe):
    """A list that fills with the FLOPs of each forward of the transformer."""
    counted, forward = [], pipe.transformer.forward

    def counting(*args, **kwargs):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            made = forward(*args, **kwargs)
        counted.append(counter.get_total_flops())
        return made

    pipe.transformer.forward = counting
    return counted


@pytest.mark.parametrize("name", cases("klein", "klein-kv"))
def test_four_references_of_four_megapixels_cost_the_model_what_four_of_one_do(name):
    host = Host(name)
    flops, kept = [], []
    for scale in (1.0, 2.0):
        counted = count_flops(host.pipe)
        host.apply()
        host.call([host.picture(scale, seed=i) for i in range(4)])  # 2 gives four megapixels
        selection = last_selection(host.pipe)
        flops.append(counted[:2])
        kept.append((selection.kept, selection.total, [each.usual is not None for each in selection.references]))
        del host.pipe.transformer.forward
    assert flops[0] == flops[1] and len(flops[0]) == 2
    assert kept == [(4 * 77, 4 * 256, [False] * 4), (4 * 77, 4 * 256, [True] * 4)]


def detailed_corner(host):
    """Grey, with detail in four tokens of the larger picture, two rows and two columns at the top left."""
    pixels = np.full((2 * host.side, 2 * host.side, 3), 127, np.uint8)
    rng = np.random.default_rng(0)
    pixels[: 2 * host.token, : 2 * host.token] = rng.integers(0, 256, (2 * host.token, 2 * host.token, 3))
    return Image.fromarray(pixels)


def test_only_what_lies_around_the_kept_tokens_is_encoded(host):
    """The picture in its usual size, its overview, and of the larger one four tokens with the border on two sides."""
    seen = host.encoded()
    host.apply(keep=20)
    host.call([detailed_corner(host)])
    (kept,) = last_selection(host.pipe).references
    assert kept.index.tolist() == [0, 1, 32, 33] and kept.overview.tokens == 16
    assert [pixels.shape[-1] // host.token for pixels in seen] == [16, 2 + large.BORDER, 4]
    assert all(pixels.shape[-1] == pixels.shape[-2] for pixels in seen)


def test_no_part_that_is_encoded_is_larger_than_a_tile_with_its_border(host, monkeypatch):
    """So the VAE's memory does not grow with the picture."""
    monkeypatch.setattr(large, "tiles", lambda *args: tiles(*args, side=8, border=1))
    seen = host.encoded()
    host.apply(selector="uniform")
    host.call([host.picture()])
    parts = [pixels for pixels in seen[1:] if pixels.shape[-1] > 4 * host.token]
    assert len(parts) == 16 and max(max(pixels.shape[-2:]) // host.token for pixels in parts) <= 10


# Which size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "limit", "grid"), [(2.5, 4, (32, 32)), (1.5, 9, (24, 24)), (2.5, 2, (22, 22))])
@pytest.mark.parametrize("name", cases("klein", "kontext"))
def test_the_size_is_that_of_the_picture_up_to_the_limit(name, scale, limit, grid):
    host = Host(name)
    host.apply(reference_max_pixels=limit * host.usual)
    host.call([host.picture(scale)])
    (kept,) = last_selection(host.pipe).references
    assert kept.grid == grid and kept.usual == (16, 16)
    assert kept.picture.shape == (grid[0] * host.token, grid[1] * host.token, 3)


@pytest.mark.parametrize("name", cases("klein", "kontext"))
def test_a_reference_that_is_no_larger_is_as_it_is_without(name):
    host = Host(name)
    references = [host.picture(1.0)]
    host.apply(reference_max_pixels=None)
    without = host.call(references)
    host.apply()
    assert torch.equal(host.call(references), without)
    assert "reference 1 has its usual size, because it is no larger PIL picture" in str(last_selection(host.pipe))


@pytest.mark.parametrize("name", cases("klein", "kontext"))
def test_keeping_all_is_the_untouched_pipeline(name):
    host = Host(name)
    references = [host.picture()]
    untouched = host.call(references)
    host.apply(keep=1.0)
    assert torch.equal(host.call(references), untouched)
    assert "reference 1 has its usual size, because it has no overview" in str(last_selection(host.pipe))


@pytest.mark.parametrize("size", [(2100, 1500), (1300, 1900), (1500, 1501)])
@pytest.mark.parametrize("name", cases("klein", "kontext"))
def test_both_sizes_show_the_same_part(name, size):
    """FLUX.2 cuts what is no whole token: a picture of waves would tell a shift by pixels."""
    host = Host(name)
    width, height = (side * host.side // 1024 for side in size)
    y, x = np.mgrid[:height, :width]
    waves = 127 + 60 * np.sin(x * 36 / host.side) + 60 * np.sin(y * 36 / host.side)
    reference = Image.fromarray(np.repeat(waves[..., None], 3, axis=2).round().astype(np.uint8))
    seen = host.encoded()
    host.apply()
    host.call([reference])
    (kept,) = last_selection(host.pipe).references
    usual = to_uint8(seen[0])[0].astype(float)
    smaller = cv2.resize(kept.picture, usual.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert kept.usual is not None and np.abs(smaller - usual)[4:-4, 4:-4].mean() < 3


def test_references_of_both_sizes_in_one_call():
    host = Host("klein")
    seen = seen_by_transformer(host.case, host.pipe)
    host.apply(overview=[None, 4, 4])
    host.call([host.picture(2.0, seed=1), host.picture(2.0, seed=2), host.picture(0.5, seed=3)])
    first, second, third = last_selection(host.pipe).references
    assert [kept.usual for kept in (first, second, third)] == [None, (16, 16), None]
    assert [kept.count for kept in (first, second, third)] == [77, 77, 19]
    times = seen[0][1][0][:, 0].tolist()
    expected = {0: 4, 10: 77, 20: 61, 30: 15, 22: 16, 32: 4}
    assert {time: times.count(time) for time in set(times)} == expected


@pytest.mark.parametrize("by", ["mask", "alpha"])
@pytest.mark.parametrize("name", cases("klein", "kontext"))
def test_a_mask_goes_with_the_larger_picture(name, by):
    host = Host(name)
    reference = host.picture()
    marked = np.zeros((reference.height, reference.width), np.uint8)
    marked[: reference.height // 4, : reference.width // 4] = 255
    if by == "alpha":
        reference.putalpha(Image.fromarray(marked))
    host.apply(selector=mask([marked]) if by == "mask" else "mask", keep=16 + 64)
    host.call([reference])
    (kept,) = last_selection(host.pipe).references
    assert kept.mask.sum() == kept.mask[:8, :8].sum() == 64


def test_auto_takes_no_more_than_the_usual_size_has():
    host = Host("kontext")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    for reference, counts in ((noise, {256}), (detailed_corner(host), {17, 18, 19, 20})):
        host.apply(keep="auto", selector="residual", psnr=40.0)
        host.call([reference])
        (kept,) = last_selection(host.pipe).references
        assert kept.count in counts and (kept.psnr > 40) == (kept.count < 256)


@pytest.mark.parametrize("pixels", [None, 2 * MEGAPIXEL])
def test_the_engine_leaves_it_to_the_pipeline_to_scale(pixels):
    host = Host("klein")
    request = Request("a cat", [host.picture(1.6)], SparseContextConfig(overview=4, reference_max_pixels=pixels))
    _, arguments, _ = call_of(host.pipe, request)
    (image,) = arguments["image"]
    assert image.width * image.height == pytest.approx(pixels or MEGAPIXEL, rel=1e-2)


def test_an_engine_looks_at_larger_pictures_in_their_usual_size_and_previews_them(tmp_path):
    host, drawn = Host("klein"), []
    host.pipe.register_to_config(_name_or_path=str(tmp_path))
    (tmp_path / "call.json").write_text(json.dumps({"max_sequence_length": 12, "text_encoder_out_layers": [1, 2]}))
    engine = Engine(pipe=host.pipe, bar=False)
    request = Request("a cat", [host.picture(1.6)], SparseContextConfig(overview=4, reference_max_pixels=4 * MEGAPIXEL))
    made = engine(replace(request, steps=2), preview=lambda step, steps, draw: drawn.extend(draw()))
    chosen = engine.select(request)
    assert made.selection.references[0].grid == (25, 25)
    assert (chosen.kept, chosen.total) == (made.selection.kept, made.selection.total) == (51, 256)
    assert [each.size for each in drawn] == [made.image.size] * 2 == [(1024, 1024)] * 2
    usual = replace(request, config=replace(request.config, reference_max_pixels=None))
    assert engine.predict(request) == engine.predict(usual)


@given(references(), shares, st.data())
def test_as_many_tokens_are_kept_of_larger_pictures(scores, share, data):
    """And none beyond those that the usual ones have, whatever their budget is."""
    scales = data.draw(st.lists(st.integers(1, 3), min_size=len(scores), max_size=len(scores)))
    sizes = [part.size for part in scores]
    larger = [np.kron(part, np.ones((k, k), np.float32)) for part, k in zip(scores, scales, strict=True)]
    spent = [data.draw(st.integers(0, size // 4)) for size in sizes]
    keep = data.draw(st.floats(0.5, 0.95) | st.integers(2 + sum(sizes) // 2, 2 + sum(sizes)))
    settings = {"share": share, "floor": 0, "reserved": spent, "multiple_of": data.draw(st.integers(1, 9))}
    try:
        usual = choose_tokens(scores, keep, **settings)
    except ValueError:
        assume(False)
    chosen = choose_tokens(larger, keep, sizes=sizes, **settings)
    assert sum(map(len, chosen)) == sum(map(len, usual))
    if share == "equal":
        assert [*map(len, chosen)] == [*map(len, usual)]
    assert all(len(index) <= size - taken for index, size, taken in zip(chosen, sizes, spent, strict=True))
    assert all(len(index) == 0 or index[-1] < part.size for index, part in zip(chosen, larger, strict=True))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    cases("klein-inpaint", "kontext-inpaint", "qwen-edit", "qwen-edit-inpaint", "qwen-edit-2511"),
)
def test_hosts_that_have_one_size_refuse_another(name):
    case = CASES[name]
    pipe = case.build()
    apply_sparse_context(pipe, overview=4, reference_max_pixels=4 * MEGAPIXEL)
    with pytest.raises(
        ValueError, match="reference_max_pixels is 4194304, but .* takes references in its own size alone"
    ):
        case.call(pipe, case.references())


def test_a_larger_size_needs_an_overview():
    refusal = (
        "reference_max_pixels is 4194304, and only an overview shows .*: pass overview='auto' too, or leave it out"
    )
    with pytest.raises(ValueError, match=refusal):
        SparseContextConfig(overview=None, reference_max_pixels=4 * MEGAPIXEL)
    host = Host("kontext")
    host.apply(overview="trained", overview_layout=None, reference_max_pixels=4 * MEGAPIXEL)
    with pytest.raises(ValueError, match=refusal):
        host.call([host.picture()])


@pytest.mark.parametrize("pixels", [0, -1, 1.5, True, "4MP"])
def test_the_size_is_a_number_of_pixels(pixels):
    with pytest.raises(
        ValueError, match="reference_max_pixels is .*: pass a number of pixels such as 4194304, or None"
    ):
        SparseContextConfig(overview=4, reference_max_pixels=pixels)


def test_without_a_host_there_are_no_larger_pictures():
    config = SparseContextConfig(overview=4, reference_max_pixels=MEGAPIXEL)
    with pytest.raises(ValueError, match="reference_max_pixels is 1048576, but there are no larger pictures here"):
        select_tokens([np.zeros((64, 64, 3), np.uint8)], [(8, 8)], config)


# Grids, tiles, the report ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "size", "pixels", "larger"),
    [
        ((64, 64), (4096, 4096), 4 * MEGAPIXEL, (128, 128)),
        ((64, 64), (2048, 2048), 16 * MEGAPIXEL, (128, 128)),
        ((64, 64), (2048, 1024), 16 * MEGAPIXEL, None),
        ((78, 52), (2500, 1664), 16 * MEGAPIXEL, (156, 104)),
        ((64, 64), (4096, 4096), MEGAPIXEL, None),
        ((64, 64), (4096, 4096), 2 * MEGAPIXEL, (90, 90)),
    ],
)
def test_larger_grids(grid, size, pixels, larger):
    assert large_grid(grid, 16, size, pixels) == larger


@pytest.mark.parametrize("count", [1, 7, 100, 1500])
@pytest.mark.parametrize(("side", "border"), [(8, 0), (8, 3), (32, 4), (1, 1)])
def test_each_kept_token_is_in_one_tile_with_its_border(count, side, border):
    grid = (37, 53)
    index = np.sort(np.random.default_rng(count).choice(37 * 53, count, replace=False))
    parts = tiles(index, grid, side, border)
    assert np.array_equal(np.sort(np.concatenate([part.numbers[part.wanted] for part in parts])), index)
    for part in parts:
        row, column = np.divmod(part.numbers, grid[1])
        assert len(part.numbers) == (part.rows.stop - part.rows.start) * (part.columns.stop - part.columns.start)
        for place, span, end in ((row, part.rows, 37), (column, part.columns, 53)):
            own = place[part.wanted]
            assert own.max() // side == own.min() // side
            assert span.start == max(0, own.min() - border) and span.stop == min(end, own.max() + 1 + border)
            assert place.min() == span.start and place.max() == span.stop - 1


def test_the_report_names_both_sizes():
    host = Host("kontext")
    host.apply()
    host.call([host.picture()])
    selection = last_selection(host.pipe)
    expected = (
        "reference 1: 77 of 256 tokens (30 %): 16 of an overview by 4, 61 sharp of 1024 in a larger picture by detail"
    )
    assert str(selection).splitlines()[0] == expected
    (record,) = selection.to_dict()["references"]
    assert record["grid"] == [16, 16] and record["large_grid"] == [32, 32]
    assert record["kept"] == selection.kept == 77 and record["total"] == selection.total == 256
    assert draw_selection(selection, height=64).height > 64
