"""The metrics on values that are known, and what must not pass for an object."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_context.embedded.demo import read_examples
from sparse_context.evaluation import metrics, networks
from sparse_context.evaluation.metrics import METRICS, decoys, features, find_metrics, nearest_of


@pytest.fixture(scope="module")
def photographs():
    """Corners of the examples' references: real pictures, uint8 (128, 128, 3)."""
    return [np.asarray(picture)[:128, :128] for example in read_examples() for picture in example["references"]]


def flat(value, size=(32, 48)):
    return np.full((*size, 3), value, np.uint8)


def half(size=(32, 48)):
    """A mask of the left half."""
    mask = np.zeros(size, np.uint8)
    mask[:, : size[1] // 2] = 255
    return mask


def blur(picture, sigma):
    return metrics.cv2.GaussianBlur(picture, (0, 0), sigma)


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    assert metrics.mse(flat(100), flat(151)) == pytest.approx(0.2**2)
    assert METRICS["psnr"].function(flat(100), flat(151)) == pytest.approx(-20 * math.log10(0.2))
    assert METRICS["psnr"].function(flat(0), flat(255)) == 0


def test_psnr_counts_pixels_by_the_mask():
    truth, output = flat(100), flat(100)
    output[:, 24:] = 151  # the right half is wrong
    psnr = METRICS["psnr"].function
    assert psnr(output, truth) == pytest.approx(-10 * math.log10(0.2**2 / 2))
    assert psnr(output, truth, 255 - half()) == pytest.approx(-20 * math.log10(0.2))
    assert psnr(output, truth, half()) == metrics.MOST_PSNR  # the mask excludes the error
    weights = np.where(half() > 0, 0.75, 0.25).astype(np.float32)
    assert psnr(output, truth, weights) == pytest.approx(-10 * math.log10(0.2**2 / 4))


def test_ssim_of_known_pictures(photographs):
    ssim = METRICS["ssim"].function
    assert ssim(photographs[0], photographs[0]) == pytest.approx(1)
    # Two flat pictures have no structure: what is left is (2ab + c) / (a^2 + b^2 + c), c = 0.01^2
    a, b, c = 0.2, 0.6, 0.01**2
    expected = (2 * a * b + c) / (a * a + b * b + c)
    assert ssim(flat(51), flat(153)) == pytest.approx(expected, abs=1e-4)
    output = flat(51)
    output[:, 24:] = 153
    far = half()
    far[:, 24 - 5 :] = 0  # no window there reaches the error
    assert ssim(output, flat(51), far) == pytest.approx(1, abs=1e-6)
    assert ssim(output, flat(51), 255 - half()) < 0.8


@pytest.mark.parametrize("name", ["psnr", "ssim", "st_lpips"])
def test_a_full_mask_is_no_mask(name, photographs):
    first, second = photographs[:2]
    whole = METRICS[name].function(first, second)
    full = np.ones(first.shape[:2], bool)
    assert METRICS[name].function(first, second, full) == pytest.approx(whole, rel=1e-5)
    same = Image.fromarray(first), Image.fromarray(second), Image.fromarray(full)
    assert METRICS[name].function(*same) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", ["psnr", "ssim", "st_lpips", "identity"])
def test_bad_input_is_one_sentence_and_an_empty_mask_is_nan(name, photographs):
    function = METRICS[name].function
    first = photographs[0]
    assert math.isnan(function(first, photographs[1], np.zeros(first.shape[:2], np.uint8)))
    with pytest.raises(ValueError, match="The output is 48x32 pixels and what it is compared with 128x128"):
        function(flat(0), first)
    with pytest.raises(ValueError, match=r"The mask has shape \(3, 3\)"):
        function(first, first, np.zeros((3, 3), np.uint8))
    with pytest.raises(ValueError, match="pass uint8"):
        function(first / 255, first)


# Perception -----------------------------------------------------------------------------------------------------------


def test_st_lpips_forgives_a_shift_and_not_a_blur(photographs):
    st_lpips = METRICS["st_lpips"].function
    for picture in photographs[:3]:
        assert st_lpips(picture, picture) == 0
        shifted = np.roll(picture, 2, axis=1)
        assert 0 < st_lpips(shifted, picture) < 0.05
        assert st_lpips(blur(picture, 3), picture) > 10 * st_lpips(shifted, picture)
    assert st_lpips(photographs[0], photographs[1]) > 0.5


def test_st_lpips_is_that_of_its_own_package(photographs):
    """0.78336 is what stlpips_pytorch 0.0.2 says, by LPIPS(net="alex", variant="shift_tolerant"), on a CPU."""
    assert METRICS["st_lpips"].function(*photographs[:2]) == pytest.approx(0.78336, abs=1e-3)


def test_st_lpips_in_a_mask_does_not_see_what_is_far(photographs):
    picture = photographs[0]
    output = picture.copy()
    output[:, 96:] = 255 - output[:, 96:]
    mask = np.zeros(picture.shape[:2], np.uint8)
    mask[:, :32] = 255
    near = METRICS["st_lpips"].function(output, picture, mask)
    assert 0 <= near < 0.2 * METRICS["st_lpips"].function(output, picture)


def test_identity_of_a_thing_does_not_see_the_rest(photographs):
    identity = METRICS["identity"].function
    picture = photographs[0]
    mask = np.zeros(picture.shape[:2], np.uint8)
    mask[32:80, 32:80] = 255
    output = picture.copy()
    output[100:] = 0
    assert identity(output, picture, mask) == pytest.approx(1)
    assert identity(output, picture) < 0.95
    assert identity(photographs[1], picture, mask) < 0.6


def test_identity_is_the_cosine_of_what_the_net_pools_before_it_names_a_class(photographs):
    """In pictures of the net's own 224 pixels, which nothing scales; 0.37269, of smaller ones, was computed once with
    the weights of `networks.EFFICIENTNET` and torch 2.13 on a CPU."""
    identity, net, pooled = METRICS["identity"].function, networks.efficientnet(), []
    pictures = [np.asarray(Image.fromarray(photograph).resize((224, 224))) for photograph in photographs[:2]]
    pixels = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2).to(next(net.parameters()))
    hook = net._avg_pooling.register_forward_hook(lambda module, given, made: pooled.extend(made.flatten(1)))
    with torch.inference_mode():
        net((pixels - 127) / 128)  # as the lite models were trained
    hook.remove()
    expected = torch.nn.functional.cosine_similarity(*pooled, dim=0).item()
    assert 0.2 < expected < 0.6
    assert identity(*pictures) == pytest.approx(expected, abs=1e-4)
    assert identity(*photographs[:2]) == pytest.approx(0.37269, abs=2e-3)  # TF32 takes 5e-4 off


