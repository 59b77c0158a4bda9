import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sparse_context.overview import residual as error_of_overview
from sparse_context.selectors.classical import edges
from sparse_context.selectors.masks import Mask, mask
from sparse_context.selectors.order import uniform_order
from sparse_context.selectors.registry import SELECTORS, beside_overview, blend, name_of, resolve, user_mask
from sparse_context.selectors.residual import Residual

PIXEL_SELECTORS = ["edges", "detail", "saliency", "subject", "contrast", "residual"]
grids = st.tuples(st.integers(1, 24), st.integers(1, 24))


def rng(seed=0):
    return np.random.default_rng(seed)


def flat(height=128, width=128, colour=(90, 120, 60)):
    return np.full((height, width, 3), colour, np.uint8)


def noise(height=128, width=128, channels=3):
    return rng().integers(0, 256, (height, width, channels), np.uint8)


def cells(scores, above=0.0):
    return {tuple(map(int, cell)) for cell in np.argwhere(scores > above)}


# The uniform order


@given(grids)
def test_uniform_order_names_every_cell_once(grid):
    order = uniform_order(grid)
    assert order.shape == grid and order.dtype == np.int64
    assert np.array_equal(np.sort(order, axis=None), np.arange(grid[0] * grid[1]))


def blocks(grid):
    """(depth, row slice, column slice) of every block of the halving that `uniform_order` describes."""
    level, depth = [((0, grid[0]), (0, grid[1]))], 0
    while max(stop - start for block in level for start, stop in block) > 1:
        longest = [max(block[axis][1] - block[axis][0] for block in level) for axis in (0, 1)]
        axis = int(longest[1] > longest[0])
        halves = []
        for block in level:
            start, stop = block[axis]
            middle = start + (stop - start + 1) // 2
            for part in ((start, middle), (middle, stop)):
                if part[0] < part[1]:
                    halves.append((block[0], part) if axis else (part, block[1]))
        level, depth = halves, depth + 1
        yield from ((depth, slice(*rows), slice(*columns)) for rows, columns in level)


@settings(max_examples=60)
@given(st.tuples(st.integers(1, 20), st.integers(1, 20)))
@example((1, 40))
@example((40, 1))
@example((3, 17))
@example((16, 16))
def test_uniform_order_is_spread_at_every_count(grid):
    order = np.argsort(uniform_order(grid), axis=None)
    k = np.arange(1, len(order) + 1)
    for depth, rows, columns in blocks(grid):
        inside = np.zeros(grid, bool)
        inside[rows, columns] = True
        error = np.abs(np.cumsum(inside.ravel()[order]) - k * inside.mean()).max()
        assert error <= {1: 0.5, 2: 1.0}.get(depth, 1.5) + 1e-9


@pytest.mark.parametrize("shape", [(1, 40), (40, 1)])
def test_uniform_order_of_a_strip_leaves_no_wide_gap(shape):
    order = uniform_order(shape).ravel()
    for k in range(2, 41):
        kept = np.flatnonzero(order < k)
        assert np.diff(kept).max() <= 3 * 40 / k  # no gap of more than three times the mean one


def test_uniform_order_of_a_power_of_two_starts_with_lattices():
    order = uniform_order((16, 16))
    for side in (2, 4, 8):
        rows, columns = np.nonzero(order < side * side)
        step = 16 // side
        assert len({(r % step, c % step) for r, c in zip(rows, columns, strict=True)}) == 1


def test_uniform_order_is_cached_and_read_only():
    assert uniform_order((5, 7)) is uniform_order((5, 7))
    with pytest.raises(ValueError, match="read-only"):
        uniform_order((5, 7))[0, 0] = 3
    with pytest.raises(ValueError, match="0 x 4 holds no token"):
        uniform_order((0, 4))


# What every selector keeps to


