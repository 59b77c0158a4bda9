"""What must hold for every family, on tiny real pipelines (the letters are DESIGN.md's).

What a class could do in a way of its own is shown for every class; what the code of its family decides, for one case of
each family (`EACH_FAMILY`).
"""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageOps
from tiny import CASES, EACH_FAMILY, QUICK, STEPS, cases, dense_answer, picture, small_hosts

from sparse_context import (
    SparseContextConfig,
    apply_sparse_context,
    last_selection,
    mask,
    remove_sparse_context,
    select_tokens,
)
from sparse_context.families import FAMILIES
from sparse_context.families.pictures import to_uint8
from sparse_context.pipelines import Engine, Request
from sparse_context.pipelines.arguments import call_of
from sparse_context.preview import draw_selection
from sparse_context.tokens import ReferenceTokens

KEEP = 0.3
TOLERANCE = 1e-5


@pytest.fixture(params=cases(), scope="module")
def case(request):
    return CASES[request.param]


each_family = pytest.mark.parametrize("case", cases(*EACH_FAMILY), indirect=True)


@pytest.fixture
def pipe(case):
    return case.build()


@pytest.fixture(scope="module")
def dense(case):
    """The untouched pipeline's answer."""
    return dense_answer(case)


def state_of(pipe):
    """Every attribute of the instance and of its image processor, by identity."""
    return [{k: id(v) for k, v in vars(o).items()} for o in (pipe, pipe.image_processor, pipe.transformer)]


def seen_by_transformer(case, pipe):
    """A list that fills with (image tokens, position ids) of each forward of the transformer."""
    seen = []
    case.watch(pipe.transformer, seen)
    return seen


def distance(a, b):
    return (a - b).abs().max().item()


def test_every_family_has_a_case():
    assert {type(case.build()).__name__ for case in CASES.values()} == set(FAMILIES)


def test_a_keeping_all_is_the_untouched_pipeline(case, pipe, dense):
    apply_sparse_context(pipe, keep=1.0)
    assert torch.equal(case.call(pipe, case.references()), dense)


def test_b_removing_restores_exactly(case, pipe, dense):
    before = state_of(pipe)
    apply_sparse_context(pipe, keep=KEEP)
    assert state_of(pipe) != before
    remove_sparse_context(pipe)
    assert state_of(pipe) == before
    apply_sparse_context(pipe, keep=KEEP)
    assert distance(case.call(pipe, case.references()), dense) > 1e-4
    remove_sparse_context(pipe)
    assert torch.equal(case.call(pipe, case.references()), dense)
    remove_sparse_context(pipe)  # a second time changes nothing


def test_c_applying_again_replaces(case, pipe):
    before = state_of(pipe)
    apply_sparse_context(pipe, keep=0.1)
    apply_sparse_context(pipe, keep=0.5)
    remove_sparse_context(pipe)
    assert state_of(pipe) == before
    apply_sparse_context(pipe, keep=0.1)
    case.call(pipe, case.references())
    apply_sparse_context(pipe, keep=0.5)
    twice = case.call(pipe, case.references())
    fresh = case.build()
    apply_sparse_context(fresh, keep=0.5)
    assert torch.equal(twice, case.call(fresh, case.references()))


def test_d_the_order_of_kept_tokens_does_not_matter(case, pipe, monkeypatch):
    apply_sparse_context(pipe, keep=KEEP)
    ordered = case.call(pipe, case.references())
    keep = ReferenceTokens.keep

    def keep_shuffled(self, *index):
        kept = keep(self, *index)
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
        return ReferenceTokens(kept.latents[:, order], kept.ids[..., order, :])

    monkeypatch.setattr(ReferenceTokens, "keep", keep_shuffled)
    assert 0 < distance(case.call(pipe, case.references()), ordered) < TOLERANCE


def masked(case, pipe, dropped, reference_tokens):
    """The oracle: the dense pipeline, where no query in any block may look at a dropped reference token.

    It knows nothing of ReferenceTokens: it forbids keys inside diffusers' attention by their place in the sequence.
    """
    attend = case.attention.dispatch_attention_fn

    def attend_masked(query, key, value, attn_mask=None, **kwargs):
        start = case.first_key(key.shape[1], reference_tokens)
        if start is not None:
            allowed = torch.ones(key.shape[1], dtype=torch.bool)
            allowed[start + torch.as_tensor(dropped)] = False
            attn_mask = allowed.view(1, 1, 1, -1)
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    case.attention.dispatch_attention_fn = attend_masked
    try:
        return case.call(pipe, case.references())
    finally:
        case.attention.dispatch_attention_fn = attend


