"""References that come again: found for the same content, never for any other, and equal to what is made anew."""

import threading

import accelerate
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline
from tiny import CASES, build_flux2, call_flux2, cases, picture, tiny_vae

from sparse_context import ReferenceCache, SparseContextConfig, apply_sparse_context, mask, remove_sparse_context
from sparse_context.selection import score_tokens
from sparse_context.selectors.registry import SELECTORS, blend

NAMES = ["flux2-dev", "klein", "klein-kv", "klein-inpaint"]


def encodings(pipe):
    """A list that grows by one shape with each picture that the VAE encodes."""
    seen, encode = [], pipe.vae.encode

    def watched(image, *args, **kwargs):
        seen.append(tuple(image.shape))
        return encode(image, *args, **kwargs)

    pipe.vae.encode = watched
    return seen


@pytest.fixture
def pipe():
    return build_flux2(Flux2KleinPipeline)


@pytest.mark.parametrize("name", cases(*NAMES))
@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_a_hit_equals_the_uncached_path(name, keep):
    case = CASES[name]
    plain, cached, cache = case.build(), case.build(), ReferenceCache()
    apply_sparse_context(plain, keep=keep)
    expected = case.call(plain, case.references())
    encoded = encodings(cached)
    apply_sparse_context(cached, keep=keep, cache=cache)
    assert torch.equal(case.call(cached, case.references()), expected)
    pictures = 2 if name == "klein-inpaint" else 3  # which encodes two reference pictures as one batch
    assert len(encoded) == pictures and cache.hits == 0
    assert torch.equal(case.call(cached, case.references()), expected)
    assert len(encoded) == pictures
    assert cache.hits == pictures + (0 if keep == 1.0 else 3)


@pytest.mark.parametrize("name", cases(*NAMES))
def test_overviews_are_remembered_like_the_pictures_that_they_are_of(name):
    case = CASES[name]
    plain, cached, cache = case.build(), case.build(), ReferenceCache()
    for pipe, remembers in ((plain, None), (cached, cache)):
        apply_sparse_context(pipe, keep=0.3, overview=4, selector="residual", cache=remembers)
    expected = case.call(plain, case.references())
    encoded = encodings(cached)
    assert torch.equal(case.call(cached, case.references()), expected)
    assert cache.hits == 0
    assert (1, 3, 16, 16) in encoded or (1, 3, 16, 24) in encoded  # 64 or 96 pixels, by 4
    first = len(encoded)
    assert torch.equal(case.call(cached, case.references()), expected)
    assert len(encoded) == first
    apply_sparse_context(cached, keep=0.3, overview=2, selector="residual", cache=cache)
    case.call(cached, case.references())
    assert 0 < len(encoded) - first < first  # of another size


def test_other_families_have_their_scores_remembered():
    case = CASES["kontext"]
    plain, cached, cache = case.build(), case.build(), ReferenceCache()
    apply_sparse_context(plain, keep=0.3)
    apply_sparse_context(cached, keep=0.3, cache=cache)
    expected = case.call(plain, case.references())
    for _ in range(2):
        assert torch.equal(case.call(cached, case.references()), expected)
    assert (cache.hits, cache.misses) == (1, 1)


def test_removing_restores_with_a_cache_too(pipe):
    before = {k: id(v) for k, v in vars(pipe).items()}
    apply_sparse_context(pipe, cache=ReferenceCache())
    assert {k: id(v) for k, v in vars(pipe).items()} != before
    remove_sparse_context(pipe)
    assert {k: id(v) for k, v in vars(pipe).items()} == before


def test_it_outlives_applying_again_and_serves_several_pipelines(pipe):
    cache, kv = ReferenceCache(), Flux2KleinKVPipeline(**pipe.components)
    kv.set_progress_bar_config(disable=True)
    twin = Flux2KleinPipeline(**pipe.components)
    twin.set_progress_bar_config(disable=True)
    encoded = encodings(pipe)
    for keep, each in ((0.2, pipe), (0.6, pipe), (0.2, twin)):
        apply_sparse_context(each, keep=keep, cache=cache)
        call_flux2(each, [picture(64, 64)])
    assert len(encoded) == 1
    apply_sparse_context(kv, cache=cache)
    call_flux2(kv, [picture(64, 64)])
    assert len(encoded) == 2  # another class encodes by a function of its own


