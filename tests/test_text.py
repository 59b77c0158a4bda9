"""Selecting by a phrase, with tiny real models: where it is, what the tasks make of it, and what is wrong with it."""

import importlib.util
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import CASES, EACH_FAMILY, cases, embeds, run
from tiny_finders import WEIGHTS, save_grounding_dino, save_owlv2, save_sam3, scene
from transformers import BertConfig

from sparse_context import SELECTORS, SparseContextConfig, apply_sparse_context, last_selection, select_tokens, text
from sparse_context.cache import ReferenceCache
from sparse_context.preview import KEPT_COLOUR, PHRASE_COLOUR, draw_kept, draw_selection
from sparse_context.selectors.finders import DEFAULT, locate
from sparse_context.selectors.registry import blend, name_of
from sparse_context.selectors.subject import with_rim
from sparse_context.selectors.text import OUTSIDE, WHERE, Place, Text

GRID = (8, 8)


def pixels(width=64, height=64, colour="red", seed=0):
    return np.asarray(scene(width, height, colour, seed))


def corner(grid=GRID):
    rows, columns = grid
    quarter = np.zeros(grid, bool)
    quarter[: rows // 2, : columns // 2] = True
    return quarter


@pytest.fixture(scope="module")
def select(clipseg):
    """Select of pictures with one colour in the corner."""

    def selected(count=1, pictures=None, grids=None, **settings):
        pictures = pictures or [pixels(seed=i) for i in range(count)]
        config = SparseContextConfig(**{"keep": 0.25, "text_model": str(clipseg), **settings})
        return select_tokens(pictures, grids or [GRID] * len(pictures), config)

    return selected


def scores_of(selector, image, grid=GRID):
    return selector(image, grid, np.random.default_rng(0))


# Where it is ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "grid"), [((64, 64), (8, 8)), ((96, 64), (8, 12)), ((64, 160), (20, 8))])
@pytest.mark.parametrize("colour", ["red", "blue"])
def test_a_marked_corner_scores_in_its_own_tokens(clipseg, size, grid, colour):
    image = pixels(*size, colour)
    found = scores_of(Text(colour, str(clipseg), WHERE), image, grid)
    assert found.shape == grid and found.dtype == np.float32
    assert np.array_equal(found > 0.5, corner(grid))
    other = "blue" if colour == "red" else "red"
    assert not scores_of(Text(other, str(clipseg), WHERE), image, grid).any()


@pytest.mark.parametrize("case", cases(*EACH_FAMILY))
def test_a_marked_corner_ends_in_the_marked_tokens_of_every_family(case, clipseg):
    """Sizes that are no multiple of a token, so that the pipeline crops or scales."""
    case = CASES[case]
    pipe = case.build()
    references = [scene(76, 92, seed=1), scene(100, 76, seed=2)][: max(case.counts)]
    apply_sparse_context(pipe, keep=0.25, phrases="red", text_model=str(clipseg), task="subject")
    case.call(pipe, references)
    for kept, reference in zip(last_selection(pipe).references, references, strict=True):
        rows, columns = case.grid(reference)
        assert kept.grid == (rows, columns) and kept.selector == "phrase 'red'"
        where = np.argwhere(kept.mask)
        assert where[:, 0].max() <= rows // 2 and where[:, 1].max() <= columns // 2
        assert len(where) > rows * columns / 5


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float32, "float32")])
def test_the_model_has_the_type_and_the_place_of_the_pipeline(dtype, name, clipseg, monkeypatch):
    pipe = CASES["klein"].build().to(dtype)
    seen = []
    ask = Text.__call__
    monkeypatch.setattr(Text, "__call__", lambda self, *args: (seen.append(self), ask(self, *args))[1])
    apply_sparse_context(pipe, keep=0.25, phrases="red", text_model=str(clipseg))
    prompt = embeds().to(dtype)
    run(pipe, prompt_embeds=prompt, image=[scene(64, 64)], height=64, width=64, guidance_scale=1.0)
    assert {each.place for each in seen} == {Place("cpu", name)}
    loaded = seen[0].finder().find.__closure__
    model = next(cell.cell_contents for cell in loaded if isinstance(cell.cell_contents, torch.nn.Module))
    assert model.dtype == dtype
    assert np.array_equal(last_selection(pipe).references[0].found > 0.5, corner())


