"""Pixels on their way to the VAE: bytes as long as that goes, encoded as one batch where sizes allow, and chosen from
while an accelerator encodes."""

import copy
import threading

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from test_speed import Operations
from tiny import CASES, EACH_FAMILY, build_flux2, call_flux2, cases, picture

from sparse_context import ReferenceCache, SparseContextConfig, apply_sparse_context, context, last_selection
from sparse_context.cache import _digest_of, fix
from sparse_context.families.flux2.drop import Together
from sparse_context.families.pictures import to_uint8
from sparse_context.families.pixels import GREYS, LazyPixels, preprocess_lazily, source_of
from sparse_context.pipelines import ModelSpec
from sparse_context.pipelines.load import speed_up_vae


@pytest.fixture
def pipe():
    return build_flux2(Flux2KleinPipeline)


def pixels_of(*pictures, **size):
    """What diffusers makes of pictures, and the same lazily."""
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    given = list(pictures) if len(pictures) > 1 else pictures[0]
    plain, lazy = (make(given, **size) for make in (processor.preprocess, preprocess_lazily(processor)))
    assert type(plain) is torch.Tensor and type(lazy) is LazyPixels
    return plain, lazy


EVERY_GREY = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(12).reshape(32, 32, 3))


@pytest.mark.parametrize(
    ("pictures", "size"),
    [
        ([EVERY_GREY], {}),
        ([picture(70, 90)], {"height": 80, "width": 64, "resize_mode": "crop"}),
        ([picture(64, 64), picture(64, 64, 1)], {}),
        ([picture(64, 64).convert("RGBA")], {}),
        ([picture(64, 64).convert("L")], {}),
    ],
)
def test_they_are_what_diffusers_makes(pictures, size):
    plain, lazy = pixels_of(*pictures, **size)
    assert lazy.shape == plain.shape and lazy.ndim == 4 and lazy.device.type == "cpu"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        moved = lazy.to(device=torch.device("cpu"), dtype=dtype)
        assert type(moved) is torch.Tensor and torch.equal(moved, plain.to(dtype)) and moved.dtype == dtype
        assert moved.stride() == plain.stride()  # which decides how convolutions add
    assert type(lazy * 2) is torch.Tensor and torch.equal(lazy * 2, plain * 2)
    assert torch.equal(torch.cat([lazy, lazy]), torch.cat([plain, plain]))
    assert torch.equal(lazy[:, :, 3:9], plain[:, :, 3:9]) and lazy.dtype == torch.float32
    for given in ((torch.float64, False, True), (torch.bfloat16,)):
        for kwargs in ({}, {"memory_format": torch.contiguous_format}):
            moved, expected = (pixels.to(*given, **kwargs) for pixels in (lazy, plain))
            assert torch.equal(moved, expected) and moved.stride() == expected.stride()
    copied = lazy.to(torch.float32, copy=True)
    assert torch.equal(copied, plain) and copied.data_ptr() != lazy.floats.data_ptr()
    assert torch.zeros(1, dtype=torch.float64).to(lazy).dtype == torch.float32
    assert np.array_equal(np.asarray(lazy), plain.numpy()) and np.array_equal(to_uint8(lazy), to_uint8(plain))


def test_bytes_go_to_the_device_and_nothing_waits_for_it():
    plain, lazy = pixels_of(picture(64, 96))
    with Operations() as operations:
        moved = lazy.to(device="meta", dtype=torch.bfloat16)
    assert operations.copies == [("cpu", "meta", True)] * 2  # the bytes, and the values that they stand for
    assert (moved.shape, moved.stride(), moved.dtype) == (plain.shape, plain.stride(), torch.bfloat16)
    assert lazy._floats is None


def test_the_table_of_a_device_is_that_of_the_cpu():
    """By the way that bytes take on an accelerator, here on the CPU."""
    plain, lazy = pixels_of(EVERY_GREY)
    for dtype in (torch.float32, torch.bfloat16):
        found = GREYS.to(dtype).index_select(0, lazy._bytes.flatten().int()).view(lazy._bytes.shape)
        assert torch.equal(found.permute(0, 3, 1, 2), plain.to(dtype))


def test_where_they_came_from_is_known_until_somebody_changes_them():
    _, lazy = pixels_of(picture(64, 64))
    moved = lazy.to(torch.bfloat16)
    assert source_of(lazy) is source_of(moved) is lazy
    assert source_of(moved * 1) is source_of(torch.zeros(1)) is None
    moved.add_(1)
    assert source_of(moved) is None
    with torch.inference_mode():
        assert source_of(lazy.to(torch.float16)) is None  # torch counts no changes of these


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_who_writes_to_them_writes_to_what_the_vae_gets(mode):
    with mode():
        plain, lazy = pixels_of(picture(64, 64))
        before = lazy.to(torch.bfloat16)
        for pixels in (plain, lazy):
            pixels[..., :32].mul_(0.5)
        assert torch.equal(lazy.to(torch.bfloat16), plain.to(torch.bfloat16))
        assert lazy.shown == [] and source_of(before) is None
        assert np.array_equal(to_uint8(lazy), to_uint8(plain))