# What makes a miss ---------------------------------------------------------------------------------------------------


def change_pixel(pipe, references):
    references[0].putpixel((5, 5), (1, 2, 3))


def change_size(pipe, references):
    references[0] = references[0].crop((0, 0, 56, 64)).resize((72, 64))


def change_preprocessing(pipe, references):
    pipe.image_processor.register_to_config(do_normalize=False)


def change_weight(pipe, references):
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3


def change_statistics(pipe, references):
    pipe.vae.bn.running_mean.add_(0.5)


def change_epsilon(pipe, references):
    pipe.vae.register_to_config(batch_norm_eps=0.5)


def load_weights(pipe, references):
    pipe.vae.load_state_dict({k: v + 0.01 if v.is_floating_point() else v for k, v in tiny_vae().state_dict().items()})


def assign_weights(pipe, references):
    pipe.vae.load_state_dict({k: v.clone() for k, v in tiny_vae().state_dict().items()}, assign=True)


def swap_data(pipe, references):
    weight = pipe.vae.encoder.conv_in.weight
    weight.data = weight.detach() * 2


def other_vae(pipe, references):
    pipe.vae = tiny_vae()


def change_dtype(pipe, references):
    pipe.vae.to(torch.bfloat16)


def change_memory_format(pipe, references):
    pipe.vae.to(memory_format=torch.channels_last)


def switch_tiling(pipe, references):
    pipe.vae.enable_tiling()