def dropped_tokens(pipe):
    selection = last_selection(pipe)
    return np.setdiff1d(np.arange(selection.total), selection.index), selection.total


def test_e_dropping_is_masking_in_every_block(case, pipe):
    apply_sparse_context(pipe, keep=KEEP)
    sparse = case.call(pipe, case.references())
    assert distance(sparse, masked(case, case.build(), *dropped_tokens(pipe))) < TOLERANCE


def test_e_the_oracle_sees_wrong_position_ids(case, pipe, monkeypatch):
    keep = ReferenceTokens.keep

    def keep_wrong_ids(self, *index):
        kept = keep(self, *index)
        return ReferenceTokens(kept.latents, self.ids[..., : len(kept), :])

    monkeypatch.setattr(ReferenceTokens, "keep", keep_wrong_ids)
    apply_sparse_context(pipe, keep=KEEP)
    wrong = case.call(pipe, case.references())
    assert distance(wrong, masked(case, case.build(), *dropped_tokens(pipe))) > 5 * TOLERANCE


@pytest.mark.parametrize(
    ("case", "count"),
    [pytest.param(*p.values, n, marks=p.marks) for p in cases() for n in CASES[p.id].counts],
    indirect=["case"],
)
def test_f_the_transformer_saw_the_tokens_promised(case, pipe, count):
    references = case.references(count)
    whole, cut = case.build(), pipe
    seen_whole, seen_cut = seen_by_transformer(case, whole), seen_by_transformer(case, cut)
    case.call(whole, references)
    apply_sparse_context(cut, keep=KEEP)
    case.call(cut, references)
    selection = last_selection(cut)
    promised = sum(int(KEEP * size + 0.5) for size in case.tokens(references))
    assert [kept.scores.size for kept in selection.references] == case.tokens(references)
    assert selection.kept == promised and selection.total == sum(case.tokens(references))
    (whole_tokens, whole_ids), (cut_tokens, cut_ids) = seen_whole[0], seen_cut[0]
    assert whole_tokens - cut_tokens == selection.total - promised
    # The ids are those of the dense call at the kept places, and none else
    start = 0 if case.references_first else whole_tokens - selection.total
    index = torch.cat(
        [
            torch.arange(start),
            start + torch.from_numpy(selection.index),
            torch.arange(start + selection.total, whole_tokens),
        ]
    )
    assert torch.equal(cut_ids[0], whole_ids[0][index])


def embedded_tokens(pipe):
    """A list that fills with the tokens (B, N, C) that each forward embeds together with those of references."""
    transformer = pipe.transformer
    embedders = getattr(transformer, "x_embedders", None)
    embedder = embedders["image_cond"] if embedders else getattr(transformer, "x_embedder", None) or transformer.img_in
    seen = []
    embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    return seen


def test_f_with_merge_the_transformer_saw_the_averages_promised(case, pipe):
    references = case.references()
    whole = case.build()
    dense_ids, sparse_ids = seen_by_transformer(case, whole), seen_by_transformer(case, pipe)
    dense_tokens, sparse_tokens = embedded_tokens(whole), embedded_tokens(pipe)
    case.call(whole, references)
    apply_sparse_context(pipe, keep=KEEP, merge=0.6)
    case.call(pipe, references)
    selection = last_selection(pipe)
    assert selection.kept == sum(int(KEEP * size + 0.5) for size in case.tokens(references))
    assert all(0 < len(kept.averages) < len(kept.index) for kept in selection.references)
    total, kept = selection.total, selection.kept
    before, now = dense_tokens[0], sparse_tokens[0]
    assert before.shape[1] - now.shape[1] == total - kept
    before, now = (before[:, :total], now[:, :kept]) if case.references_first else (before[:, -total:], now[:, -kept:])
    for place, token in enumerate(selection.index):
        members = before[:, torch.from_numpy(selection.into == token)]
        assert torch.allclose(now[:, place], members.mean(dim=1), atol=1e-6)
    # Each stands at the place of one of its members
    (whole_tokens, whole_ids), (_, ids) = dense_ids[0], sparse_ids[0]
    start = 0 if case.references_first else whole_tokens - total
    assert torch.equal(ids[0][start : start + kept], whole_ids[0][start + torch.from_numpy(selection.index)])


