"""What is on the screen, and what it comes to: a config, a request, Python, a command, and a file of settings."""

import inspect
import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
from cli.shared import pixels
from PIL import Image
from tiny import picture
from tiny_finders import scene as scene_of

from sparse_context import select_tokens
from sparse_context.app import copies
from sparse_context.app.scene import Reference, Scene
from sparse_context.cli.generate import generate
from sparse_context.pipelines.settings_file import ALL_KEYS, read_settings
from sparse_context.selectors.masks import DROP, KEEP, NEITHER
from sparse_context.trained import Trained


def kept(scene):
    """The kept tokens of each reference of 64 x 64 pixels, bool (8, 8)."""
    images = [np.asarray(each.picture) for each in scene.references]
    images = [
        image if each.painted is None else np.dstack([image, each.painted])
        for image, each in zip(images, scene.references, strict=True)
    ]
    return [each.mask for each in select_tokens(images, [(8, 8)] * len(images), scene.selection_config()).references]


def painted(keep=None, drop=None):
    mask = np.full((64, 64), NEITHER, np.uint8)
    for value, tokens in ((KEEP, keep), (DROP, drop)):
        if tokens is not None:
            rows, columns = tokens
            mask[rows[0] * 8 : rows[1] * 8, columns[0] * 8 : columns[1] * 8] = value
    return mask


# The config ----------------------------------------------------------------------------------------------------------


def test_what_all_references_have_in_common_is_said_once(cat, room):
    config = Scene([cat, room]).selection_config()
    assert (config.keep, config.task, config.selector, config.coverage) == (0.2, "auto", None, None)
    config = Scene([cat, replace(room, keep=0.5, task="edit", selector="edges")]).selection_config()
    assert (config.keep, config.task, config.selector) == ([0.2, 0.5], ["auto", "edit"], [None, "edges"])


def test_one_budget_for_all_goes_before_their_own(cat, room):
    config = Scene(
        [cat, replace(room, keep=0.5)], keep=40, config={"share": "joint", "coverage": 0.3}
    ).selection_config()
    assert (config.keep, config.share, config.coverage) == (40, "joint", 0.3)


def test_a_scene_without_references_is_a_request():
    request = Scene(prompt="the cat", call={"seed": 3, "steps": 2}).request()
    assert (request.prompt, request.references, request.seed, request.steps) == ("the cat", (), 3, 2)


def test_beside_what_is_painted_the_task_chooses_as_its_weights_say(cat):
    named = Scene([replace(cat, task="edit", painted=painted(keep=((0, 2), (0, 4))))])
    mask = named.references[0].painted

    def parts(scene):
        return [part for part, _ in scene.blend_of(scene.references[0]) if part is not mask]

    beside = ["residual", "subject"]
    assert parts(named) == ["edges", "saliency"]
    assert parts(replace(named, config={"overview": 4})) == beside
    assert parts(replace(named, trained=Trained((4,)))) == beside
    assert parts(replace(named, trained=Trained((4,), tasks=("subject",)))) == ["edges", "saliency"]
    assert parts(replace(named, trained=Trained((4,)), config={"overview": None})) == ["edges", "saliency"]


@pytest.mark.parametrize("selector", [None, "uniform", {"edges": 1.0, "random": 3.0}])
@pytest.mark.parametrize("task", ["edit", "subject"])
def test_what_is_painted_goes_before_what_the_selector_says(cat, selector, task):
    mask = painted(keep=((0, 2), (0, 4)), drop=((4, 8), (0, 8)))
    scene = Scene([replace(cat, keep=0.25, task=task, selector=selector, painted=mask)])
    (mask_of,) = kept(scene)
    assert mask_of[:2, :4].all()
    assert not mask_of[4:].any()
    assert mask_of.sum() == 16
    (mask_of,) = kept(Scene([replace(cat, keep=0.75, task=task, selector=selector, painted=mask)]))
    assert mask_of[:4].all() and mask_of[4:].sum() == 16  # a budget is exact: what is to be dropped comes last


def test_a_mask_alone_is_a_selector(cat, room):
    scene = Scene(
        [replace(cat, selector="mask", painted=painted(keep=((6, 8), (6, 8))), keep=4), replace(room, keep=4)]
    )
    first, second = kept(scene)
    assert first[6:, 6:].all()
    assert second.sum() == 4
    assert scene.selection_config().coverage == 0.0


def test_phrases_say_what_is_meant_in_each_reference(cat, clipseg):
    red = replace(cat, picture=scene_of(64, 64, "red"), phrase=" red ", task="subject", keep=0.25)
    blue = replace(red, picture=scene_of(64, 64, "blue"), phrase="blue", selector="text")
    scene = Scene([red, blue, replace(red, phrase=" ")], config={"text_model": str(clipseg)})
    first, second, third = kept(scene)
    assert first[:4, :4].all() and second[:4, :4].all() and first.sum() == second.sum() == 16
    plain = replace(red, phrase="")
    assert np.array_equal(third, kept(Scene([plain] * 3))[2])
    config = scene.selection_config()
    assert (config.phrases, config.selector) == (["red", "blue", None], [None, "text", None])
    assert Scene([red, red]).selection_config().phrases == "red" and Scene([plain]).selection_config().phrases is None
    with pytest.raises(ValueError, match="^phrases is 'red', but selector is 'edges', which reads none"):
        Scene([replace(red, selector="edges")]).selection_config()
    with pytest.raises(ValueError, match="looks for what a phrase names, and there is none"):
        kept(Scene([replace(blue, phrase="")]))


