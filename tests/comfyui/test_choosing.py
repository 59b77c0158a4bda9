"""From settings and references to a selection."""

import numpy as np
import pytest
from sparse_context_nodes.choosing import References, Settings, check, choose, needs_details
from tiny_finders import scene

from sparse_context import SparseContextConfig, select_tokens
from sparse_context.selectors.masks import DROP, KEEP, NEITHER
from sparse_context.trained import Trained

GRID = (8, 8)
DETAILS = [np.linspace(0, 1, 64, dtype=np.float32).reshape(GRID)]


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8)


def painted(value):
    """The upper left quarter."""
    mask = np.full((128, 128), NEITHER, np.uint8)
    mask[:64, :64] = value
    return mask


QUARTER = np.zeros(GRID, bool)
QUARTER[:4, :4] = True


@pytest.mark.parametrize("settings", [{}, {"task": "global"}, {"selector": "edges"}, {"keep": 0.5, "coverage": 0.3}])
@pytest.mark.parametrize("count", [1, 2])
def test_with_pictures_it_is_what_the_package_chooses(settings, count):
    pictures = [picture(i) for i in range(count)]
    chosen = choose(Settings(**settings), References([[each] for each in pictures]), [GRID] * count)
    config = SparseContextConfig(**{"keep": 0.2, **settings})
    expected = select_tokens(pictures, [GRID] * count, config)
    assert chosen.index.tolist() == expected.index.tolist()
    assert [kept.selector for kept in chosen.references] == [kept.selector for kept in expected.references]
    assert chosen.coverage == expected.coverage


@pytest.mark.parametrize(
    ("written", "phrases"), [("red\n", "red"), ("red\nnone", ["red", None]), (" red \n\nblue", ["red", "blue"])]
)
def test_a_phrase_is_looked_for_as_the_package_does_it(written, phrases, clipseg):
    pictures = [np.asarray(scene(128, 128, colour)) for colour in ("red", "blue")]
    chosen = choose(
        Settings(phrases=written, text_model=str(clipseg)), References([[each] for each in pictures]), [GRID] * 2
    )
    config = SparseContextConfig(keep=0.2, phrases=phrases, text_model=str(clipseg))
    expected = select_tokens(pictures, [GRID] * 2, config)
    assert chosen.index.tolist() == expected.index.tolist()
    assert QUARTER[chosen.references[0].mask].all() and "phrase 'red'" in chosen.references[0].selector


def test_what_is_painted_goes_before_a_phrase(clipseg):
    red = np.asarray(scene(128, 128))
    references = References([[red]], {0: painted(DROP)})
    settings = Settings(task="subject", phrases="red", text_model=str(clipseg))
    assert not chosen_in_quarter(choose(settings, references, [GRID]))


def chosen_in_quarter(selection):
    return bool((selection.references[0].mask & QUARTER).any())


def test_pictures_of_a_batch_are_one_reference():
    first, second = picture(0), picture(1)
    chosen = choose(Settings(), References([[first, second]]), [GRID])
    assert (
        chosen.index.tolist() == select_tokens([[first, second]], [GRID], SparseContextConfig(keep=0.2)).index.tolist()
    )


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, "detail of the latents"),
        ({"task": "subject"}, "detail of the latents"),
        ({"selector": "detail"}, "detail of the latents"),
        ({"task": "global"}, "uniform"),
        ({"selector": "uniform"}, "uniform"),
        ({"selector": "random"}, "random"),
    ],
)
def test_without_pictures_latents_decide(settings, label):
    chosen = choose(Settings(**settings), References(), [GRID], DETAILS)
    assert chosen.references[0].selector == label
    assert chosen.kept == 13
    assert needs_details(Settings(**settings), References()) == (settings.get("selector") not in ("uniform", "random"))


def test_detail_of_the_latents_goes_by_its_scores():
    chosen = choose(Settings(selector="detail", keep=0.25), References(), [GRID], DETAILS)
    assert chosen.index.tolist() == [*range(48, 64)]


def test_auto_spreads_a_tenth_where_only_latents_are_known():
    assert choose(Settings(), References(), [GRID], DETAILS).coverage == (0.1,)
    assert choose(Settings(coverage=0.5), References(), [GRID], DETAILS).coverage == (0.5,)
    assert choose(Settings(selector="detail"), References(), [GRID], DETAILS).coverage == (0.0,)