@each_family
def test_a_selection_without_a_call_is_that_of_the_call(case, pipe):
    """Of an engine, and so of the app, in the size that the host gives each reference."""
    config = SparseContextConfig(keep=KEEP, selector=QUICK)
    references = case.references()
    if case in (CASES["longcat"], CASES["qwen-edit-2511"]):  # `small_hosts` leaves no whole tokens of other shapes
        references = [picture(64, 64)]
    width, height = references[0].size
    references[0].putalpha(Image.linear_gradient("L").resize((width, height)).point(lambda value: max(0, value - 90)))
    request = Request("x", references, config)
    with small_hosts():
        selected = Engine(pipe=pipe).select(request)
        apply_sparse_context(pipe, config)
        case.call(pipe, call_of(pipe, request)[2])
    made = last_selection(pipe)
    assert [kept.grid for kept in selected.references] == [kept.grid for kept in made.references]
    assert np.array_equal(selected.index, made.index)


@each_family
def test_g_two_pipelines_do_not_affect_each_other(case, pipe, dense):
    other = case.build()
    shared = case.share(pipe)
    shared.set_progress_bar_config(disable=True)
    assert shared.transformer is pipe.transformer
    apply_sparse_context(pipe, keep=KEEP)
    sparse = case.call(pipe, case.references())
    assert torch.equal(case.call(other, case.references()), dense)
    assert torch.equal(case.call(shared, case.references()), dense)
    apply_sparse_context(shared, keep=0.6)
    case.call(shared, case.references())
    assert torch.equal(case.call(pipe, case.references()), sparse)
    assert last_selection(shared).kept > last_selection(pipe).kept


@each_family
def test_h_lora(case, pipe, tmp_path):
    trained = case.build()
    trained.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_qkv_mlp_proj"])
    )
    # LongCat's pipeline loads no LoRA, so its users load it into the transformer
    loader = pipe if hasattr(pipe, "load_lora_weights") else None
    if loader:
        loader.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(trained.transformer))
    else:
        trained.transformer.save_lora_adapter(tmp_path)
    apply_sparse_context(pipe, keep=KEEP)
    plain = case.call(pipe, case.references())
    if loader:
        loader.load_lora_weights(str(tmp_path), use_safetensors=True)
    else:
        pipe.transformer.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
    apply_sparse_context(trained, keep=KEEP)
    with_lora = case.call(pipe, case.references())
    assert distance(with_lora, plain) > 1e-4
    assert distance(with_lora, case.call(trained, case.references())) < TOLERANCE
    pipe.transformer.unload_lora()
    assert torch.equal(case.call(pipe, case.references()), plain)


@pytest.mark.parametrize("case", cases(*EACH_FAMILY, "klein-base-modular"), indirect=True)
def test_h_guidance(case, pipe):
    if case.guidance is None:
        assert "negative_prompt_embeds" not in type(pipe).__call__.__annotations__
        return
    seen = seen_by_transformer(case, pipe)
    apply_sparse_context(pipe, keep=KEEP)
    case.call(pipe, case.references(), **case.guidance)
    assert len(seen) == 2 * STEPS
    assert len({tokens for tokens, _ in seen}) == 1


def test_h_several_images_and_prompts(case, pipe):
    references = case.references(2)
    apply_sparse_context(pipe, keep=KEEP)
    seen = seen_by_transformer(case, pipe)
    out = case.call(pipe, references, prompts=case.prompts, num_images_per_prompt=2)
    assert out.shape[0] == 2 * case.prompts
    assert last_selection(pipe).kept == sum(int(KEEP * size + 0.5) for size in case.tokens(references))
    assert seen[0][1].shape[0] in (1, 2 * case.prompts)
    assert all(torch.equal(ids, seen[0][1][0]) for ids in seen[0][1])


@each_family
def test_h_cpu_offload(case, pipe):
    apply_sparse_context(pipe, keep=KEEP)
    plain = case.call(pipe, case.references())
    case.offload(pipe)
    assert torch.equal(case.call(pipe, case.references()), plain)


