from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image
from tiny import picture

from sparse_context.config import SparseContextConfig
from sparse_context.preview import (
    column,
    draw_kept,
    draw_selection,
    fit_reference,
    label,
    reference_mask,
    select_pictures,
    side_by_side,
)
from sparse_context.selection import Kept, Selection, select_tokens
from sparse_context.selectors.masks import mask

RED, WHITE, FRAME = (255, 0, 0), (255, 255, 255), (226, 76, 60)


def kept(index, grid=(4, 6), token=8, colour=(10, 90, 200)):
    """A flat reference with the tokens at `index` kept."""
    pixels = np.full((grid[0] * token, grid[1] * token, 3), colour, np.uint8)
    return Kept(grid, np.array(index, np.int64), np.ones(grid, np.float32), "uniform", pixels)


# fit_reference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "side", "fitted"),
    [
        ((64, 64), None, (64, 64)),
        ((1024, 1024), None, (1024, 1024)),
        ((640, 80), None, (640, 80)),
        ((5, 5), None, (64, 64)),
        ((30, 60), None, (64, 128)),
        ((2000, 20), None, (2000, 250)),
        ((20, 2000), None, (250, 2000)),
        ((1, 1000), None, (125, 1000)),
        ((2048, 2048), None, (1024, 1024)),
        ((1700, 900), None, (1407, 745)),
        ((9000, 100), None, (2896, 362)),
        ((256, 256), 128, (128, 128)),
        ((100, 100), 128, (128, 128)),
        ((400, 200), 128, (181, 91)),
        ((5, 5), 128, (128, 128)),
        ((2000, 20), 128, (512, 64)),
        ((800, 100), 199, (560, 70)),  # 563 by rounding, which is more than eight times 70
    ],
)
def test_fit_reference_sizes(size, side, fitted):
    assert fit_reference(Image.new("RGB", size), side).size == fitted


@pytest.mark.parametrize("side", [None, 64, 100, 199, 1024])
def test_every_size_becomes_one_that_the_pipelines_take(side):
    for width in (1, 3, 63, 64, 65, 511, 2501, 4003):
        for height in (1, 7, 64, 500, 1300):
            wide, high = fit_reference(Image.new("L", (width, height)), side).size
            assert min(wide, high) >= 64
            assert max(wide, high) <= 8 * min(wide, high)
            assert side or wide * high <= 1024 * 1024


def test_what_fits_already_is_left_alone():
    reference = picture(96, 64)
    assert fit_reference(reference) is reference


def test_a_large_reference_is_scaled_as_the_pipelines_scale_it():
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    reference = picture(1501, 1003)
    theirs = Flux2ImageProcessor._resize_if_exceeds_area(reference)
    assert np.array_equal(fit_reference(reference), theirs)


@pytest.mark.parametrize(("size", "fitted"), [((3000, 2000), (2449, 1632)), ((1600, 1200), (1600, 1200))])
def test_a_larger_size_is_taken_where_it_is_asked_for(size, fitted):
    assert fit_reference(Image.new("RGBA", size), max_area=4_000_000).size == fitted


def test_padding_is_white_and_centred_and_no_mask_covers_it():
    pixels = np.asarray(fit_reference(Image.new("RGB", (1024, 64), RED)))
    assert pixels.shape == (128, 1024, 3)
    assert (pixels[32:96] == RED).all()
    assert (pixels[:32] == WHITE).all() and (pixels[96:] == WHITE).all()
    covered = np.asarray(fit_reference(Image.new("L", (1024, 64), 255)))
    assert (covered[32:96] == 255).all()
    assert (covered[:32] == 0).all() and (covered[96:] == 0).all()