@pytest.mark.parametrize("name", sorted(set(SELECTORS) - {"text"}))  # which needs a phrase: test_text.py
@pytest.mark.parametrize(
    ("size", "grid"),
    [((128, 128), (8, 8)), ((97, 131), (6, 8)), ((40, 300), (3, 17)), ((16, 640), (1, 40)), ((5, 7), (8, 3))],
)
def test_scores_have_the_grid_s_shape_and_the_common_range(name, size, grid):
    scores = SELECTORS[name](noise(*size, channels=4), grid, rng())
    assert scores.shape == grid and scores.dtype == np.float32
    assert 0 <= scores.min() and scores.max() <= 1


@pytest.mark.parametrize("name", PIXEL_SELECTORS)
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (90, 120, 60)])
def test_a_flat_picture_scores_zero_everywhere(name, colour):
    assert not SELECTORS[name](flat(97, 131, colour), (6, 8), rng()).any()


@pytest.mark.parametrize("name", PIXEL_SELECTORS)
def test_alpha_does_not_change_what_the_pixels_score(name):
    image = noise(channels=4)
    assert np.array_equal(SELECTORS[name](image, (8, 8), rng()), SELECTORS[name](image[..., :3], (8, 8), rng()))


@pytest.mark.parametrize("name", PIXEL_SELECTORS)
def test_without_pixels_a_selector_of_pixels_refuses(name):
    with pytest.raises(ValueError, match=f"'{name}' needs the picture's pixels, .* latents: use 'uniform' or 'random'"):
        SELECTORS[name](None, (8, 8), rng())


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8)])
def test_other_pixels_are_refused(image):
    with pytest.raises(ValueError, match=r"'edges' got a picture of shape .* pass uint8 \(H, W, 3\)"):
        edges(image, (2, 2), rng())


# What each selector finds


def test_random_is_the_generator_s_and_needs_no_picture():
    scores = SELECTORS["random"](None, (3, 5), rng(7))
    assert np.array_equal(scores, rng(7).random((3, 5), dtype=np.float32))


def test_uniform_scores_are_the_rank():
    scores = SELECTORS["uniform"](None, (3, 5), rng())
    assert np.array_equal(np.argsort(-scores, axis=None), np.argsort(uniform_order((3, 5)), axis=None))
    assert scores.max() == 1 and scores.min() == np.float32(1 - 14 / 15)


def test_edges_finds_exactly_the_cells_of_a_line():
    image = flat()
    image[:, 72:] = 230  # the border lies in the middle of column 4 of cells of 16 pixels
    scores = edges(image, (8, 8), rng())
    assert cells(scores) == {(row, 4) for row in range(8)}
    assert scores[:, 4] == pytest.approx(1 - np.exp(-1), abs=1e-6)  # one line across a cell


def test_edges_ignores_noise_on_a_flat_picture():
    grain = rng().normal(0, 3, (256, 256, 1))
    image = np.clip(128 + grain, 0, 255).astype(np.uint8).repeat(3, axis=2)
    assert not edges(image, (16, 16), rng()).any()


def test_a_strong_edge_does_not_hide_a_fair_one():
    image = flat(colour=(0, 0, 0))
    image[:, 24:] = 255
    image[:, 104:] = 130  # 125 grey levels
    assert cells(edges(image, (8, 8), rng())) == {(row, column) for row in range(8) for column in (1, 6)}


def test_detail_finds_exactly_the_textured_corner():
    image = flat()
    image[64:, 64:] = noise(64, 64)
    assert cells(SELECTORS["detail"](image, (8, 8), rng())) == {(r, c) for r in range(4, 8) for c in range(4, 8)}