# What the tasks make of it --------------------------------------------------------------------------------------------


def test_a_subject_keeps_what_is_inside(select):
    selection = select(phrases="red", task="subject")
    assert np.array_equal(selection.references[0].mask, corner())
    assert (selection.coverage, selection.references[0].selector) == ((0.0,), "phrase 'red'")
    found = selection.references[0].found
    edges = scores_of(SELECTORS["edges"], pixels())
    assert np.array_equal(selection.references[0].scores, with_rim(found, edges))
    more = select(phrases="red", task="subject", keep=0.4).references[0].mask  # 25 tokens: the corner, and its rim
    assert (more[corner()]).all() and more[:5, :5].all()


def test_the_source_of_an_edit_keeps_what_is_outside_and_the_inside_coarsely(select):
    selection = select(phrases="red", task="edit", keep=0.75, coverage=0)
    assert np.array_equal(selection.references[0].mask, ~corner())
    selection = select(phrases="red", task="edit", keep=0.7)
    (kept,) = selection.references
    assert selection.coverage == (0.1,)
    assert kept.selector == "0.5 outside 'red' + 0.25 edges + 0.25 saliency"
    assert kept.mask[corner()].sum() == 1  # of the 4 that are spread evenly, a quarter falls there
    overview = select(phrases="red", task="edit", keep=0.75, overview=4).references[0]
    assert overview.selector == "0.5 outside 'red' + 0.5 residual" and overview.overview is not None
    assert not overview.mask[corner()].any()


def test_an_edit_of_the_whole_picture_ignores_it_and_says_so(select):
    plain, ignored = select(task="global"), select(task="global", phrases="red")
    assert np.array_equal(plain.index, ignored.index) and ignored.references[0].found is None
    assert "an edit of the whole picture ignores the phrase 'red' of reference 1" in str(ignored)
    blended = select(task="global", phrases="red", selector={"text": 0.5, "edges": 0.25, "detail": 0.25})
    assert blended.references[0].selector == "0.5 edges + 0.5 detail"
    assert select(task="global", phrases="red", overview=4).references[0].selector == "residual"


def test_one_reference_is_taken_for_the_source_of_an_edit_and_the_report_says_so(select):
    said = "reference 1 is taken for the source of an edit, so what is outside 'red' is kept: pass task='subject'"
    one = select(phrases="red", coverage=0, keep=0.75)
    assert np.array_equal(one.references[0].mask, ~corner()) and said in str(one)
    assert said not in str(select(phrases="red", task="edit")) and said not in str(select(phrases="red", keep=1))
    two = select(2, phrases="red")
    assert all(np.array_equal(kept.mask, corner()) for kept in two.references) and "is taken" not in str(two)


def test_each_reference_has_its_own_phrase_or_none(select):
    pictures = [pixels(), pixels(colour="blue", seed=1), pixels(seed=2)]
    selection = select(pictures=pictures, phrases=["red", "blue", None])
    assert all(np.array_equal(kept.mask, corner()) for kept in selection.references[:2])
    plain = select(pictures=pictures).references[2]
    assert np.array_equal(selection.references[2].index, plain.index) and selection.references[2].phrase is None
    assert [kept.phrase for kept in selection.references] == ["red", "blue", None]
    record = selection.to_dict()["references"]
    assert record[0]["phrase"] == "red" and record[0]["found"] is True and "phrase" not in record[2]


def test_three_ways_to_say_it_are_one(select, clipseg):
    named = text("red", str(clipseg))
    ways = [{"phrases": "red"}, {"phrases": "red", "selector": "text"}, {"selector": named}, {"selector": [named]}]
    for task in ("subject", "edit"):
        first, *others = (select(task=task, **way) for way in ways)
        for other in others:
            assert np.array_equal(first.references[0].scores, other.references[0].scores)
            assert (first.references[0].selector, first.coverage) == (other.references[0].selector, other.coverage)
    several = text(["red", None], str(clipseg))
    both = select(2, selector=several)
    assert np.array_equal(both.references[0].mask, corner()) and both.references[1].selector == "subject"