@pytest.mark.parametrize("size", [(64, 64), (160, 160)])
def test_what_is_transparent_is_laid_on_white_and_its_alpha_stays(size):
    pixels = np.zeros((*size, 4), np.uint8)
    pixels[:, : size[0] // 2] = (*RED, 255)
    fitted = fit_reference(Image.fromarray(pixels), 64)
    assert (fitted.size, fitted.mode) == ((64, 64), "RGBA")
    fitted = np.asarray(fitted)
    assert (fitted[:, :28] == (*RED, 255)).all()
    assert (fitted[:, 36:] == (*WHITE, 0)).all()


def test_a_mask_belongs_to_a_picture_of_its_size():
    selector = mask([np.full((64, 96), 255, np.uint8)])
    assert reference_mask("edges", 0, picture(10, 10)) is None
    assert reference_mask(selector, 0, picture(96, 64)).size == (96, 64)
    with pytest.raises(ValueError, match="mask of reference 1 is 96x64, but its picture is 64x96"):
        reference_mask(selector, 0, picture(64, 96))


# Drawings ------------------------------------------------------------------------------------------------------------


def test_kept_tokens_keep_their_colour_and_dropped_ones_fade():
    reference = kept([0, 1, 8, 23])
    drawn = np.asarray(draw_kept(reference.picture, reference))
    assert drawn.shape == (32, 48, 3)
    grey = 0.299 * 10 + 0.587 * 90 + 0.114 * 200
    for token in range(24):
        row, column = divmod(token, 6)
        cell = drawn[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        if token in (0, 1, 8, 23):
            assert set(map(tuple, cell.reshape(-1, 3).tolist())) == {(10, 90, 200), FRAME}
        else:
            assert np.ptp(cell) == 0
            assert abs(float(cell[0, 0, 0]) - (grey * 0.18 + 244 * 0.82)) <= 1


def test_a_frame_stays_within_its_token_and_is_not_drawn_between_kept_ones():
    drawn = np.asarray(draw_kept(kept([8, 9]).picture, kept([8, 9])))
    framed = (drawn == FRAME).all(-1)
    assert framed[8:16, 16:32].sum() == 2 * (16 + 8) - 4
    assert framed.sum() == framed[8:16, 16:32].sum()
    assert not framed[9:15, 17:31].any()


def test_where_a_mean_is_kept_its_tokens_show_their_mean_colour():
    plain = kept([8, 10])
    plain.picture[:8, :8] = (250, 30, 40)
    into = np.full(24, -1)
    into[[0, 1, 2, 10]], into[8] = 10, 8  # one mean of four, and one token as it is
    drawn = np.asarray(draw_kept(plain.picture, replace(plain, into=into)))
    mean = (np.array((250, 30, 40)) + 3 * np.array((10, 90, 200))) // 4
    for token in range(24):
        row, column = divmod(token, 6)
        cell = drawn[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].reshape(-1, 3)
        if token in (0, 1, 2, 10):
            assert (cell == mean).all()
        elif token == 8:
            assert set(map(tuple, cell.tolist())) == {(10, 90, 200), FRAME}
        else:
            assert np.ptp(cell) == 0


def test_all_kept_is_the_picture_itself_and_none_kept_has_no_frame():
    everything, nothing = kept(range(24)), kept([])
    assert np.array_equal(draw_kept(everything.picture, everything), everything.picture)
    assert np.ptp(np.asarray(draw_kept(nothing.picture, nothing))) == 0


def test_beside_an_overview_tokens_that_are_not_sharp_are_blurred():
    pixels = np.asarray(picture(96, 64))
    config = SparseContextConfig(keep=0.3, overview=4, selector="residual")
    (shown,) = select_tokens([pixels], [(8, 12)], config).references
    drawn = np.asarray(draw_kept(pixels, shown)).astype(int)
    small = pixels.reshape(16, 4, 24, 4, 3).mean((1, 3)).astype(np.float32)
    blurred = cv2.resize(small, (96, 64), interpolation=cv2.INTER_CUBIC).clip(0, 255)
    sharp = np.kron(shown.mask, np.ones((8, 8), bool))
    framed = (drawn == FRAME).all(-1)
    assert np.array_equal(drawn[sharp & ~framed], pixels[sharp & ~framed])
    assert np.abs(drawn - blurred)[~sharp].max() <= 1 and not framed[~sharp].any()
    (nothing,) = select_tokens([pixels], [(8, 12)], replace(config, keep=6)).references
    assert np.abs(np.asarray(draw_kept(pixels, nothing)) - blurred).max() <= 1
    large = np.asarray(draw_kept(np.kron(pixels, np.ones((2, 2, 1), np.uint8)), nothing))
    assert large.shape == (128, 192, 3) and np.abs(large[::2, ::2] - blurred).max() < 40


def test_dim_says_how_far_a_dropped_token_fades():
    reference = kept([])
    assert (np.asarray(draw_kept(reference.picture, reference, dim=1.0)) == 244).all()
    assert abs(int(np.asarray(draw_kept(reference.picture, reference, dim=0.0))[0, 0, 0]) - 79) <= 1


def test_alpha_is_not_drawn():
    reference = kept([3])
    transparent = np.dstack([reference.picture, np.zeros((32, 48, 1), np.uint8)])
    assert np.array_equal(draw_kept(transparent, reference), draw_kept(reference.picture, reference))


def test_a_selection_is_drawn_with_all_its_references():
    both = Selection((kept([0]), kept([5], grid=(4, 4))), "auto", (0.0, 0.0), 0.1)
    sheet = np.asarray(draw_selection(both, height=96))
    assert sheet.shape[1] == 144 + 8 + 96
    assert (sheet[12, 12] == (10, 90, 200)).all()  # token 0 of the first, enlarged three times
    assert (sheet[36, 144 + 8 + 36] == (10, 90, 200)).all()  # token 5 of the second
    assert np.ptp(sheet[12, 144 + 8 + 12]) == 0


def test_the_label_counts_both_parts():
    config = SparseContextConfig(keep=0.3, overview=4)
    (shown,) = select_tokens([np.asarray(picture(384, 256))], [(8, 12)], config).references
    sheet = draw_selection(Selection((shown,), "auto", (0.0,), 0.0), height=256)
    expected = label(draw_kept(shown.picture, shown), "29 of 96 tokens, overview by 4, 0.5 residual + 0.5 subject")
    assert np.array_equal(sheet, expected)


def test_a_reference_without_pixels_cannot_be_drawn():
    latents = Kept((2, 2), np.array([1]), np.ones((2, 2), np.float32), "uniform", None)
    with pytest.raises(ValueError, match="^Reference 1 reached the pipeline as latents: there is no picture to draw"):
        draw_selection(Selection((latents,), "auto", (0.0,), 0.0))


@pytest.mark.parametrize(("width", "line"), [(64, 12), (256, 16), (900, 22)])
def test_a_label_is_a_line_below_the_picture(width, line):
    plain = Image.new("RGB", (width, 50), RED)
    labelled = np.asarray(label(plain, "ab"))
    assert labelled.shape == (50 + round(line * 1.6), width, 3)
    assert (labelled[:50] == RED).all()
    written = (labelled[50:] != 255).any(-1)
    assert written.any()
    left, right = np.flatnonzero(written.any(0))[[0, -1]]
    assert abs((left + right) / 2 - width / 2) <= 2
    assert not written[-1].any()


def test_a_label_of_several_lines_is_written_in_one():
    plain = Image.new("RGB", (200, 10), RED)
    assert np.array_equal(label(plain, "a\nb\r\n c"), label(plain, "a b c"))


def test_a_long_label_is_written_smaller():
    labelled = np.asarray(label(Image.new("RGB", (200, 10), RED), "as long as this line of text is, and longer"))
    written = (labelled[10:] != 255).any(-1).any(0)
    assert not written[0] and not written[-1]


def test_side_by_side_and_column():
    first, second = Image.new("RGB", (30, 20), RED), Image.new("RGB", (10, 50), "blue")
    row, tower = np.asarray(side_by_side([first, second])), np.asarray(column([first, second], gap=3))
    assert row.shape == (50, 48, 3)
    assert (row[:20, :30] == RED).all() and (row[:, 38:] == (0, 0, 255)).all()
    assert (row[20:, :30] == WHITE).all() and (row[:, 30:38] == WHITE).all()
    assert tower.shape == (73, 30, 3)
    assert (tower[:20] == RED).all() and (tower[23:, :10] == (0, 0, 255)).all()
    assert (tower[20:23] == WHITE).all() and (tower[23:, 10:] == WHITE).all()


# select_pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "token", "grid"),
    [
        ((96, 64), 16, (4, 6)),
        ((103, 79), 16, (4, 6)),
        ((96, 64), 8, (8, 12)),
        ((5, 5), 16, (4, 4)),
        ((2000, 20), 16, (15, 125)),
        ((2048, 1024), 16, (45, 90)),
    ],
)
def test_select_pictures_makes_the_grid_of_the_pipelines(size, token, grid):
    selection = select_pictures([picture(*size)], SparseContextConfig(keep=0.25, selector="uniform"), token)
    (reference,) = selection.references
    assert reference.grid == grid
    assert reference.picture.shape == (grid[0] * token, grid[1] * token, 3)
    assert selection.kept == int(0.25 * grid[0] * grid[1] + 0.5)


def test_select_pictures_crops_the_middle():
    pixels = np.asarray(picture(103, 79))
    (reference,) = select_pictures([Image.fromarray(pixels)], SparseContextConfig()).references
    assert np.array_equal(reference.picture, pixels[7:71, 3:99])


def test_select_pictures_carries_a_mask_along():
    drawn = np.zeros((64, 96), np.uint8)
    drawn[16:48, 32:64] = 255
    config = SparseContextConfig(keep=4, selector=mask([drawn, None]))
    second = Image.fromarray(np.dstack([np.asarray(picture(64, 64)), np.zeros((64, 64), np.uint8)]))
    selection = select_pictures([picture(96, 64), second], config)
    assert selection.references[0].scores.tolist() == (drawn[8::16, 8::16] / 255).tolist()
    assert not selection.references[1].scores.any()
    assert set(selection.references[0].index) <= {8, 9, 14, 15}


def test_a_mask_leaves_the_pixels_as_they_are():
    large, drawn = picture(1500, 1000), np.zeros((1000, 1500), np.uint8)
    with_mask = select_pictures([large], SparseContextConfig(selector={mask([drawn]): 0.5, "edges": 0.5}))
    without = select_pictures([large], SparseContextConfig(selector="edges"))
    assert np.array_equal(with_mask.references[0].picture[..., :3], without.references[0].picture)


def test_select_pictures_refuses():
    with pytest.raises(ValueError, match="^Picture 1 is 64x64, less than one token of 65 pixels: pass a larger"):
        select_pictures([picture(20, 20)], SparseContextConfig(), token=65)
    with pytest.raises(ValueError, match="^The mask of reference 1 is 10x10, but its picture is 64x64"):
        select_pictures([picture(64, 64)], SparseContextConfig(selector=mask([np.ones((10, 10), bool)])))