def test_detail_is_the_standard_deviation_of_luma():
    image = flat(32, 32, (100, 100, 100))
    image[::2] = 164  # 32 grey levels either side of the mean
    expected = 1 - np.exp(-np.sqrt(32**2 - 0.25) / 32)
    assert SELECTORS["detail"](image, (2, 2), rng()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_residual_is_the_error_of_the_overview_on_one_scale_for_all_pictures(factor):
    for image in (noise(), cv2.GaussianBlur(noise(), (9, 9), 0), np.kron(noise(16, 16), np.ones((8, 8, 1), np.uint8))):
        error = error_of_overview(image, (8, 8), factor)
        expected = 1 - np.exp(-np.sqrt(np.maximum(error**2 - 0.25, 0)) / 16)
        assert np.allclose(Residual(factor)(image, (8, 8), rng()), expected, atol=1e-5)


def test_residual_of_no_overview_is_that_of_a_factor_of_4():
    assert np.array_equal(SELECTORS["residual"](noise(), (8, 8), rng()), Residual(4)(noise(), (8, 8), rng()))


def test_residual_passes_over_what_is_smooth_at_the_scale_of_a_token():
    ramp = np.repeat(np.linspace(0, 255, 128).astype(np.uint8)[None, :, None], 128, 0).repeat(3, 2)
    ramp[64:, 64:] = noise(64, 64)
    scores = {name: SELECTORS[name](ramp, (8, 8), rng()) for name in ("residual", "detail")}
    assert not scores["residual"][:3, 1:3].any() and scores["detail"][:3, 1:3].min() > 0.2  # away from the border
    assert scores["residual"][5:, 5:].min() > 0.9


def test_beside_an_overview_its_factor_reaches_every_residual_and_nothing_else():
    picture = noise()
    for selector in ("residual", Residual(8)):
        assert beside_overview(selector, 2).factor == 2
    mixed = beside_overview(blend({"edges": 0.5, "residual": 0.5}), 8)
    expected = 0.5 * edges(picture, (8, 8), rng()) + 0.5 * Residual(8)(picture, (8, 8), rng())
    assert np.allclose(mixed(picture, (8, 8), rng()), expected, atol=1e-6)
    assert beside_overview("edges", 2) == "edges" and beside_overview(edges, 2) is edges
    assert len({name_of(beside_overview("residual", factor)) for factor in (2, 4, 8)}) == 3  # for caches


@pytest.mark.parametrize("name", ["saliency", "contrast"])
@pytest.mark.parametrize("background", ["plain", "cluttered"])
def test_saliency_prefers_a_coloured_object(name, background):
    image = flat(256, 256, (200, 200, 190)) if background == "plain" else noise(256, 256) // 3 + 60
    image = image.astype(np.uint8)
    image[96:160, 144:208] = (220, 30, 40)
    scores = SELECTORS[name](image, (16, 16), rng())
    best = np.argsort(-scores, axis=None)[:16]
    assert set(best) == {16 * row + column for row in range(6, 10) for column in range(9, 13)}


def test_mask_scores_the_covered_share():
    image = noise(64, 64, 4)
    image[..., 3] = 0
    image[16:32, 16:48, 3] = 255
    image[0:8, 0:16, 3] = 255  # half of the first cell
    expected = np.zeros((4, 4), np.float32)
    expected[1, 1:3] = 1
    expected[0, 0] = 0.5
    assert np.array_equal(SELECTORS["mask"](image, (4, 4), rng()), expected)


def test_mask_without_an_alpha_channel_refuses():
    with pytest.raises(ValueError, match=r"neither a mask nor an alpha channel .*mask\(\[\.\.\.\]\) .* RGBA picture"):
        SELECTORS["mask"](noise(), (4, 4), rng())


# A user's masks


@pytest.mark.parametrize(
    "given",
    [
        np.array([[False, True]]),
        np.array([[0, 1]], np.uint8),
        np.array([[0, 255]], np.uint8),
        np.array([[0.0, 1.0]]),
        Image.fromarray(np.array([[0, 255]], np.uint8)),
        Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"),
        Image.fromarray(np.array([[0.0, 1.0]], np.float32)),
        Image.fromarray(np.array([[0, 255]], np.uint16)),
        torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16),
        torch.tensor([[0.0, 1.0]], requires_grad=True),
    ],
)
def test_masks_of_any_kind_become_bytes(given):
    (kept,) = mask([given]).masks
    assert kept.dtype == np.uint8 and kept.tolist() == [[0, 255]]