@pytest.mark.parametrize("other", ["edges", "residual", "saliency"])
@pytest.mark.parametrize("task", ["subject", "edit"])
def test_it_blends_with_the_others(select, other, task):
    image = pixels()
    (kept,) = select(phrases="red", selector={"text": 3, other: 1}, task=task).references
    alone = scores_of(SELECTORS[other], image)
    own = 1 - kept.found if task == "edit" else with_rim(kept.found, scores_of(SELECTORS["edges"], image))
    assert np.allclose(kept.scores, 0.75 * own + 0.25 * alone, atol=1e-6)
    assert kept.selector == f"0.75 {'outside' if task == 'edit' else 'phrase'} 'red' + 0.25 {other}"
    nested = {blend({"text": 1.0, other: 1.0}): 0.5, "detail": 0.5}
    assert select(phrases="red", selector=nested, task=task).references[0].found.any()


def test_the_pictures_of_a_batch_are_each_asked(select):
    red, blue = pixels(), pixels(colour="blue")
    (kept,) = select(pictures=[[red, blue]], phrases="red", task="subject").references
    (alone,) = select(phrases="red", task="subject").references
    assert np.allclose(kept.found, alone.found / 2) and np.array_equal(kept.mask, corner())


# A phrase that is nowhere ---------------------------------------------------------------------------------------------


def test_what_is_nowhere_in_the_picture_spreads_evenly_and_says_so(select):
    selection = select(phrases="green", task="subject")
    assert np.array_equal(selection.index, select(selector="uniform").index)
    assert "'green' is nowhere in reference 1, so its tokens are spread evenly" in str(selection)
    assert selection.to_dict()["references"][0]["found"] is False
    edit = select(phrases="green", task="edit")
    assert np.array_equal(edit.index, select(task="edit").index)
    assert "'green' is nowhere in reference 1, so the other parts of its selector decide" in str(edit)
    assert "nowhere" not in str(select(phrases="red", task="subject"))


# Drawing --------------------------------------------------------------------------------------------------------------


def test_a_drawing_shows_the_phrase_and_what_it_names(select):
    (kept,) = select(phrases="red", task="edit").references
    large = np.kron(kept.picture, np.ones((4, 4, 1), np.uint8))
    drawn, plain = (np.asarray(draw_kept(large, each)) for each in (kept, replace(kept, phrase=None, found=None)))
    changed = (drawn != plain).any(-1)
    framed = (drawn == PHRASE_COLOUR).all(-1)
    assert framed.any() and not (plain == PHRASE_COLOUR).all(-1).any()
    assert not changed[144:].any() and not changed[:, 144:].any()  # the corner of 128 pixels, and half a token
    assert framed[60:120, 110:144].any() and framed[110:144, 60:120].any()  # its right and lower sides
    tag = changed[:20, :40]
    assert tag.mean() > 0.5
    assert (plain == KEPT_COLOUR).all(-1).any()
    (nothing,) = select(phrases="green", task="subject").references
    drawn = np.asarray(draw_kept(large, nothing))
    plain = np.asarray(draw_kept(large, replace(nothing, phrase=None, found=None)))
    assert not (drawn != plain).any(-1)[30:].any() and (drawn != plain).any(-1)[:30].any()
    assert draw_selection(select(phrases="red")).height > 384


# The model ------------------------------------------------------------------------------------------------------------


def test_the_model_is_loaded_once_for_each_state_of_its_files(clipseg, tmp_path):
    folder = shutil.copytree(clipseg, tmp_path / "copy")
    first = Text("red", str(folder))
    assert first.finder() is replace(first, phrases="blue", role=OUTSIDE).finder()
    names = {first.name, replace(first, phrases="blue").name, replace(first, role=OUTSIDE).name}
    names |= {replace(first, place=Place("cpu", "bfloat16")).name}
    assert len(names) == 4 and name_of(first) == first.name and replace(first, found=np.zeros(GRID)).name == first.name
    loaded = first.finder()
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert first.finder() is not loaded and first.name not in names


def test_asking_draws_from_nobody_s_generator(clipseg):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    scores_of(Text("red", str(clipseg), place=Place("cpu", "float16")), pixels())  # which is loaded now
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