def test_an_object_is_recognised_and_a_blob_or_a_blur_of_it_is_not(photographs):
    """64 real patches, pasted through one outline, which so tells nothing; asked of the eight with the most detail."""
    y, x = np.mgrid[:96, :96]
    mask = np.hypot((x - 48) / 30, (y - 48) / 36) < 1
    different = list({photograph.tobytes(): photograph for photograph in photographs}.values())
    corners = [(top, left) for top in (0, 40, 80) for left in (0, 40, 80)]
    patches = [picture[top : top + 48, left : left + 48] for picture in different for top, left in corners][:64]
    pasted = [np.where(mask[..., None], patch.repeat(2, 0).repeat(2, 1), np.uint8(200)) for patch in patches]
    assert len(pasted) == 64
    known = features(pasted, mask)

    recognised = {"shifted": 0, "darker": 0, "blob": 0, "blurred": 0, "blurred twice as much": 0}
    detailed = np.argsort([np.abs(patch - blur(patch, 6)).mean() for patch in np.stack(pasted).astype(np.float32)])[-8:]
    for i in detailed:
        flat_one, blurred = decoys(pasted[i], mask)
        candidates = known.clone()  # the decoys take the places of two others
        candidates[[(i + 1) % 64, (i + 2) % 64]] = features([flat_one, blurred], mask)
        outputs = {
            "shifted": np.roll(pasted[i], 1, axis=1),
            "darker": (pasted[i] * 0.8).astype(np.uint8),
            "blob": flat_one,
            "blurred": blurred,
            "blurred twice as much": np.where(mask[..., None], blur(pasted[i], 12), np.uint8(200)),
        }
        for (name, _), row in zip(outputs.items(), features(list(outputs.values()), mask), strict=True):
            recognised[name] += nearest_of(row, candidates) == i
    assert recognised == {"shifted": 8, "darker": 8, "blob": 0, "blurred": 0, "blurred twice as much": 0}