def test_user_mask_finds_the_mask_of_its_reference():
    first, third = np.array([[0, 255]], np.uint8), np.array([[255, 0]], np.uint8)
    several = mask([first, None, third])
    for selector in (several, blend({several: 1, "edges": 2}), {several: 1, "edges": 2}):
        assert np.array_equal(user_mask(selector, 0), first)
        assert user_mask(selector, 1) is None
        assert np.array_equal(user_mask(selector, 2), third)
        with pytest.raises(ValueError, match="There is a reference 4, but only 3 masks"):
            user_mask(selector, 3)
    apart = ["edges", mask([third]), None]
    assert user_mask(apart, 0) is None and np.array_equal(user_mask(apart, 1), third) and user_mask(apart, 2) is None
    for selector in (None, "mask", "edges", {"mask": 1.0}, Mask()):
        assert user_mask(selector, 5) is None
    with pytest.raises(ValueError, match="selector of reference 2 holds 3 masks"):
        user_mask(["edges", several], 1)
    with pytest.raises(ValueError, match="There is a reference 3, but only 2 selectors"):
        user_mask(["edges", "mask"], 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4)), r"takes a list with one mask per reference: write mask\(\[m\]\)"),
        (Image.new("L", (4, 4)), r"write mask\(\[m\]\)"),
        ([np.zeros((4, 4, 3))], r"mask of reference 1 has shape \(4, 4, 3\)"),
        ([None, np.full((2, 2), 1.5)], r"mask of reference 2 runs from 1.5 to 1.5: a float mask lies in \[0, 1\]"),
        ([np.full((2, 2), 300)], r"runs from 300 to 300: an integer mask lies in \[0, 255\]"),
        ([np.full((2, 2), np.nan)], "runs from nan to nan"),
        ([np.array([["a"]])], "type <U1"),
        ([Image.fromarray(np.full((2, 2), 40_000, np.uint16))], r"from 40000 to 40000: an integer mask lies in"),
        ([Image.fromarray(np.full((2, 2), 40.0, np.float32))], r"from 40 to 40: a float mask lies in"),
        (None, r"takes a list with one mask per reference"),
        (3, r"takes a list with one mask per reference"),
    ],
)
def test_wrong_masks_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        mask(given)


# Blends and resolve


@settings(max_examples=25)
@given(st.floats(0.01, 10), st.floats(0.01, 10))
def test_a_blend_is_the_weighted_mean(a, b):
    image = noise(64, 64)
    scores = blend({"detail": a, edges: b})(image, (4, 4), rng())
    parts = [SELECTORS[name](image, (4, 4), rng()) for name in ("detail", "edges")]
    assert scores.dtype == np.float32
    assert scores == pytest.approx((a * parts[0] + b * parts[1]) / (a + b), abs=1e-6)


def test_labels_name_the_selector():
    def mine(image, grid, generator):
        return np.zeros(grid)

    assert resolve("edges") == ("edges", edges)
    assert resolve(edges) == ("edges", edges)
    assert resolve({"saliency": 7, "edges": 3})[0] == "0.7 saliency + 0.3 edges"
    assert resolve({mask([None]): 1})[0] == "1 mask"
    assert resolve(mine)[0] == "mine"
    assert resolve(mine)[1](None, (2, 3), rng()).dtype == np.float32
    assert len({mask([None]), mask([None])}) == 2


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("edge", "no selector 'edge': choose one of random, uniform, .* Did you mean 'edges'"),
        ("xyzzy", "no selector 'xyzzy': choose one of [^?]*$"),
        (3, "3 is no selector"),
        ({}, "blend of no selectors"),
        ({"edges": 0}, "weight of 'edges' in the blend is 0: pass a number above 0"),
        ({"edges": float("nan")}, "is nan"),
        ({"edges": True}, "is True"),
        ({"edges": "much"}, "is 'much'"),
        ({"egdes": 1.0}, "no selector 'egdes'"),
        ({mask([np.ones((2, 2))]): 1, mask([np.zeros((2, 2))]): 1}, "holds one mask"),
    ],
)
def test_unknown_selectors_are_refused(selector, message):
    with pytest.raises(ValueError, match=message):
        resolve(selector)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros((3, 2)), r"'mine' returned scores of shape \(3, 2\): the grid .* is \(2, 3\)"),
        (np.full((2, 3), 1.5), r"'mine' returned scores from 1.5 to 1.5: scores lie in \[0, 1\]"),
        (np.full((2, 3), -0.5), "from -0.5"),
        (np.full((2, 3), np.nan), "from nan to nan"),
        (np.full((2, 3), np.inf), "from inf to inf"),
        ([[0, 1, 0], [1]], r"'mine' returned 'list' that is no array of numbers: the grid .* is \(2, 3\)"),
        ("edges", "'mine' returned 'str' that is no array of numbers"),
    ],
)
def test_a_user_s_scores_are_checked(scores, message, monkeypatch):
    def mine(image, grid, generator):
        return scores

    monkeypatch.setitem(SELECTORS, "mine", mine)
    for selector in (mine, "mine", {mine: 1.0, "uniform": 1.0}):
        with pytest.raises(ValueError, match=message):
            resolve(selector)[1](None, (2, 3), rng())