@pytest.mark.slow
# Not klein-modular: its transformer is klein's, and sees the kept tokens alone
@pytest.mark.parametrize("case", cases(*(name for name in EACH_FAMILY if name != "klein-modular")), indirect=True)
def test_h_compiled_blocks(case, pipe):
    apply_sparse_context(pipe, keep=KEEP)
    plain = case.call(pipe, case.references())
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=not case.references_first, backend="eager")
    assert distance(case.call(pipe, case.references()), plain) < TOLERANCE


@pytest.mark.parametrize("case", cases(*(name for name, c in CASES.items() if c.without_references)), indirect=True)
def test_i_a_call_without_references_is_untouched(case, pipe):
    plain = case.call(case.build(), [])
    apply_sparse_context(pipe, keep=KEEP)
    case.call(pipe, case.references())
    assert last_selection(pipe) is not None
    assert torch.equal(case.call(pipe, []), plain)
    assert last_selection(pipe) is None


def test_the_image_noise_is_not_drawn_from(case, pipe):
    """The pipeline's generator ends in the state that a dense call leaves it in."""
    states = []
    for keep in (1.0, KEEP):
        apply_sparse_context(pipe, keep=keep, selector="random")
        generator = torch.Generator().manual_seed(3)
        case.call(pipe, case.references(), generator=generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def corner(width, height):
    """A mask over the top left quarter."""
    m = np.zeros((height, width), np.uint8)
    m[: height // 2, : width // 2] = 255
    return m


@pytest.mark.parametrize(
    ("case", "by"),
    [
        pytest.param(*p.values, by, marks=p.marks)
        for by, names in {"mask": (), "alpha": EACH_FAMILY, "palette": EACH_FAMILY}.items()
        for p in cases(*names)
    ],
    indirect=["case"],
)
def test_masks_land_on_the_right_tokens(case, pipe, by):
    """Sizes that are no multiple of a token, so that the pipeline crops; and more than a megapixel would be scaled."""
    references = [picture(76, 92, 1), picture(100, 76, 2)][: max(case.counts)]
    masks = [corner(*r.size) for r in references]
    if by != "mask":
        references = [
            Image.merge("RGBA", (*r.split(), Image.fromarray(m))) for r, m in zip(references, masks, strict=True)
        ]
    if by == "palette":
        references = [r.quantize() for r in references]
        assert {r.mode for r in references} == {"P"}
    apply_sparse_context(pipe, keep=0.25, selector=mask(masks) if by == "mask" else "mask", share="equal", coverage=0)
    case.call(pipe, references)
    for kept, reference in zip(last_selection(pipe).references, references, strict=True):
        rows, columns = case.grid(reference)
        assert kept.grid == (rows, columns)
        where = np.argwhere(kept.mask)
        assert where[:, 0].max() <= rows // 2 and where[:, 1].max() <= columns // 2


def test_a_mask_of_another_size_is_refused(case, pipe):
    references = case.references(2)
    masks = [np.zeros((r.height, r.width), bool) for r in references]
    masks[-1] = np.zeros((10, 12), bool)
    apply_sparse_context(pipe, keep=KEEP, selector=mask(masks))
    width, height = references[-1].size
    with pytest.raises(
        ValueError, match=f"mask of reference {len(references)} is 12x10, but its picture is {width}x{height}"
    ):
        case.call(pipe, references)


@pytest.mark.parametrize("selector", ["random", "edges", "mask"])
def test_padding_of_a_lone_reference_scores_lowest(selector):
    """FLUX.3 pads a picture with its reflection, here by 12 pixels a side: one whole token, and half of the next."""
    pipe = CASES["flux3"].build()
    reference = picture(40, 72)
    everywhere = mask([np.full((72, 40), 255, np.uint8)])
    apply_sparse_context(pipe, keep=20, selector=everywhere if selector == "mask" else selector, coverage=0)
    CASES["flux3"].call(pipe, [reference])
    (kept,) = last_selection(pipe).references
    assert kept.grid == (9, 8) and kept.picture.shape[:2] == (72, 64)
    assert kept.scores[:, [0, -1]].max() < 0 <= kept.scores[:, 1:-1].min()
    assert not kept.mask[:, [0, -1]].any()


def test_flux3_blocks_copied_from_a_sparse_pipeline_are_dense():
    case = CASES["flux3"]
    pipe = case.build()
    apply_sparse_context(pipe, keep=KEEP)
    twin = case.share(pipe)
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(case.call(twin, case.references()), case.call(case.build(), case.references()))
    assert last_selection(pipe) is None


@pytest.mark.parametrize("name", cases("kontext", "flux3"))
def test_latents_have_no_pixels_to_look_at(name):
    pipe = CASES[name].build()
    latents = {
        "kontext": {"image": torch.randn(1, 2, 16, 20)},
        "flux3": {"image_cond_latents": [torch.randn(1, 8, 8, 10)]},
    }
    apply_sparse_context(pipe, keep=KEEP, selector="uniform")
    CASES[name].call(pipe, [], **latents[name])
    (kept,) = last_selection(pipe).references
    assert kept.grid == (8, 10) and len(kept.index) == 24 and kept.picture is None
    apply_sparse_context(pipe, keep=KEEP, selector="edges")
    with pytest.raises(ValueError, match="'edges' needs the picture's pixels"):
        CASES[name].call(pipe, [], **latents[name])
    assert last_selection(pipe) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 16, 12), (2, 4, 5, 7), (3, 1, 1, 1)])