def test_threads_do_not_disturb_each_other(clipseg):
    wanted = {colour: scores_of(Text(colour, str(clipseg)), pixels()) for colour in ("red", "blue")}
    with ThreadPoolExecutor(4) as pool:
        asked = ["red", "blue"] * 4
        for colour, scores in zip(
            asked, pool.map(lambda each: scores_of(Text(each, str(clipseg)), pixels()), asked), strict=True
        ):
            assert np.array_equal(scores, wanted[colour])


def test_a_cache_remembers_what_the_model_said(clipseg, monkeypatch):
    cache, asked = ReferenceCache(), []
    find = Text._find
    monkeypatch.setattr(Text, "_find", lambda self, *args: (asked.append(self.phrases), find(self, *args))[1])

    def selected(**settings):
        config = SparseContextConfig(keep=0.25, text_model=str(clipseg), **settings)
        return select_tokens([pixels()], [GRID], config, score=cache.score)

    first, again = selected(phrases="red", task="subject"), selected(phrases="red", task="subject")
    assert asked == ["red"] and np.array_equal(first.index, again.index)
    assert again.references[0].found.any()
    edit = selected(phrases="red", task="edit")
    assert asked == ["red"] and not np.array_equal(first.index, edit.index)
    selected(phrases="blue", task="edit")
    assert asked == ["red", "blue"]


def test_without_a_model_the_sentence_says_what_to_download(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError) as told:
        select_tokens([pixels()], [GRID], SparseContextConfig(phrases="red"))
    assert str(told.value) == (
        "There is no model here that finds phrases: name one as text_model (--text-model), either "
        "CIDAS/clipseg-rd64-refined, which is downloaded then (603 MB, Apache-2.0), or the folder of a CLIPSeg, OWLv2, "
        "Grounding DINO or SAM 3."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [None, DEFAULT])