def test_a_user_s_function_may_fill_the_same_array_again_and_have_parts_of_its_own():
    class Mine:
        parts = 3

        def __call__(self, image, grid, generator):
            self.scores = getattr(self, "scores", np.zeros(grid, np.float32))
            self.scores[:] = image[0, 0, 0] / 255
            return self.scores

    score = resolve(Mine())[1]
    first = score(flat(colour=(255, 0, 0)), (2, 3), rng())
    assert score(flat(colour=(0, 0, 0)), (2, 3), rng()).max() == 0 and first.min() == 1
    assert user_mask(Mine(), 0) is None
    tensor = torch.ones(2, 3, requires_grad=True)
    assert resolve(lambda *_: tensor)[1](None, (2, 3), rng()).tolist() == [[1, 1, 1], [1, 1, 1]]


# The subject with its rim


def best_around(scores, reach):
    """Of each cell the highest score at most `reach` rows and columns away, one by one."""
    rows, columns = scores.shape
    return np.array(
        [
            [scores[max(0, r - reach) : r + reach + 1, max(0, c - reach) : c + reach + 1].max() for c in range(columns)]
            for r in range(rows)
        ]
    )


def test_subject_is_saliency_with_the_outline_and_the_rim():
    image = np.full((160, 192, 3), (120, 150, 90), np.uint8)
    cv2.circle(image, (70, 80), 30, (230, 40, 30), -1)
    cv2.line(image, (150, 10), (180, 150), (110, 140, 80), 2)  # an edge far from the subject
    grid = (20, 24)
    found, edge, scores = (SELECTORS[name](image, grid, None) for name in ("saliency", "edges", "subject"))
    whole = 0.75 * found + 0.25 * edge * best_around(found, 1)
    expected = 0.4 * whole + 0.3 * best_around(whole, 1) + 0.3 * best_around(whole, 2)
    assert np.allclose(scores, expected, atol=1e-6)
    disc = cv2.circle(np.zeros((160, 192), np.uint8), (70, 80), 30, 1, -1)
    covered = cv2.resize(disc.astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA)
    touched = covered > 0
    chosen = np.argsort(-scores.ravel(), kind="stable")[: touched.sum()]
    assert touched.ravel()[chosen].mean() > 0.95  # the tokens of the disc, those that it only touches among them
    ring = (best_around(covered, 1) > 0) & ~touched
    far = best_around(covered, 3) == 0
    assert scores[ring].min() > scores[far].max()


def test_a_picture_without_a_subject_has_no_rim():
    assert not SELECTORS["subject"](np.full((64, 64, 3), 90, np.uint8), (8, 8), None).any()


def test_a_blend_that_is_registered_is_known_by_its_parts(monkeypatch):
    """A cache may keep scores by a name only where the name decides them."""
    monkeypatch.setitem(SELECTORS, "mine", blend({lambda image, grid, generator: np.zeros(grid): 1.0}))
    monkeypatch.setitem(SELECTORS, "ours", blend({"edges": 0.5, "uniform": 0.5}))
    assert name_of("mine") is None and name_of("ours") == name_of(blend({"edges": 0.5, "uniform": 0.5}))