def test_an_overview_needs_no_pictures():
    chosen = choose(Settings(keep=0.25, overview=4), References(), [GRID], DETAILS)
    assert chosen.references[0].overview.tokens == 4
    assert chosen.kept == 16
    assert chosen.coverage == (0.0,)


def test_trained_weights_get_their_overview():
    chosen = choose(Settings(keep=0.25), References([[picture()]]), [GRID], trained=Trained((4,)))
    assert (chosen.references[0].overview.factor, chosen.references[0].overview.layout) == (4, "spread")
    assert (
        choose(Settings(keep=0.25, overview=None), References([[picture()]]), [GRID], trained=Trained((4,))).overviews
        == {}
    )


@pytest.mark.parametrize("pictures", [True, False])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
def test_what_is_painted_to_be_kept_goes_first_and_to_be_dropped_last(pictures, keep):
    shown = [[picture()]] if pictures else ()
    kept = choose(Settings(keep=keep), References(shown, {0: painted(KEEP)}), [GRID], DETAILS).references[0].mask
    dropped = choose(Settings(keep=keep), References(shown, {0: painted(DROP)}), [GRID], DETAILS).references[0].mask
    assert kept.sum() == dropped.sum() == round(keep * 64)
    assert kept[QUARTER].all() if keep >= 0.25 else not kept[~QUARTER].any()
    assert not dropped[QUARTER].any()


def test_a_mask_of_one_reference_leaves_the_others():
    references = References([[picture(0)], [picture(1)]], {1: painted(KEEP)})
    chosen = choose(Settings(keep=0.25), references, [GRID, GRID])
    assert chosen.references[1].mask[QUARTER].all()
    plain = choose(Settings(keep=0.25), References(references.pictures), [GRID, GRID])
    assert chosen.references[0].index.tolist() == plain.references[0].index.tolist()


def test_every_reference_may_have_a_value():
    references = References([[picture(i)] for i in range(3)])
    chosen = choose(Settings(keep_each="0.5, 7 ,auto"), references, [GRID] * 3)
    assert [kept.count for kept in chosen.references][:2] == [32, 7]
    assert 0 < chosen.references[2].count < 64


def test_a_picture_may_be_larger_than_its_reference():
    """As that in front of a node that scales it."""
    large = np.zeros((512, 768, 3), np.uint8)
    assert choose(Settings(), References([[large]]), [(20, 30)]).kept == 120
    assert choose(Settings(), References([[large[:500]]]), [(31, 48)]).kept == 298


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            Settings(selector="edges"),
            "The selector edges looks at images, and none is connected: connect one for each reference, or choose "
            "auto, uniform, random or detail.",
        ),
        (
            Settings(keep_each="0.5; 0.1"),
            "keep_each has '0.5; 0.1': write one value for each reference, such as 0.5, 0.1. A value is a share, a "
            "number of tokens, or auto.",
        ),
        (
            Settings(keep_each="0.5,"),
            "keep_each has '': write one value for each reference, such as 0.5, 0.1. A value is a share, a number of "
            "tokens, or auto.",
        ),
        (
            Settings(keep_each="2.5"),
            "keep is 2.5: pass a ratio above 0 and up to 1, a count of at least 2 tokens, or 'auto'.",
        ),
        (
            Settings(phrases="red"),
            "phrases are looked for in images, and none is connected: connect one for each reference.",
        ),
        (
            Settings(phrases="red", selector="edges"),
            "phrases says what to look for, and the selector edges does not read it: choose auto or text, or leave "
            "phrases empty.",
        ),
    ],
)
def test_settings_that_fit_no_references_are_refused_before_the_model_runs(settings, message):
    with pytest.raises(ValueError) as error:
        check(settings, References())
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("settings", "trained", "message"),
    [
        (
            Settings(keep_each="0.5, 0.1"),
            None,
            "keep has 2 values for 1 references: pass one value, or one per reference.",
        ),
        (
            Settings(keep_each="auto", overview=4),
            None,
            "keep_each has auto, which measures an overview against images: connect them, or write numbers.",
        ),
        (
            Settings(keep_each="auto"),
            Trained((4,)),
            "keep_each has auto, which measures an overview against images: connect them, or write numbers.",
        ),
    ],
)
def test_settings_that_do_not_fit_the_references_of_a_run_are_refused(settings, trained, message):
    with pytest.raises(ValueError) as error:
        choose(settings, References(), [GRID], DETAILS, trained)
    assert str(error.value) == message