def test_decoys_keep_the_outline_and_what_is_around_it(photographs):
    picture = photographs[0]
    mask = np.zeros(picture.shape[:2], bool)
    mask[30:70, 40:90] = True
    blob, blurred = decoys(picture, mask)
    for decoy in (blob, blurred):
        assert np.array_equal(decoy[~mask], picture[~mask])
    assert len(np.unique(blob[mask], axis=0)) == 1
    assert np.abs(blob[mask][0] - picture[mask].mean(0)).max() <= 0.5
    assert blurred[mask].std() < picture[mask].std()


# Models that have to be named -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchvision_files(tmp_path_factory):
    """Random weights in torchvision's names, with the classifier that LPIPS has no use for."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("torchvision")
    for name, (make_layers, _) in networks.TRUNKS.items():
        weights = {f"features.{key}": value for key, value in make_layers().state_dict().items()}
        torch.save(weights | {"classifier.1.weight": torch.ones(2)}, folder / f"{name}.pth")
        save_file(weights, folder / f"{name}.safetensors")
    save_file({"features.0.weight": torch.ones(2)}, folder / "other.safetensors")
    (folder / "no.pth").write_bytes(b"no weights")
    return folder


@pytest.mark.parametrize("name", networks.TRUNKS)
def test_lpips_equals_that_of_torchmetrics(name, torchvision_files, photographs, monkeypatch):
    import torchmetrics.functional.image.lpips as theirs

    class Features(nn.Sequential):
        """As torchvision's trunks; torchmetrics takes their parts by number."""

    def trunk(net, pretrained):
        layers = networks.TRUNKS[name][0]()
        weights = torch.load(torchvision_files / f"{name}.pth", weights_only=True)
        layers.load_state_dict({k.removeprefix("features."): w for k, w in weights.items() if k.startswith("features")})
        return Features(*layers)

    monkeypatch.setattr(theirs, "_get_tv_model_features", trunk)
    net = theirs._NoTrainLpips(net=name)
    first, second = (torch.tensor(p).permute(2, 0, 1)[None].float() / 255 for p in photographs[:2])
    with torch.inference_mode():
        expected = net(first, second, normalize=True).item()
    metric = find_metrics([f"lpips={torchvision_files / f'{name}.pth'}"])["lpips"]
    assert metric.function(*photographs[:2]) == pytest.approx(expected, rel=1e-4)
    assert metric.function(photographs[0], photographs[0]) == 0
    again = find_metrics([f"lpips={torchvision_files / f'{name}.safetensors'}"])["lpips"]
    assert again.function(*photographs[:2]) == metric.function(*photographs[:2])