CHANGES = [
    change_pixel,
    change_size,
    change_preprocessing,
    change_weight,
    change_statistics,
    change_epsilon,
    load_weights,
    assign_weights,
    swap_data,
    other_vae,
    change_dtype,
    change_memory_format,
    switch_tiling,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_any_change_is_a_miss(pipe, change):
    cache, references = ReferenceCache(), [picture(64, 64)]
    apply_sparse_context(pipe, selector="uniform", cache=cache)
    call_flux2(pipe, references)
    encoded = encodings(pipe)
    call_flux2(pipe, references)
    assert encoded == []
    del pipe.vae.encode
    change(pipe, references)
    encoded = encodings(pipe)
    cached = call_flux2(pipe, references)
    assert len(encoded) == 1
    apply_sparse_context(pipe, selector="uniform")
    assert torch.equal(cached, call_flux2(pipe, references))


def test_equal_content_is_a_hit_wherever_it_lies(pipe):
    """Moving weights to an accelerator and back gives them new addresses, an equal VAE is another module."""
    cache = ReferenceCache()
    apply_sparse_context(pipe, cache=cache)
    call_flux2(pipe, [picture(64, 64)])
    encoded = encodings(pipe)
    for weight in pipe.vae.parameters():
        weight.data = weight.detach().clone()
    call_flux2(pipe, [picture(64, 64)])
    twin = tiny_vae()
    twin.load_state_dict(pipe.vae.state_dict())
    pipe.vae = twin
    encoded += encodings(pipe)
    call_flux2(pipe, [picture(64, 64)])
    assert encoded == []


def test_a_write_through_data_is_hidden_until_the_cache_is_cleared(pipe):
    cache = ReferenceCache()
    apply_sparse_context(pipe, cache=cache)
    call_flux2(pipe, [picture(64, 64)])
    pipe.vae.encoder.conv_in.weight.data.mul_(2)
    cache.clear()
    assert len(cache) == cache.nbytes == 0
    encoded = encodings(pipe)
    call_flux2(pipe, [picture(64, 64)])
    assert len(encoded) == 1


def test_inference_tensors_are_hashed_each_time(pipe):
    """Torch counts no versions of these, so a change of their content is found by content alone."""
    cache = ReferenceCache()
    with torch.inference_mode():
        pipe.vae = tiny_vae()
        apply_sparse_context(pipe, cache=cache)
        call_flux2(pipe, [picture(64, 64)])
        encoded = encodings(pipe)
        call_flux2(pipe, [picture(64, 64)])
        assert len(encoded) == 0
        pipe.vae.encoder.conv_in.weight.mul_(2)
        call_flux2(pipe, [picture(64, 64)])
    assert len(encoded) == 1


def test_weights_that_are_elsewhere_between_calls_cannot_be_told_apart(pipe):
    cache = ReferenceCache()
    reference = [picture(64, 64)]
    apply_sparse_context(pipe, keep=0.3)
    expected = call_flux2(pipe, reference)
    accelerate.cpu_offload(pipe.vae, torch.device("cpu"), offload_buffers=False)  # what sequential offloading does
    apply_sparse_context(pipe, keep=0.3, cache=cache)
    for call in range(2):
        assert torch.equal(call_flux2(pipe, reference), expected)
        assert (len(cache), cache.hits, cache.misses) == (1, call, 1)  # the scores


def test_what_needs_a_gradient_is_not_remembered():
    cache, vae, image = ReferenceCache(), tiny_vae(), torch.randn(1, 3, 16, 16)
    for _ in range(2):
        assert cache.encode(image, image, vae, lambda: vae.encode(image).latent_dist.mode()).requires_grad
    assert len(cache) == 0 and cache.misses == 2


def test_writing_to_a_result_does_not_reach_the_cache():
    cache, vae, image = ReferenceCache(), tiny_vae(), torch.randn(1, 3, 16, 16)
    made = torch.arange(4.0)
    for _ in range(3):
        latents = cache.encode(image, image, vae, made.clone)
        assert torch.equal(latents, made)
        latents.zero_()
    pixels = np.asarray(picture(32, 32))
    for _ in range(3):
        scores = cache.score("edges", pixels, (4, 4), (0, 0))
        assert np.array_equal(scores, score_tokens("edges", pixels, (4, 4), (0, 0)))
        scores[:] = 0


# Scores --------------------------------------------------------------------------------------------------------------


def asked(selector, image=None, grid=(4, 4), seed=(0, 0), cache=None):
    cache = cache or ReferenceCache()
    image = np.asarray(picture(32, 32).convert("RGBA")) if image is None else image
    scores = cache.score(selector, image, grid, seed)
    assert np.array_equal(scores, score_tokens(selector, image, grid, seed))
    return cache


PLAIN = [name for name in SELECTORS if name != "text"]  # which needs a phrase: test_text.py


@pytest.mark.parametrize(
    "selector",
    [*PLAIN, mask([np.ones((32, 32), bool)]), {"edges": 0.4, "detail": 0.6}, blend({"edges": 1, "uniform": 2})],
    ids=[*PLAIN, "drawn mask", "weights", "blend"],
)
def test_scores_are_found_again(selector):
    cache = asked(selector)
    asked(selector, cache=cache)
    assert (cache.hits, cache.misses) == (1, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"selector": "detail"},
        {"selector": {"edges": 0.4, "detail": 0.6}},
        {"image": np.asarray(picture(32, 32, 1).convert("RGBA"))},
        {"image": np.asarray(picture(32, 32))},
        {"grid": (2, 8)},
        {"seed": (1, 0)},
        {"seed": (0, 1)},
    ],
    ids=["selector", "blend", "image", "channels", "grid", "seed", "reference"],
)
def test_any_other_score_is_a_miss(change):
    cache = asked("edges")
    asked(**{"selector": "edges", **change}, cache=cache)
    assert (cache.hits, cache.misses) == (0, 2)


