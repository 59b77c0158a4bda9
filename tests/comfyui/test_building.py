"""From the node's inputs to a patch and a picture, with a model that has what the node asks of ComfyUI's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sparse_context_nodes.building import as_bytes, build, crop, read_masks, read_settings, shrink_image
from sparse_context_nodes.patch import install, installed

from sparse_context.selectors.masks import DROP, KEEP, NEITHER

DEFAULTS = {"keep": 0.2, "keep_each": "", "task": "auto", "selector": "auto", "coverage": "auto", "overview": "trained"}


class Model:
    """A ModelPatcher, as far as the node looks."""

    def __init__(self, kind="flux2", options=None):
        self.model = SimpleNamespace(
            model_config=SimpleNamespace(unet_config={"image_model": kind} if kind else {}),
            diffusion_model=SimpleNamespace(patch_size=1 if kind == "flux2" else 2),
            latent_format=SimpleNamespace(spacial_downscale_ratio=16 if kind == "flux2" else 8),
            process_latent_in=lambda latent: latent * 2,
        )
        self.model_options = options or {"transformer_options": {}}
        self.wrappers = {}

    def clone(self):
        twin = Model()
        twin.model = self.model
        patches = self.model_options["transformer_options"].get("patches", {})
        twin.model_options = {"transformer_options": {"patches": {name: [*each] for name, each in patches.items()}}}
        twin.wrappers = {place: dict(each) for place, each in self.wrappers.items()}
        return twin

    def add_wrapper_with_key(self, place, key, wrapper):
        self.wrappers.setdefault(place, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, place, key):
        self.wrappers.get(place, {}).pop(key, None)

    def set_model_post_input_patch(self, patch):
        self.model_options["transformer_options"].setdefault("patches", {}).setdefault("post_input", []).append(patch)


def made(model=None, images=None, masks=None, vae=None, told=None, **widgets):
    told = [] if told is None else told
    settings = read_settings(**{**DEFAULTS, "seed": 0, **widgets})
    return build(model or Model(), settings, images or {}, masks or {}, vae, [], told.append)


def image(height, width, seed=0, batch=1):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "patch"), [("flux2", 1), ("flux", 2), ("qwen_image", 2)])
def test_the_picture_shows_what_is_kept_before_the_model_runs(kind, patch):
    sparse, sheet = made(Model(kind), images={"image1": image(128, 192), "image2": image(64, 64)})
    assert sparse.patch == patch
    assert sheet.size[1] > 384  # both, with a line of text below each
    (selection,) = [sparse.choose([(8, 12), (4, 4)], None, False)]
    assert [kept.grid for kept in selection.references] == [(8, 12), (4, 4)]
    assert selection.kept == 19 + 3


@pytest.mark.parametrize("kind", ["wan2.1", None])
def test_another_model_is_refused(kind):
    with pytest.raises(ValueError, match="takes no references that Sparse Context knows: use it with FLUX.2, FLUX.1"):
        made(Model(kind))


def test_without_pictures_the_node_shows_a_sentence():
    patch, sheet = made()
    assert patch.needs_details
    assert sheet.width == 512
    assert not made(selector="uniform", overview="none")[0].needs_details


def test_widgets_become_settings():
    patch, _ = made(
        keep_each="0.5, 8",
        task="edit",
        selector="edges",
        coverage="30 %",
        overview="4",
        images={"image1": image(128, 128), "image2": image(128, 128)},
    )
    selection = patch.choose([(8, 8), (8, 8)], None, False)
    assert [kept.count for kept in selection.references] == [32, 8]
    assert selection.coverage == (0.3, 0.3)
    assert [kept.overview.factor for kept in selection.references] == [4, 4]


def test_sockets_that_are_free_are_no_pictures():
    patch, _ = made(images={"image1": image(128, 128), "image2": None})
    assert patch.choose([(8, 8)], None, False).kept == 13


# Pictures and masks ---------------------------------------------------------------------------------------------------


def test_pictures_are_cropped_as_vaes_do():
    picture = torch.arange(36.0).reshape(1, 6, 6, 1)
    assert torch.equal(crop(picture, 4), picture[:, 1:5, 1:5])
    assert torch.equal(crop(picture[:, :5], 4), picture[:, :4, 1:5])
    with pytest.raises(ValueError, match="An image is 6x6 pixels, less than one token: connect a larger one."):
        crop(picture, 8)


def test_pixels_are_bytes_of_three_channels():
    (pixels,) = as_bytes(torch.tensor([-1, 0, 0.5, 1, 2]).reshape(1, 1, 5, 1))
    assert pixels[0].tolist() == [[0] * 3, [0] * 3, [128] * 3, [255] * 3, [255] * 3]
    assert as_bytes(torch.zeros(2, 4, 4, 4))[1].shape == (4, 4, 3)


def mask_of(values, reference=1, keeps=True):
    return {"mask": torch.tensor(values, dtype=torch.float32)[None], "keeps": keeps, "reference": reference}


def test_masks_of_one_reference_come_together_and_drop_wins():
    masks = {
        "mask1": mask_of([[1, 1, 0, 0]], keeps=False),
        "mask2": mask_of([[0, 1, 1, 0]]),
        "mask3": mask_of([[1, 0, 0, 0]], reference=2),
        "mask4": None,
    }
    painted = read_masks(masks, [], 1, [].append)
    assert painted[0].tolist() == [[DROP, DROP, KEEP, NEITHER]]
    assert painted[1].tolist() == [[KEEP, NEITHER, NEITHER, NEITHER]]
    assert painted[0].dtype == np.uint8


def test_a_mask_is_cropped_with_its_picture():
    mask = np.zeros((6, 6))
    mask[1, 1] = 1
    painted = read_masks({"mask1": mask_of(mask.tolist())}, [image(6, 6)], 4, [].append)
    assert painted[0].shape == (4, 4)
    assert painted[0][0, 0] == KEEP


def test_a_mask_that_marks_nothing_is_said_and_left_out():
    """Load Image gives one of 64x64 pixels where nothing was painted."""
    told = []
    masks = {"mask1": mask_of(np.zeros((64, 64)).tolist())}
    patch, _ = made(images={"image1": image(128, 128)}, masks=masks, told=told)
    assert told == ["The mask of reference 1 marks nothing, so it changes nothing."]
    assert patch.choose([(8, 8)], None, False).kept == 13


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (
            mask_of(np.ones((64, 32)).tolist()),
            "The mask of reference 1 is 32x64 pixels, but its image is 96x128: connect a mask of the image's own size.",
        ),
        (
            mask_of(np.ones((128, 96)).tolist(), reference=2),
            "A mask is for reference 2, but you connected 1 image: change the number in Sparse Context Mask.",
        ),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, sentence):
    with pytest.raises(ValueError) as error:
        made(images={"image1": image(128, 96)}, masks={"mask1": mask})
    assert str(error.value) == sentence


def test_masks_of_different_sizes_are_refused():
    masks = {"mask1": mask_of([[1, 1]]), "mask2": mask_of([[1, 1, 1]])}
    with pytest.raises(ValueError, match="The masks of reference 1 are of different sizes: connect masks of one size."):
        read_masks(masks, [], 1, [].append)


# Overviews ------------------------------------------------------------------------------------------------------------


class Vae:
    """An autoencoder that keeps what it was given, and makes latents of its mean."""

    def encode(self, pixels):
        self.pixels = pixels
        return pixels.mean() * torch.ones(1, 128, pixels.shape[1] // 16, pixels.shape[2] // 16)


def test_the_vae_encodes_the_small_picture():
    vae, picture = Vae(), image(128, 96)
    patch, _ = made(keep=0.25, overview="4", images={"image1": picture}, vae=vae)
    assert vae.pixels.shape == (1, 32, 32, 3)
    block = picture[0, :4, :4].mean(dim=(0, 1))
    assert torch.allclose(vae.pixels[0, 0, 0], block)
    assert torch.equal(patch.coarse[0], vae.pixels.mean() * 2 * torch.ones(1, 128, 2, 2))


def test_without_an_overview_nothing_is_encoded():
    vae = Vae()
    assert made(images={"image1": image(128, 96)}, vae=vae)[0].coarse == {}
    assert not hasattr(vae, "pixels")


def test_a_picture_whose_last_token_is_cut_is_stretched_to_whole_ones():
    assert shrink_image(torch.zeros(1, 120, 104, 3), (8, 7), 16, 4).shape == (1, 32, 32, 3)


# On a model -----------------------------------------------------------------------------------------------------------


def test_a_patch_is_on_a_clone_and_takes_the_place_of_an_earlier_one():
    model, (first, _), (second, _) = Model(), made(), made()
    other = object()
    model.set_model_post_input_patch(other)
    once = install(model, first, "outer", "inner")
    twice = install(once, second, "outer", "inner")
    assert (installed(model), installed(once), installed(twice)) == (None, first, second)
    assert twice.model_options["transformer_options"]["patches"]["post_input"] == [other, second]
    assert twice.wrappers == {"outer": {"sparse_context": [second.run]}, "inner": {"sparse_context": [second.forward]}}
    assert model.wrappers == {}
