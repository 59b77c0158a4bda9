"""The patch by its contract with ComfyUI, with plain tensors."""

import functools

import numpy as np
import pytest
import torch
from sparse_context_nodes.choosing import References, Settings
from sparse_context_nodes.patch import COUNTS, NO_REFERENCES

from sparse_context.trained import Trained

from .host import OUTPUT, WIDTH, Executor, Host, grid_ids, latents, make_patch, numbers

GRIDS = [(4, 4), (4, 6)]
RANDOM = Settings(keep=0.25, selector="random", seed=5)


def kept_numbers(patch):
    """What the selection says is kept: the host's numbers of the tokens."""
    return [1000 * (i + 1) + int(n) for i, kept in enumerate(patch.last.selections[-1].references) for n in kept.index]


def ids_of(number):
    """The position ids that the host gave the token with this number."""
    if number < 1000:
        return grid_ids(0, (3, 4))[number]
    return grid_ids(10 * (number // 1000), GRIDS[number // 1000 - 1])[number % 1000]


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_ids_and_counts_are_cut_together_and_in_order(batch):
    patch = make_patch(RANDOM)
    seen = Host(patch)(latents(*GRIDS), batch)
    left, ids = numbers(seen)
    assert left == [*range(OUTPUT), *kept_numbers(patch)]
    assert left[OUTPUT:] == sorted(left[OUTPUT:])
    assert torch.equal(ids, torch.stack([ids_of(number) for number in left]))
    assert seen.transformer_options[COUNTS] == [4, 6]
    assert seen.img.shape == (batch, OUTPUT + 10, WIDTH)
    assert torch.equal(seen.img, seen.img[:1].expand(batch, -1, -1))


def test_text_is_left_alone():
    host = Host(make_patch(RANDOM))
    seen = host(latents(*GRIDS))
    assert seen.txt is host.given["txt"]
    assert seen.txt_ids is host.given["txt_ids"]


def test_keeping_all_leaves_the_very_tensors():
    host = Host(make_patch(Settings(keep=1.0)))
    seen = host(latents(*GRIDS))
    assert seen.img is host.given["img"]
    assert seen.img_ids is host.given["img_ids"]
    assert seen.transformer_options[COUNTS] == [16, 24]


def test_with_keys_and_values_reused_only_ids_and_counts_are_cut():
    """FluxKVCache, put on before this patch, has cut the references' tokens on later steps, and not their ids."""
    patch = make_patch(RANDOM)
    seen = Host(patch, cache={"double_0": "keys"}, cut_before=True)(latents(*GRIDS))
    left, ids = numbers(seen)
    assert left == [*range(OUTPUT)]
    assert torch.equal(ids, torch.stack([ids_of(number) for number in [*left, *kept_numbers(patch)]]))
    assert seen.transformer_options[COUNTS] == [4, 6]
    assert [forward.reuses for forward in patch.last.forwards] == [True]


def test_the_first_step_of_reuse_is_a_whole_one():
    patch = make_patch(RANDOM)
    assert len(numbers(Host(patch, cache={})(latents(*GRIDS)))[0]) == OUTPUT + 10
    assert [forward.reuses for forward in patch.last.forwards] == [False]


def test_steps_and_conditionings_share_one_selection():
    """Guidance runs the two prompts in one forward, or one after another: their references are the same tokens."""
    patch = make_patch(RANDOM)
    host = Host(patch)
    first = numbers(host(latents(*GRIDS), batch=2))[0]
    assert numbers(host(latents(*GRIDS)))[0] == first
    assert len(patch.last.selections) == 1
    assert sum(patch.last.forwards.values()) == 2


def test_a_conditioning_without_references_is_untouched():
    patch = make_patch(RANDOM)
    host = Host(patch)
    host(latents(*GRIDS))
    seen = host(None)
    assert numbers(seen)[0] == [*range(OUTPUT)]
    assert COUNTS not in seen.transformer_options


def test_a_conditioning_with_other_references_has_a_selection_of_its_own():
    patch = make_patch(RANDOM)
    host = Host(patch)
    assert len(numbers(host(latents(*GRIDS)))[0]) == OUTPUT + 10
    assert len(numbers(host(latents((4, 4))))[0]) == OUTPUT + 4
    assert [selection.total for selection in patch.last.selections] == [40, 16]


def test_latents_choose_anew_in_each_run():
    """By the detail of the latents; they may be of another picture the next time."""
    patch = make_patch(Settings(keep=0.25, selector="detail"))
    host = Host(patch)
    runs = []
    for seed in (0, 0, 1):
        patch.run(lambda seed=seed: host(latents((4, 4), seed=seed)))
        runs.append(kept_numbers(patch))
    assert runs[0] == runs[1] != runs[2]


def test_latents_of_other_references_choose_for_themselves_within_a_run():
    """Two conditionings may have references of one size, and steps go from one to the other."""
    settings = Settings(keep=0.25, selector="detail")
    alone = [numbers(Host(make_patch(settings))(latents((4, 4), seed=seed)))[0] for seed in (0, 1)]
    host = Host(make_patch(settings))
    assert [numbers(host(latents((4, 4), seed=seed)))[0] for seed in (0, 1, 0, 1)] == alone * 2
    assert alone[0] != alone[1] and len(host.patch.last.selections) == 2


def test_each_reference_has_its_own_budget():
    seen = Host(make_patch(Settings(keep_each="0.5, 3", selector="uniform")))(latents(*GRIDS))
    assert seen.transformer_options[COUNTS] == [8, 3]


# Overviews ------------------------------------------------------------------------------------------------------------


def test_an_overview_joins_behind_as_a_further_reference():
    patch = make_patch(Settings(keep=0.5, selector="uniform", overview=4))
    seen = Host(patch)(latents(*GRIDS))
    left, ids = numbers(seen)
    assert [tuple(each.shape[-2:]) for each in seen.latents] == [(4, 4), (4, 6), (1, 1), (1, 2)]
    assert seen.transformer_options[COUNTS] == [7, 10, 1, 2]
    assert left[-3:] == [3000, 4000, 4001]
    assert ids[-3:, 0].tolist() == [30, 40, 40]  # as the host has them


def test_an_overview_that_was_trained_lies_over_its_reference():
    patch = make_patch(Settings(keep=0.5, selector="uniform"), trained=Trained((4,), "spread"))
    _, ids = numbers(Host(patch)(latents(*GRIDS)))
    assert ids[-3:].tolist() == [[12, 1.5, 1.5, 0], [22, 1.5, 1.5, 0], [22, 1.5, 5.5, 0]]


def test_weights_that_know_no_overviews_get_none():
    assert Host(make_patch(RANDOM))(latents(*GRIDS)).transformer_options[COUNTS] == [4, 6]


def test_latents_of_a_vae_go_before_averages_where_they_fit():
    patch = make_patch(Settings(keep=0.5, selector="uniform", overview=4))
    patch.coarse = {0: torch.full((1, 128, 1, 1), 7.0), 1: torch.full((1, 128, 2, 2), 7.0)}
    given = latents(*GRIDS, batch=2)
    seen = Host(patch)(given, batch=2)
    assert torch.equal(seen.latents[2], torch.full((2, 128, 1, 1), 7.0))
    assert seen.latents[3].shape == (2, 128, 1, 2)  # the other is of another size: averaged
    assert not (seen.latents[3] == 7).any()


# What is told ---------------------------------------------------------------------------------------------------------


def picture(rows, columns):
    return [np.zeros((16 * rows, 16 * columns, 3), np.uint8)]


@pytest.mark.parametrize(
    ("references", "sentence"),
    [
        (
            References([picture(4, 4)]),
            "You connected 1 image, but the model got 2 references: connect one image for each reference, in the "
            "same order, or none at all. Nothing was dropped.",
        ),
        (
            References([picture(4, 4), picture(6, 4)]),
            "The image or mask of reference 2 is 64x96 pixels, but the reference has 6x4 tokens, which is another "
            "shape: connect the very image that is encoded, after any crop. Nothing was dropped.",
        ),
        (
            References(painted={2: np.zeros((64, 64), np.uint8)}),
            "A mask is for reference 3, but the model got 2 references: change the number in Sparse Context "
            "Mask. Nothing was dropped.",
        ),
    ],
)
def test_what_does_not_fit_is_said_once_and_nothing_is_dropped(references, sentence):
    told = []
    patch = make_patch(Settings(), references, told=told)
    host = Host(patch)
    for _ in range(2):
        seen = host(latents(*GRIDS))
        assert len(numbers(seen)[0]) == OUTPUT + 40
        assert seen.img is host.given["img"]
    assert told == patch.last.problems == [sentence]


def test_a_run_without_references_says_so():
    told = []
    patch = make_patch(Settings(), told=told)
    host = Host(patch)
    assert patch.run(lambda: "the answer") == "the answer"
    patch.run(lambda: host(None))
    assert told == [NO_REFERENCES, NO_REFERENCES]
    patch.run(lambda: host(latents(*GRIDS)))
    assert len(told) == 2


def test_a_video_is_no_reference():
    told = []
    host = Host(make_patch(Settings(), kind="qwen_image", told=told))
    host.patch.forward(Executor(lambda x, ref_latents: None), None, [torch.zeros(1, 16, 3, 8, 8)])
    assert told == ["A reference is a video, and this node takes still images. Nothing was dropped."]


def test_a_model_that_makes_other_tokens_is_left_alone():
    told = []
    patch = make_patch(RANDOM, told=told)
    host = Host(patch)
    host.patch.patch = 2  # the patch takes the model's tokens for larger than they are
    forward_of_host = host._forward

    @functools.wraps(forward_of_host)
    def forward(*args, **kwargs):
        host.patch.patch = 1
        return forward_of_host(*args, **kwargs)

    host._forward = forward
    assert len(numbers(host(latents((4, 4))))[0]) == OUTPUT + 16
    assert told == [
        "The model made [16] tokens of its references and [4] were expected: report this with the name of the model. "
        "Nothing was dropped."
    ]