def test_a_mask_is_found_by_its_pixels_in_the_call(pipe):
    cache = ReferenceCache()
    top = np.zeros((64, 64), bool)
    top[:32] = True
    kept = []
    for drawn in (top, ~top, top):
        apply_sparse_context(pipe, SparseContextConfig(keep=8, selector=mask([drawn])), cache=cache)
        call_flux2(pipe, [picture(64, 64)])
        kept.append(pipe._sparse_context.selection.index)
    assert kept[0].max() < 32 <= kept[1].min() and np.array_equal(kept[0], kept[2])


def test_a_function_of_the_users_runs_every_time(monkeypatch):
    calls = []

    def own(image, grid, generator):
        calls.append(grid)
        return np.full(grid, 0.5, np.float32)

    cache = asked(own)
    asked({own: 1.0, "edges": 1.0}, cache=cache)
    monkeypatch.setitem(SELECTORS, "own", own)
    asked("own", cache=cache)
    assert len(cache) == cache.hits == cache.misses == 0 and len(calls) == 6


# Bounds and threads --------------------------------------------------------------------------------------------------


def held(cache, number, size=100):
    """Ask for tensor `number`, of 4 * `size` bytes; whether it had to be made."""
    made = []

    def make():
        made.append(number)
        return torch.full((size,), float(number))

    image = torch.full((1, 3, 4, 4), float(number))
    assert torch.equal(cache.encode(image, image, held.vae, make), torch.full((size,), float(number)))
    return bool(made)


held.vae = tiny_vae()


def test_the_least_recently_used_goes_first():
    cache = ReferenceCache(max_bytes=1200)
    assert [held(cache, n) for n in (1, 2, 3)] == [True] * 3
    assert (len(cache), cache.nbytes) == (3, 1200)
    assert not held(cache, 1)
    assert held(cache, 4)  # in the place of 2
    assert [held(cache, n) for n in (1, 3, 4)] == [False] * 3
    assert held(cache, 2)
    assert (len(cache), cache.nbytes) == (3, 1200)


def test_what_is_too_large_is_not_kept_and_sends_nothing_away():
    cache = ReferenceCache(max_bytes=1200)
    held(cache, 1)
    assert held(cache, 2, size=301) and held(cache, 2, size=301)
    assert not held(cache, 1) and cache.nbytes == 400
    assert held(cache, 3, size=300)
    assert (len(cache), cache.nbytes) == (1, 1200)


def test_the_bytes_are_those_of_the_result_not_of_what_it_is_a_view_of():
    cache, whole, image = ReferenceCache(max_bytes=1200), torch.zeros(10_000), torch.zeros(1, 3, 4, 4)
    cache.encode(image, image, held.vae, lambda: whole[:100])
    (kept,) = cache._held.values()
    assert kept.untyped_storage().nbytes() == cache.nbytes == 400


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1 GB"])
def test_bounds_out_of_range(value):
    with pytest.raises(ValueError, match=f"^max_bytes is {value!r}: pass a whole number of bytes, 1 or more.$"):
        ReferenceCache(value)


def test_threads():
    cache, failed = ReferenceCache(max_bytes=4000), []
    start = threading.Barrier(8)

    def work(seed):
        try:
            start.wait()
            for number in np.random.default_rng(seed).integers(0, 20, 150):
                held(cache, int(number))
                assert cache.nbytes <= 4000
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert cache.hits + cache.misses == 8 * 150
    assert cache.nbytes == sum(value.nbytes for value in cache._held.values()) <= 4000


@pytest.mark.parametrize("cache", [{}, True])
def test_a_cache_of_another_kind_is_refused_and_the_pipeline_left_as_it_was(cache):
    pipe = build_flux2(Flux2KleinPipeline)
    with pytest.raises(TypeError, match=r"cache is .*: pass a ReferenceCache\(\), or None"):
        apply_sparse_context(pipe, cache=cache)
    with pytest.raises(TypeError, match=r"config is 0.2: pass a SparseContextConfig, or name .* keep=0.2"):
        apply_sparse_context(pipe, 0.2)
    assert not [name for name in vars(pipe) if "sparse" in name]
