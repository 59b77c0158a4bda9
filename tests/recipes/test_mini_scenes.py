"""The scenes that the embedded model learns from: what a seed draws, and what each task shows."""

import re
from dataclasses import replace

import cv2
import numpy as np
import pytest
from transformers import Qwen2Tokenizer

from recipes.mini.base import SIDES
from recipes.mini.loss import tokenise
from recipes.mini.samples import scene_samples, tasks_of
from recipes.mini.scenes import COLOURS, HALVES, PLACES, SHOWS, SUBJECTS, TASKS, TOKEN, draw_scene, make_scene
from sparse_context.pipelines.embedded import WEIGHTS


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


@pytest.mark.parametrize(
    "task, prompt, mean, source",
    [
        ("edit_background", "Make the background plain black.", 24.52, 12788),
        ("edit_object", "Make the object black.", 84.99, 32640),
        ("edit_named", "Change the background to black, keep the object at the bottom.", 25.14, 5400),
        ("edit_global", "Posterise the picture.", 90.35, 32640),
        ("edit_remove", "Leave only the background.", 116.54, -256),
        ("subject_place", "Put the object of image 1 on purple to black, at the bottom right.", 75.12, 12006),
        ("subject_scale", "Put the object of image 1 on yellow, at the bottom right.", 165.96, -256),
        ("subject_pair", "Image 1's object on the left, image 2's on the right, green background.", 100.24, 37792),
        ("subject_scene", "Put the object of image 1 into image 2.", 125.72, 157776),
        (
            "subject_quarters",
            "On blue, the objects 1 top left, 2 bottom left, 3 top right, 4 bottom right.",
            112.2,
            132309,
        ),
    ],
)
def test_a_seed_stays_the_scene_that_it_was(assets, task, prompt, mean, source):
    """Figures are published of seeds: whatever kinds come in, they draw what they drew."""
    scene = make_scene(assets, task, 7)
    assert (scene.prompt, scene.source.sum()) == (prompt, source)
    assert scene.target.mean() == pytest.approx(mean, abs=0.2)  # other builds of OpenCV round otherwise


def test_prompts_are_words_that_the_embedded_model_reads_whole(assets):
    """None is cut off at its 32 tokens, and where one of two objects is named, a word is a token."""
    tokenizer = Qwen2Tokenizer.from_pretrained(WEIGHTS / "tokenizer")
    for task in TASKS:
        prompts = sorted({make_scene(assets, task, seed).prompt for seed in range(60)})
        ids, attends = tokenise(tokenizer, prompts)
        whole = tokenizer([tokenizer.apply_chat_template([{"content": p}], tokenize=False) for p in prompts])
        assert [int(n) for n in attends.sum(1)] == [len(each) for each in whole["input_ids"]], task
        if task == "edit_named":
            counts = [len(re.findall(r"\w+|[.,]", prompt)) for prompt in prompts]
            assert [len(each) for each in tokenizer(prompts)["input_ids"]] == counts


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


def test_of_two_objects_the_named_one_stays_and_nothing_else(assets):
    """Objects of two colours: where the prompt says that the named one is, and in which half the other."""
    objects = np.zeros((2, 128, 128, 4), np.uint8)
    objects[:, 8:120, 8:120] = [[[[255, 0, 0, 255]]], [[[0, 255, 0, 255]]]]
    named = set()
    for seed in range(24):
        scene = make_scene(replace(assets, objects=objects), "edit_named", seed)
        (named_mask,), (other,) = scene.reference_masks, scene.distractors
        assert np.array_equal(named_mask, scene.mask) and not ((named_mask > 0) & (other > 0)).any()
        word = re.search("left|right|top|bottom", scene.prompt)[0]
        axis = next(axis for axis, words in enumerate(HALVES) if word in words)
        half = HALVES[axis].index(word)
        named.add(word)
        for mask, side in ((named_mask, half), (other, 1 - half)):
            (places,) = np.nonzero((mask > 0).any(axis))
            assert mask.sum() > 500 and set(places // 64) == {side}
        colour = next(rgb for name, rgb in COLOURS.items() if name in scene.prompt)
        inside, outside = scene.mask > 0.999, scene.mask == 0
        assert np.abs(scene.target[inside].astype(int) - scene.references[0][inside]).max() <= 1
        assert np.abs(scene.target[outside].astype(int) - colour).max() <= 1
        assert set(np.unique(scene.references[0][other > 0.999].max(-1))) <= {254, 255}  # there, and in no shadow
    assert named == {"left", "right", "top", "bottom"}


def test_only_where_one_object_is_named_there_is_another(assets):
    assert [task for task in TASKS if make_scene(assets, task, 1).distractors] == ["edit_named"]


def cut(picture):
    """(rows * columns, 8, 8, ...): the tokens of a picture, row by row."""
    rows, columns = (side // TOKEN for side in picture.shape[:2])
    cells = picture.reshape(rows, TOKEN, columns, TOKEN, *picture.shape[2:]).swapaxes(1, 2)
    return cells.reshape(rows * columns, TOKEN, TOKEN, *picture.shape[2:])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("task", [t for t in SUBJECTS if t != "subject_scale"] + ["edit_background", "edit_named"])
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


def test_a_scene_of_a_photograph_alone_has_nothing_in_it(assets):
    scenes = [make_scene(assets.without_objects(), "edit_global", seed) for seed in range(8)]
    assert not any(scene.mask.any() or scene.reference_masks[0].any() for scene in scenes)
    assert any(make_scene(assets, "edit_global", seed).mask.any() for seed in range(8))


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


def test_objects_move_no_farther_than_they_may(assets):
    for seed in range(6):
        scene = draw_scene(assets, "subject_place", np.random.default_rng(seed), 128, reach=1)
        here, there = (np.argwhere(mask > 0.5).mean(0) for mask in (scene.mask, scene.reference_masks[0]))
        assert np.abs(here - there).max() <= TOKEN + 1e-6


def test_unknown_tasks_are_named(assets):
    with pytest.raises(ValueError, match="'paint'.*edit_background"):
        make_scene(assets, "paint", 0)


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
    assert tasks_of(make_scene(assets, "edit_named", 0)) == ["edit"]
    assert tasks_of(by_kind["subject_place"]) == ["subject"]
    assert tasks_of(by_kind["subject_scene"]) == ["subject", "edit"]