def test_pixels_are_turned_to_8_bits_by_rounding_and_clipping(shape, dtype):
    pixels = (1.2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    wanted = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert np.array_equal(to_uint8(pixels), wanted.numpy())
    every = torch.arange(256, dtype=torch.uint8).expand(1, 3, 4, 256)
    assert np.array_equal(to_uint8(every / 127.5 - 1), every.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_a_mask_goes_with_an_array_or_a_tensor(kind):
    case = CASES["kontext-inpaint-source"]
    pipe = case.build()
    pixels = np.asarray(picture(96, 64), np.float32)[None] / 255
    image = pixels if kind == "array" else torch.from_numpy(pixels).permute(0, 3, 1, 2)
    apply_sparse_context(pipe, keep=0.25, selector=mask([corner(96, 64)]), coverage=0)
    case.call(pipe, [picture(96, 64)], image=image)
    (kept,) = last_selection(pipe).references
    assert kept.mask[:4, :6].sum() == kept.mask.sum() == 24


def test_a_mask_follows_the_crop_of_an_inpainted_part():
    """`padding_mask_crop` enlarges the part to paint, 32 of 64 pixels here, and the user's mask with it."""
    case = CASES["kontext-inpaint-source"]
    pipe = case.build()
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda *args: seen.append(last_selection(pipe)))
    apply_sparse_context(pipe, keep=0.5, selector=mask([corner(64, 64)]), coverage=0)
    part = Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), ((8, 24), (8, 24))))
    case.call(pipe, [picture(64, 64)], mask_image=part, padding_mask_crop=0, output_type="pil")
    (kept,) = seen[0].references
    expected = np.zeros((8, 8), bool)
    expected[:6, :6] = True  # of the mask's 32 pixels, 24 are in the part, and each is now two
    assert np.array_equal(kept.scores > 0.5, expected)