def test_copies_and_compiled_functions_get_plain_tensors(tmp_path):
    plain, lazy = pixels_of(picture(64, 64))
    compiled = torch.compile(lambda x: x * 2 + 1, backend="eager", fullgraph=True)
    for pixels in (lazy, lazy.to(torch.float32)):
        torch.save(pixels, tmp_path / "pixels.pt")
        for copied in (copy.deepcopy(pixels), torch.load(tmp_path / "pixels.pt", weights_only=True)):
            assert type(copied) is torch.Tensor and torch.equal(copied, plain) and source_of(copied) is None
    assert torch.equal(compiled(lazy.to(torch.float32)), plain * 2 + 1)


def test_what_does_more_than_scaling_stays_as_it_is():
    image = picture(64, 64)
    for changes in ({"do_normalize": False}, {"do_binarize": True}, {"do_convert_rgb": False}):
        processor = Flux2ImageProcessor(**changes)
        assert type(preprocess_lazily(processor)(image)) is torch.Tensor
    processor = Flux2ImageProcessor()
    assert type(preprocess_lazily(processor)(torch.zeros(1, 3, 64, 64))) is torch.Tensor
    processor.normalize = lambda images: images
    assert type(preprocess_lazily(processor)(image)) is torch.Tensor

    class Own(Flux2ImageProcessor):
        pass

    assert type(preprocess_lazily(Own())(image)) is torch.Tensor


def test_a_picture_is_hashed_once():
    _, lazy = pixels_of(picture(64, 64))
    (shown,) = lazy.shown
    before = _digest_of(shown)
    assert before == _digest_of(shown.copy())
    lazy._bytes.zero_()  # which nobody does: a second look would see it
    assert _digest_of(shown) == before != _digest_of(shown.copy())
    with pytest.raises(ValueError, match="The array can be written to: set its flags.writeable to False"):
        fix(np.zeros(3))


def test_a_selector_cannot_write_to_the_pixels(pipe):
    def draws(image, grid, generator):
        image[:] = 0
        return np.zeros(grid, np.float32)

    apply_sparse_context(pipe, selector=draws)
    with pytest.raises(ValueError, match="read-only"):
        call_flux2(pipe, [picture(64, 64)])


# One batch ------------------------------------------------------------------------------------------------------------


def encoded(pipe):
    """A list that fills with the shapes that the VAE encodes."""
    seen, encode = [], type(pipe.vae).encode
    pipe.vae.encode = lambda x, *args, **kwargs: seen.append(tuple(x.shape)) or encode(pipe.vae, x, *args, **kwargs)
    return seen


SIZES = [(64, 64), (96, 64), (64, 64), (64, 64)]
ALL_ALONE = [(1, 3, height, width) for width, height in SIZES]


def references():
    return [picture(*size, seed) for seed, size in enumerate(SIZES)]


CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # a batch may be added up in another order


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({"keep": 0.3}, ALL_ALONE),
        ({"keep": 0.3, "together": True}, [(3, 3, 64, 64), (1, 3, 64, 96)]),
        ({"keep": 1.0, "together": True}, ALL_ALONE),  # which is to be the untouched pipeline's to the last bit
        ({"keep": 0.3, "together": True, "cache": ReferenceCache()}, ALL_ALONE),
        (
            {"keep": 0.3, "together": True, "overview": 4},
            [(3, 3, 64, 64), (1, 3, 64, 96), (3, 3, 16, 16), (1, 3, 16, 24)],
        ),
    ],
)
def test_equal_sizes_are_one_batch_where_that_is_asked_for(pipe, changes, shapes):
    seen = encoded(pipe)
    apply_sparse_context(pipe, **changes)
    made = call_flux2(pipe, references())
    assert seen == shapes
    apply_sparse_context(pipe, **changes | {"together": False})
    torch.testing.assert_close(made, call_flux2(pipe, references()), **CLOSE)


def test_a_batch_is_no_larger_than_a_megapixel():
    together = Together()
    together.expect([LazyPixels.of_floats(torch.zeros(1, 3, 512, 512)) for _ in range(6)])
    assert [len(group) for group in together._groups] == [4, 2]
    together.expect([LazyPixels.of_floats(torch.zeros(1, 3, 1024, 1024)) for _ in range(2)])
    assert [len(group) for group in together._groups] == [1, 1]