@pytest.mark.parametrize(
    "file, message", [("other.safetensors", "neither torchvision's AlexNet nor"), ("no.pth", "no weights that can be")]
)
def test_lpips_refuses_other_files(file, message, torchvision_files, photographs):
    with pytest.raises(ValueError, match=message):
        find_metrics([f"lpips={torchvision_files / file}"])["lpips"].function(*photographs[:2])


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A real CLIP with random weights, 32 pixels a side, in the layout of the hub."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    words = ["a", "c", "t", "</w>", "a</w>", "c</w>", "t</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = layers | {"vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": 7, "eos_token_id": 8}
    vision = layers | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_dino(tmp_path_factory):
    """A real vision transformer with random weights, as DINO's are saved."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **layers), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_clip_is_the_cosine_of_its_own_embeddings(tiny_clip, photographs):
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    found = find_metrics([f"clip_i={tiny_clip}", f"clip_t={tiny_clip}"])
    net, processor = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPImageProcessorPil.from_pretrained(tiny_clip)
    with torch.inference_mode():
        pixels = processor(images=[Image.fromarray(p) for p in photographs[:2]], return_tensors="pt")
        words = CLIPTokenizer.from_pretrained(tiny_clip)("a cat", return_tensors="pt")
        made = net(**pixels, **words)
    expected = float(made.image_embeds[0] @ made.image_embeds[1])
    assert found["clip_i"].function(photographs[0], photographs[1]) == pytest.approx(expected, abs=1e-5)
    assert found["clip_i"].function(photographs[0], photographs[0]) == pytest.approx(1)
    expected = float(made.image_embeds[0] @ made.text_embeds[0])
    assert found["clip_t"].function(photographs[0], "a cat") == pytest.approx(expected, abs=1e-5)
    assert found["clip_t"].function(photographs[0], "a cat " * 20) <= 1  # longer than the model takes


def test_dino_is_the_cosine_of_its_class_tokens(tiny_dino, photographs):
    from transformers import ViTImageProcessorPil, ViTModel

    dino = find_metrics([f"dino_i={tiny_dino}"])["dino_i"].function
    net, processor = ViTModel.from_pretrained(tiny_dino, add_pooling_layer=False).eval(), ViTImageProcessorPil
    pictures = [Image.fromarray(p) for p in photographs[:2]]
    with torch.inference_mode():
        tokens = net(**processor.from_pretrained(tiny_dino)(images=pictures, return_tensors="pt")).last_hidden_state
    expected = torch.nn.functional.cosine_similarity(tokens[0, 0], tokens[1, 0], dim=0).item()
    assert dino(*photographs[:2]) == pytest.approx(expected, abs=1e-5)
    assert dino(photographs[0], photographs[0]) == pytest.approx(1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("sharpness", "metric is 'sharpness': choose from psnr, ssim"),
        ("clip_i", "clip_i needs a model: write clip_i=PATH, with a CLIP such as openai/clip"),
        ("lpips", "lpips needs a model: write lpips=PATH, with torchvision's alexnet"),
        ("psnr=x", "psnr takes no model"),
    ],
)
def test_a_metric_that_cannot_be_had(text, message):
    with pytest.raises(ValueError, match=message):
        find_metrics(["ssim", text])


@pytest.mark.parametrize("model", ["nobody/nothing", "no/such/folder"])
def test_a_model_that_is_not_there_says_what_to_download(model, photographs):
    with pytest.raises(ValueError, match="model.safetensors have to be on the hub or in its cache"):
        find_metrics([f"clip_i={model}"])["clip_i"].function(*photographs[:2])


def test_a_trunk_of_lpips_that_is_not_there_says_what_to_download(photographs):
    with pytest.raises(ValueError, match=r"^no/such.pth is no file: download torchvision's alexnet-owt-7be5be79.pth"):
        find_metrics(["lpips=no/such.pth"])["lpips"].function(*photographs[:2])


@pytest.mark.parametrize("name, folder", [("dino_i", "tiny_dino"), ("clip_i", "tiny_clip")])
def test_pickled_weights_are_not_read(name, folder, request, tmp_path, photographs):
    copy = shutil.copytree(request.getfixturevalue(folder), tmp_path / "pickled")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors have to be in that folder"):
        find_metrics([f"{name}={copy}"])[name].function(*photographs[:2])


@pytest.mark.parametrize(
    "name, folder, weight",
    [("clip_i", "tiny_clip", "visual_projection.weight"), ("dino_i", "tiny_dino", "layernorm.weight")],
)
def test_weights_that_are_missing_are_not_made_up(name, folder, weight, request, tmp_path, photographs):
    copy = shutil.copytree(request.getfixturevalue(folder), tmp_path / "partial")
    weights = load_file(copy / "model.safetensors")
    del weights[next(key for key in weights if key.endswith(weight))]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"it lacks 1 weights, such as .*{weight}"):
        find_metrics([f"{name}={copy}"])[name].function(*photographs[:2])


def test_packaged_weights_have_to_be_the_known_ones(monkeypatch):
    networks.efficientnet.cache_clear()
    package, file, _ = networks.EFFICIENTNET
    monkeypatch.setattr(networks, "EFFICIENTNET", (package, file, "0" * 64))
    with pytest.raises(ValueError, match="has SHA-256 57934424"):
        networks.efficientnet()
    monkeypatch.setattr(networks, "EFFICIENTNET", ("no_such_package", file, "0" * 64))
    with pytest.raises(
        ValueError, match=r"no-such-package is not installed: `pip install 'sparse-context\[evaluate\]'`"
    ):
        networks.efficientnet()