@pytest.mark.parametrize("name", cases("kontext", "qwen-edit"))
def test_a_list_of_pictures_is_one_reference_with_another_picture_for_each_output(name):
    case = CASES[name]
    pipe = case.build()
    pictures = [picture(*case.sizes[0]), ImageOps.invert(picture(*case.sizes[0]))]
    apply_sparse_context(pipe, keep=0.25, selector=mask([corner(*case.sizes[0])]))
    both = case.call(pipe, [pictures], prompts=2)
    (kept,) = last_selection(pipe).references
    assert kept.mask[: kept.grid[0] // 2 + 1, : kept.grid[1] // 2 + 1].sum() == kept.mask.sum()
    latents = torch.randn(both.shape, generator=torch.Generator().manual_seed(0))
    both = case.call(pipe, [pictures], prompts=2, latents=latents)
    assert distance(both, case.call(pipe, [pictures[::-1]], prompts=2, latents=latents)) > 1e-4


def test_a_failed_call_leaves_no_hook_on_the_transformer():
    case = CASES["qwen-edit"]
    pipe = case.build()
    apply_sparse_context(pipe, keep=KEEP)

    def fail(*args):
        assert pipe.transformer._forward_pre_hooks
        raise InterruptedError

    with pytest.raises(InterruptedError):
        case.call(pipe, case.references(), callback_on_step_end=fail)
    assert not pipe.transformer._forward_pre_hooks
    assert not pipe.transformer.pos_embed._forward_pre_hooks and not pipe.transformer.pos_embed._forward_hooks


def test_the_text_encoder_sees_the_whole_picture(monkeypatch):
    case = CASES["qwen-edit"]
    seen = []

    def remember_image(encode_prompt, image, **kwargs):
        seen.append(image)
        return encode_prompt(**kwargs)

    for keep in (1.0, KEEP):
        pipe = case.build()
        monkeypatch.setattr(pipe, "encode_prompt", partial(remember_image, pipe.encode_prompt))
        apply_sparse_context(pipe, keep=keep)
        case.call(pipe, case.references())
    assert seen[0] == seen[1]


def test_a_deep_copy_is_independent(case, pipe):
    twin = copy.deepcopy(pipe)
    apply_sparse_context(pipe, keep=KEEP)
    assert last_selection(twin) is None
    with pytest.raises(TypeError, match="cannot be copied.* call remove_sparse_context first"):  # it would run this VAE
        copy.deepcopy(pipe)


@pytest.mark.parametrize("name", cases("qwen-edit", "qwen-edit-2511"))
def test_two_threads_share_a_transformer(name):
    """Both denoise at the same time, one sparse, one dense; each forward waits until the other pipeline is in one."""
    case = CASES[name]
    sparse, dense = case.build(), case.build()
    dense.register_modules(transformer=sparse.transformer)
    apply_sparse_context(sparse, keep=KEEP)
    expected = [case.call(pipe, case.references()) for pipe in (sparse, dense)]
    meet = threading.Barrier(2, timeout=60)
    hook = sparse.transformer.transformer_blocks[0].register_forward_hook(
        lambda *args: args[-1] if meet.wait() else None
    )
    try:
        with ThreadPoolExecutor(2) as threads:
            calls = [threads.submit(case.call, pipe, case.references()) for pipe in (sparse, dense)]
            made = [call.result() for call in calls]
    finally:
        hook.remove()
    assert all(map(torch.equal, made, expected))


SETTINGS = {
    "ratio": {"keep": 0.4},
    "count": {"keep": 30},
    "auto": {"keep": "auto", "mass": 0.5},
    "blend": {"selector": {"saliency": 0.7, "detail": 0.3}, "floor": 3},
    "coverage": {"selector": "edges", "coverage": 0.5, "share": "equal"},
    "task": {"task": "edit", "multiple_of": 4},
    "merge": {"task": "subject", "merge": 0.5},
    "function": {"selector": lambda image, grid, rng: rng.random(grid, dtype=np.float32)},
}


# The report is made by `select_tokens`, before any host: all of it for two cases, one setting for the others
@pytest.mark.parametrize(
    ("case", "settings"),
    [
        pytest.param(*p.values, settings, marks=p.marks)
        for p in cases()
        for settings in (SETTINGS if p.id in ("klein", "qwen-edit-2511") else ["ratio"])
    ],
    indirect=["case"],
)
def test_settings_report_and_previews_are_the_same_everywhere(case, pipe, settings):
    """What is kept is what `select_tokens` keeps of the pictures that the selector saw, and it can be drawn."""
    config = SparseContextConfig(**SETTINGS[settings])
    apply_sparse_context(pipe, config)
    references = case.references()
    case.call(pipe, references)
    selection = last_selection(pipe)
    pictures = [kept.picture for kept in selection.references]
    grids = [kept.grid for kept in selection.references]
    assert grids == [case.grid(reference) for reference in references]
    assert all(
        p.shape[0] % rows == p.shape[1] % columns == 0 for p, (rows, columns) in zip(pictures, grids, strict=True)
    )
    again = select_tokens(pictures, grids, config)
    assert np.array_equal(selection.index, again.index)
    assert selection.to_dict() | {"seconds": 0} == again.to_dict() | {"seconds": 0}
    assert str(selection).startswith(
        f"reference 1: {len(again.references[0].index)} of {grids[0][0] * grids[0][1]} tok"
    )
    assert draw_selection(selection, height=64).height > 64