def test_batches_of_one_length_are_told_apart():
    first, second = ([LazyPixels.of_floats(torch.zeros(1, 3, side, side)) for _ in range(2)] for side in (32, 64))
    together = Together()
    together.expect(first + second)
    moved = second[0].to(torch.float32)
    made = together.encode(moved, source_of(moved), lambda image: image.mean((1, 2, 3)))
    assert made.shape == (1,) and together._groups == [first]


def test_a_batch_follows_the_order_in_which_it_is_asked_for(pipe):
    apply_sparse_context(pipe, keep=0.3, together=True)
    expected = call_flux2(pipe, references())
    other = build_flux2(Flux2KleinPipeline)
    prepare = other.prepare_image_latents

    def backwards_first(images, *args, **kwargs):
        for image in images[::-1]:
            other._encode_vae_image(image=image, generator=None)
        return prepare(images, *args, **kwargs)

    other.prepare_image_latents = backwards_first
    apply_sparse_context(other, keep=0.3, together=True)
    torch.testing.assert_close(call_flux2(other, references()), expected, **CLOSE)


def test_a_function_of_the_user_s_own_gets_one_picture_at_a_time(pipe):
    apply_sparse_context(pipe, keep=0.3)
    expected, seen = call_flux2(pipe, references()), []
    apply_sparse_context(pipe, keep=0.3, together=True)
    encode = type(pipe)._encode_vae_image
    pipe._encode_vae_image = lambda image, generator: seen.append(image) or encode(pipe, image, generator)
    assert torch.equal(call_flux2(pipe, references()), expected)
    assert [tuple(image.shape) for image in seen] == ALL_ALONE
    assert {type(image) for image in seen} == {torch.Tensor}


@pytest.mark.parametrize("name", cases("klein", "qwen-edit-2511"))
def test_a_channels_last_vae_makes_the_same_latents(name):
    vae = CASES[name].build().vae
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pixels = pixels.unsqueeze(2) if name.startswith("qwen") else pixels
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist.mode()
        speed_up_vae(vae, "channels-last")
        torch.testing.assert_close(vae.encode(pixels).latent_dist.mode(), before, **CLOSE)
    weights = {weight.ndim: weight for weight in vae.parameters() if weight.ndim > 3 and min(weight.shape) > 1}
    assert weights and all(weight.stride()[1] == 1 for weight in weights.values())


def test_a_vae_is_made_faster_in_known_ways():
    with pytest.raises(ValueError, match="vae is 'fast': choose channels-last or compiled"):
        ModelSpec(vae="fast")
    with pytest.raises(ValueError, match="vae is 'compiled', which cpu_offload 'model' cannot move: leave one out"):
        ModelSpec(vae="compiled", cpu_offload="model")


# Meanwhile ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerated(monkeypatch):
    """As if the CPU were an accelerator, so that tokens are chosen while it encodes."""
    monkeypatch.setattr(context, "_has_accelerator", lambda pipe: True)


@pytest.mark.parametrize("name", cases(*EACH_FAMILY))
def test_choosing_beside_encoding_changes_nothing(name, accelerated, monkeypatch):
    case = CASES[name]
    made = []
    for _ in range(2):
        pipe = case.build()
        apply_sparse_context(pipe, keep=0.3, overview=4)
        made.append(case.call(pipe, case.references()))
        made.append(torch.from_numpy(last_selection(pipe).index))
        monkeypatch.undo()
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[3])


def test_tokens_are_chosen_while_references_are_encoded(pipe, accelerated):
    """The VAE waits for the scores here, which would never come if they came after it."""
    scored, encode = threading.Event(), type(pipe.vae).encode

    class Cache(ReferenceCache):
        def score(self, *args):
            scored.set()
            return super().score(*args)

    def wait(x, *args, **kwargs):
        assert scored.wait(60)
        return encode(pipe.vae, x, *args, **kwargs)

    pipe.vae.encode = wait
    apply_sparse_context(pipe, keep=0.3, cache=Cache())
    call_flux2(pipe, [picture(64, 64)])


def test_a_selector_of_the_user_s_own_runs_where_the_pipeline_was_called(pipe, accelerated):
    threads = []

    def own(image, grid, generator):
        threads.append(threading.current_thread())
        return np.zeros(grid, np.float32)

    apply_sparse_context(pipe, selector=[own, "edges"])
    call_flux2(pipe, [picture(64, 64), picture(64, 64, 1)])
    assert threads == [threading.current_thread()]


def test_what_choosing_raises_is_raised_by_the_call(pipe, accelerated):
    apply_sparse_context(pipe, SparseContextConfig(keep=[0.2, 0.3]))
    with pytest.raises(ValueError, match="keep has 2 values for 1 references: pass one value, or one per reference."):
        call_flux2(pipe, [picture(64, 64)])
    assert last_selection(pipe) is None