def test_what_is_painted_goes_before_a_phrase(cat, clipseg):
    mask = painted(keep=((6, 8), (6, 8)))
    red = replace(cat, picture=scene_of(64, 64, "red"), phrase="red", task="subject", keep=20, painted=mask)
    (mask_of,) = kept(Scene([red], config={"text_model": str(clipseg)}))
    assert mask_of[6:, 6:].all() and mask_of[:4, :4].all() and mask_of.sum() == 20
    unread = Scene([replace(red, task="global")])
    assert unread.phrases == [None] and unread.selection_config().phrases is None


def test_phrases_are_copied_as_python_as_a_command_and_as_a_file(cat, room):
    scene = Scene([replace(cat, phrase="the red car"), room], "x", config={"text_model": "m"})
    assert "phrases=['the red car', None]" in copies.to_python(scene) and "text_model='m'" in copies.to_python(scene)
    assert "--text 'the red car' \\\n    --text none" in copies.to_command(scene)
    assert "--text-model m" in copies.to_command(scene)
    assert json.loads(copies.to_json(scene))["phrases"] == ["the red car", None]
    assert "--text" not in copies.to_command(Scene([cat, room], "x"))


# Python, the command, and the file -----------------------------------------------------------------------------------


def scenes(spec):
    cat, room = Reference("cat.png", picture(64, 64, 0)), Reference("my room's.png", picture(96, 64, 1))
    mask = np.full((64, 96), NEITHER, np.uint8)
    mask[:32], mask[32:, 48:] = KEEP, DROP
    return {
        "plain": Scene([cat], 'the cat\'s "hat"', spec),
        "none": Scene((), "the cat", spec),
        "own": Scene(
            [replace(cat, task="edit", keep="auto"), replace(room, selector={"edges": 0.3, "random": 0.6}, keep=0.5)],
            "the cat",
            spec,
            call={"seed": 7, "steps": 1},
        ),
        "painted": Scene([replace(cat, task="subject"), replace(room, task="edit", painted=mask)], "the cat", spec),
        "painted, by a file": Scene(
            [replace(cat, task="subject"), replace(room, task="edit", painted=mask)],
            "cat",
            spec,
            config={"multiple_of": 8},
        ),
        "painted, of one stem": Scene(
            [replace(cat, painted=mask[:, :64]), replace(room, name="cat.bmp", painted=mask)], "the cat", spec
        ),
        "budget": Scene([cat, room], "the cat", spec, 40, {"share": "joint", "overview": 4, "multiple_of": 8}),
    }


@pytest.fixture(params=["plain", "none", "own", "painted", "painted, by a file", "painted, of one stem", "budget"])
def scene(request, spec, tmp_path, monkeypatch):
    """A scene, in a folder with its files as they are downloaded."""
    scene = scenes(spec)[request.param]
    monkeypatch.chdir(tmp_path)
    for each in scene.references:
        each.picture.save(each.name)
        if each.painted is not None:
            Image.fromarray(each.painted).save(copies.mask_name(each.name))
    (tmp_path / copies.SETTINGS_FILE).write_text(copies.to_json(scene), encoding="utf-8")
    return scene


def test_the_same_as_python(scene, engine):
    names = {}
    exec(copies.to_python(scene), names)
    expected = engine(scene.request())
    assert np.array_equal(pixels("out.png"), np.asarray(expected.image))
    assert names["generation"].selection is None or np.array_equal(
        names["generation"].selection.index, expected.selection.index
    )


def test_the_same_as_a_command(scene, engine, monkeypatch):
    from sparse_context.cli import main

    command = copies.to_command(scene).replace("\\\n", "")
    monkeypatch.setattr("sys.argv", shlex.split(command))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert np.array_equal(pixels("out.png"), np.asarray(engine(scene.request()).image))


def test_the_same_as_a_file_of_settings(scene, tmp_path):
    settings, request = read_settings(tmp_path / copies.SETTINGS_FILE), scene.request()
    assert settings.spec == scene.spec
    if all(each.painted is None for each in scene.references):
        assert replace(settings.request, references=request.references) == request


def test_what_is_there_by_default_is_not_written(cat):
    assert "selector" not in copies.to_python(Scene([cat])) and "task" not in copies.to_python(Scene([cat]))
    assert copies.to_command(Scene([cat], "a hat")) == (
        "sparse-context generate --image cat.png \\\n    --prompt 'a hat' \\\n    --keep 0.2\n"
    )


def test_what_the_command_has_no_option_for_is_known():
    assert copies.WITHOUT_OPTION == set(ALL_KEYS) - set(inspect.signature(generate).parameters)