def test_a_model_in_the_hub_s_cache_needs_no_hub(name, clipseg, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / f"models--{DEFAULT.replace('/', '--')}"
    commit = "a" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(clipseg, repository / "snapshots" / commit)
    found = scores_of(Text("red", name, WHERE), pixels())
    assert np.array_equal(found > 0.5, corner())
    assert commit in locate(name)[0]
    (repository / "snapshots" / commit / "model.safetensors").unlink()  # as after a download that was cut short
    with pytest.raises(ValueError, match="There is no model here|the hub does not provide it"):
        locate(name)


def test_a_hub_id_out_of_reach_is_one_sentence(impatient):
    with pytest.raises(ValueError, match="^The model nobody/nothing is not a local folder, and the hub does not"):
        locate("nobody/nothing")
    with pytest.raises(
        ValueError, match="^The model nothing is no folder: pass one that holds a config.json, or a hub"
    ):
        locate("nothing")


def test_a_folder_of_another_kind_is_refused(clipseg, tmp_path):
    with pytest.raises(ValueError, match=f"^The model {tmp_path} has no config.json that can be read"):
        Text("red", str(tmp_path)).finder()
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of type 'bert', which finds no phrases: pass one of clipseg, owlv2"):
        Text("red", str(tmp_path)).finder()
    pickled = shutil.copytree(clipseg, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"^The model {pickled} does not load: "):
        Text("red", str(pickled)).finder()


def test_a_phrase_longer_than_the_model_reads_is_refused(clipseg):
    with pytest.raises(ValueError, match="^The phrase 'a+' has 22 tokens, and its model reads 16: write a shorter one"):
        scores_of(Text("a" * 20, str(clipseg)), pixels())


# Other models ---------------------------------------------------------------------------------------------------------

needs_scipy = pytest.mark.skipif(
    importlib.util.find_spec("scipy") is None, reason="OWLv2's image processor needs scipy"
)


@needs_scipy
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 128)])
def test_boxes_of_owlv2_lie_where_they_are_in_the_picture(size, tmp_path):
    """It pads a picture to a square, of 8 x 8 patches here. Its boxes begin in the middle of the first red patch."""
    save_owlv2(tmp_path)
    side = max(size)
    flat = np.full((size[1], size[0], 3), 128, np.uint8)
    flat[: side // 4, : side // 4] = (220, 30, 30)  # two patches a side
    found = Text("red", str(tmp_path)).finder()(flat, "red")
    expected = np.zeros(size[::-1], np.float32)
    expected[side // 16 : side * 5 // 16, side // 16 : side * 5 // 16] = 1
    assert np.array_equal(found, expected)
    assert not Text("red", str(tmp_path)).finder()(np.full_like(flat, 128), "red").any()


def test_boxes_of_grounding_dino_lie_where_they_are_in_the_picture(tmp_path):
    save_grounding_dino(tmp_path)
    finder = Text("red car", str(tmp_path)).finder()
    said = []
    model = next(c.cell_contents for c in finder.find.__closure__ if isinstance(c.cell_contents, torch.nn.Module))
    model.register_forward_hook(lambda module, args, output: said.append(output))
    image = pixels(96, 64)
    found = finder(image, "red. car")  # a full stop would make two phrases of it
    expected = np.zeros((64, 96), np.float32)
    for (x, y, width, height), logits in zip(said[0].pred_boxes[0].tolist(), said[0].logits[0], strict=True):
        if logits.sigmoid().max() > 0.25:
            left, right = (round((x + side * width / 2) * 96) for side in (-1, 1))
            top, bottom = (round((y + side * height / 2) * 64) for side in (-1, 1))
            expected[max(top, 0) : bottom, max(left, 0) : right] = 1
    assert np.array_equal(found, expected) and 0 < expected.mean() < 1


@pytest.mark.parametrize("video", [False, True])
def test_sam_3_sees_the_picture_as_its_own_processor_makes_it(video, tmp_path):
    """It is published as a model of videos, with a tracker beside it."""
    save_sam3(tmp_path, video)
    finder = Text("red", str(tmp_path)).finder()
    model = next(c.cell_contents for c in finder.find.__closure__ if isinstance(c.cell_contents, torch.nn.Module))
    saved = load_file(tmp_path / WEIGHTS)["detector_model." * video + "text_projection.weight"]
    assert torch.equal(model.text_projection.weight, saved)
    said = []
    model.register_forward_hook(lambda module, args, kwargs, output: said.append((kwargs, output)), with_kwargs=True)
    found = finder(pixels(96, 64), "red")
    seen, output = said[0]
    assert seen["pixel_values"].shape == (1, 3, 56, 56) and seen["input_ids"].shape == (1, 32)
    red = seen["pixel_values"][0, :, 1:26, 1:26]  # the corner, as mean and deviation of one half make it
    assert torch.allclose(red, torch.tensor([220, 30, 30]).view(3, 1, 1) / 127.5 - 1, atol=1e-4)
    assert seen["attention_mask"].sum() == 5  # three letters, begin and end
    expected = output.semantic_seg[0, 0].sigmoid() * output.presence_logits[0, 0].sigmoid()
    assert np.allclose(found, expected.numpy()) and found.shape == (16, 16)


# Bad phrases ----------------------------------------------------------------------------------------------------------

UNREAD = "which reads none: name text there, or leave one of the two out."


@pytest.mark.parametrize(
    ("count", "settings", "sentence"),
    [
        (1, {"phrases": ""}, "phrases is '': write what to look for, such as 'the red car', or None."),
        (1, {"phrases": 3}, "phrases is 3: write what to look for, such as 'the red car', or None."),
        (1, {"phrases": []}, "phrases is []: pass one phrase, or one per reference."),
        (1, {"phrases": "a\nb"}, r"phrases is 'a\nb': write it in printable characters, on one line."),
        (1, {"phrases": ["a", "b"]}, "phrases has 2 values for 1 references: pass one value, or one per reference."),
        (1, {"phrases": "a", "selector": "edges"}, f"phrases is 'a', but selector is 'edges', {UNREAD}"),
        (
            2,
            {"phrases": ["a", None], "selector": ["edges", "text"]},
            f"There is the phrase 'a' for reference 1, but its selector is 'edges', {UNREAD}",
        ),
        (
            2,
            {"selector": ["edges", "text"]},
            "The selector of reference 2 looks for what a phrase names, and there is none: pass phrases, such as 'the "
            "red car'.",
        ),
        (1, {"selector": {"text": 1, "edges": 1}}, "The selector of reference 1 looks for what a phrase names, and "),
        (1, {"selector": text(["a", "b"])}, "text has 2 values for 1 references: pass one value, or one per reference"),
        (1, {"text_model": ""}, "text_model is '': pass a folder or a hub id, or None."),
    ],
)
def test_bad_phrases_are_one_sentence(select, count, settings, sentence):
    with pytest.raises(ValueError) as told:
        select(count, **settings)
    assert str(told.value).startswith(sentence)


def test_one_phrase_for_all_is_for_those_that_read_it(select):
    edges, named = select(2, phrases="red", selector=["edges", "text"]).references
    assert edges.phrase is None and named.phrase == "red" and np.array_equal(named.mask, corner())


def test_a_selector_by_text_is_made_of_phrases_and_a_model():
    assert text(["a", None], "folder") == Text(("a", None), "folder") and text() == SELECTORS["text"]
    for bad in ("", ["a", ""], [], 3):
        with pytest.raises(ValueError, match="^text is "):
            text(bad)
    with pytest.raises(ValueError, match="^The model of text is 3: pass a folder or a hub id, or None."):
        text("a", 3)
    with pytest.raises(ValueError, match="^A blend reads one phrase for each reference: name text in it once."):
        blend({"text": 1.0, text("red"): 1.0})
    with pytest.raises(ValueError, match="^The selector 'text' looks for what a phrase names, and there is none"):
        scores_of(SELECTORS["text"], pixels())
    with pytest.raises(ValueError, match="'text' needs the picture's pixels"):
        scores_of(text("red"), None)


# Faces ----------------------------------------------------------------------------------------------------------------


def test_settings_hold_phrases_and_no_phrase_of_a_selector(tmp_path):
    from sparse_context.pipelines.settings_file import Settings, parse_settings

    values = {"keep": 0.2, "selector": {"text": 0.5, "edges": 0.5}, "phrases": ["the red car", None], "text_model": "m"}
    settings = parse_settings(values)
    assert settings.to_dict() == values and json.loads(json.dumps(values)) == values
    request = replace(Settings().request, config=SparseContextConfig(selector=text("red")))
    with pytest.raises(
        ValueError, match="holds a phrase or a model of its own, which no file can hold: name it 'text'"
    ):
        Settings(request=request).to_dict()
    named = replace(Settings().request, config=SparseContextConfig(selector=text(), phrases="red"))
    assert Settings(request=named).to_dict()["selector"] == "text"


def test_the_command_takes_phrases_in_order(clipseg, tmp_path, monkeypatch, capsys):
    from sparse_context.cli import main

    monkeypatch.chdir(tmp_path)
    for name, colour in (("a", "red"), ("b", "blue")):
        scene(64, 64, colour).save(f"{name}.png")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["sparse-context", "select", "a.png", "b.png", "--token", "8", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    model = ("--text-model", str(clipseg), "--keep", "0.25")
    code, out, _ = run("--text", "red", "--text", "blue", "--json", *model)
    said = json.loads(out)["references"]
    assert code == 0 and [(each["phrase"], each["found"]) for each in said] == [("red", True), ("blue", True)]
    drawn = np.asarray(Image.open("tokens.png"))
    assert (drawn == PHRASE_COLOUR).all(-1).any()
    _, out, _ = run("--text", "red", "--text", "none", *model)
    assert "reference 1: 16 of 64 tokens (25 %) by phrase 'red'" in out and "64 tokens (25 %) by subject" in out
    _, out, _ = run("--text", "blue", "--selector", "text=0.5,edges=0.5", *model)
    assert out.splitlines()[0].endswith("by 0.5 phrase 'blue' + 0.5 edges")
    assert "'blue' is nowhere in reference 1, so the other parts of its selector decide" in out
    for wrong, sentence in {
        ("--text", "a", "--text", "b", "--text", "c"): "--text has 3 values for 2 references: give one, or as many.",
        ("--text", "a", "--selector", "edges"): f"phrases is 'a', but selector is 'edges', {UNREAD}",
        ("--text", "red"): "There is no model here that finds phrases: name one as text_model",
    }.items():
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
        code, out, err = run(*wrong)
        assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1
