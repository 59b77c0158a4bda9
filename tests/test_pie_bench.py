"""PIE-Bench: a folder in exactly its format, and its metrics on known values."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_evaluation_metrics import tiny_clip, tiny_dino  # noqa: F401
from tiny import picture

from sparse_context.cli import main
from sparse_context.evaluation.metrics import find_metrics, lpips, psnr, ssim, st_lpips
from sparse_context.evaluation.networks import alexnet_layers
from sparse_context.evaluation.pie_bench import PIE_METRICS, decode_mask, read_pie_bench

# A box of 3 rows by 4 columns with its corner at (100, 200), in the benchmark's own coding: over the pixels row by row
BOX = [100 * 512 + 200, 4, 101 * 512 + 200, 4, 102 * 512 + 200, 4]


@pytest.fixture(scope="module")
def pie(tmp_path_factory):
    """Two entries as they are in mapping_file.json, with their pictures of 512 x 512 pixels."""
    folder = tmp_path_factory.mktemp("PIE-Bench_v1")
    entries = {
        "000000000000": {
            "image_path": "0_random_140/000000000000.jpg",
            "original_prompt": "a slanted mountain bicycle on the road in front of a building",
            "editing_prompt": "a slanted [rusty] mountain bicycle on the road in front of a building",
            "editing_instruction": "Make the frame of the bike rusty",
            "editing_type_id": "0",
            "blended_word": "bicycle bicycle",
            "mask": BOX,
        },
        "924000000003": {
            "image_path": "9_change_style_80/1_artificial/1_animal/924000000003.jpg",
            "original_prompt": "a cat",
            "editing_prompt": "[watercolor of] a cat",
            "editing_instruction": "",
            "editing_type_id": "9",
            "blended_word": "",
            "mask": [0, 512 * 512],
        },
    }
    for i, entry in enumerate(entries.values()):
        path = folder / "annotation_images" / entry["image_path"]
        path.parent.mkdir(parents=True)
        picture(512, 512, seed=i).save(path)
    (folder / "mapping_file.json").write_text(json.dumps(entries))
    return folder


def test_a_folder_is_read_in_its_order(pie):
    first, second = read_pie_bench(pie)
    assert (first.name, second.name) == ("000000000000", "924000000003")
    assert first.prompt == "Make the frame of the bike rusty"
    assert first.caption == "a slanted rusty mountain bicycle on the road in front of a building"
    assert second.prompt == second.caption == "watercolor of a cat"  # without an instruction
    assert second.source_caption == "a cat"
    assert (first.task, second.task) == ("random", "change style")
    assert (first.phrases, second.phrases) == (("bicycle",), (None,))
    assert first.open_image() is None
    assert first.open_references()[0].size == (512, 512)
    assert np.array_equal(np.asarray(first.open_reference_masks()[0]), decode_mask(BOX))


def test_paths_with_the_backslashes_of_windows_are_read(pie, tmp_path):
    entries = json.loads((pie / "mapping_file.json").read_text())
    for entry in entries.values():
        entry["image_path"] = entry["image_path"].replace("/", "\\")
    (tmp_path / "mapping_file.json").write_text(json.dumps(entries))
    shutil.copytree(pie / "annotation_images", tmp_path / "annotation_images")
    assert [sample.open_references()[0].size for sample in read_pie_bench(tmp_path)] == [(512, 512)] * 2


def test_masks_are_runs_over_the_pixels_row_by_row():
    mask = decode_mask(BOX)
    assert mask.shape == (512, 512) and set(np.unique(mask)) == {0, 255}
    assert (mask[100:103, 200:204] == 255).all()
    assert (mask[1:-1, 1:-1] == 255).sum() == 12
    for rim in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
        assert (rim == 255).all()
    assert (decode_mask([512 * 512 - 600, 10_000]).reshape(-1)[-600:] == 255).all()  # cut at the end of the picture
    assert (decode_mask([5 * 512 + 500, 24])[5, 500:] == 255).all() and decode_mask([5 * 512 + 500, 24])[6, 11] == 255
    assert (decode_mask([])[1:-1, 1:-1] == 0).all()
    for bad in ([1, 2, 3], [-1, 2], [0.5, 2]):
        with pytest.raises(ValueError, match="no list of start and length"):
            decode_mask(bad)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"editing_prompt": None}, "is not as in PIE-Bench"),
        ({"original_prompt": None}, "is not as in PIE-Bench"),
        ({"editing_type_id": "12"}, "is not as in PIE-Bench"),
        ({"editing_type_id": "-1"}, "is not as in PIE-Bench"),
        ({"mask": "none"}, "is not as in PIE-Bench"),
        ({"mask": [1]}, "no list of start and length"),
    ],
)
def test_an_odd_entry_is_named(change, message, pie, tmp_path):
    entries = json.loads((pie / "mapping_file.json").read_text())
    entries["924000000003"] |= change
    (tmp_path / "mapping_file.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=f"entry 924000000003.*{message}"):
        read_pie_bench(tmp_path)
    del entries["000000000000"]["image_path"]
    (tmp_path / "mapping_file.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="entry 000000000000.*it has no 'image_path'"):
        read_pie_bench(tmp_path)


@pytest.mark.parametrize("text, message", [(None, "no PIE-Bench folder"), ("{", "cannot be"), ("[]", "no entries")])
def test_another_folder_is_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "mapping_file.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pie_bench(tmp_path)


# Its metrics ----------------------------------------------------------------------------------------------------------


def test_background_metrics_black_out_the_edit(tmp_path):
    source, output = picture(64, 64), picture(64, 64).copy()
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    pixels = np.array(output)
    pixels[:, :32] = 0
    output = Image.fromarray(pixels)
    unedited = {name: metric.function for name, metric in PIE_METRICS.items() if name.endswith("unedit_part")}
    assert unedited["psnr_unedit_part"](output, source, mask) == 100
    assert unedited["mse_unedit_part"](output, source, mask) == 0
    assert unedited["ssim_unedit_part"](output, source, mask) == pytest.approx(1)
    assert unedited["st_lpips_unedit_part"](output, source, mask) == 0
    everything = np.full((64, 64), 255, np.uint8)
    assert all(
        math.isnan(unedited[name](output, source, everything)) for name in unedited if name != "lpips_unedit_part"
    )
    trunk = tmp_path / "alexnet.safetensors"
    torch.manual_seed(0)
    save_file({f"features.{name}": tensor for name, tensor in alexnet_layers().state_dict().items()}, trunk)
    part = unedited["lpips_unedit_part"]
    assert part(output, source, mask, model=str(trunk)) == pytest.approx(0, abs=1e-6)
    assert math.isnan(part(output, source, everything, model=str(trunk)))
    other = picture(64, 64, seed=1)
    black = [Image.fromarray(np.where(mask[..., None] > 0, np.uint8(0), np.asarray(each))) for each in (other, source)]
    assert part(other, source, mask, model=str(trunk)) == pytest.approx(lpips(*black, model=str(trunk)))
    assert part(other, source, mask, model=str(trunk)) > 0
    # An error of 51 in the right half counts over the whole picture, as in the benchmark's own code
    pixels = np.full((64, 64, 3), 100, np.uint8)
    shifted = pixels.copy()
    shifted[:, 32:] += 51
    assert unedited["mse_unedit_part"](shifted, pixels, mask) == pytest.approx(0.2**2 / 2)
    assert unedited["psnr_unedit_part"](shifted, pixels, mask) == pytest.approx(psnr(shifted, pixels))


@pytest.mark.parametrize("name, function", [("ssim_unedit_part", ssim), ("st_lpips_unedit_part", st_lpips)])
def test_where_the_background_changed_too_they_are_of_both_pictures_with_the_edit_made_black(name, function):
    source = np.asarray(picture(64, 64))
    output = 255 - source
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :44] = 255
    black = [np.where(mask[..., None] > 0, np.uint8(0), each) for each in (output, source)]
    value = PIE_METRICS[name].function(output, source, mask)
    assert value == pytest.approx(function(*black))
    assert 0.05 < value < 0.95
    for other in (function(output, source), PIE_METRICS[name].function(output, source, 255 - mask)):
        assert value != pytest.approx(other, abs=0.02)  # neither everything nor the edit


def test_structure_distance_is_that_of_the_last_keys(tiny_dino):  # noqa: F811
    from transformers import ViTModel

    distance = find_metrics([f"structure_distance={tiny_dino}"], PIE_METRICS)["structure_distance"].function
    first, second = picture(32, 32), picture(32, 32, seed=1)
    assert distance(first, first) == 0
    net = ViTModel.from_pretrained(tiny_dino, add_pooling_layer=False).eval()
    last = [module for module in net.modules() if hasattr(module, "layernorm_before")][-1]
    similarity = []
    for each in (first, second):
        x = torch.tensor(np.asarray(each)).permute(2, 0, 1)[None].float()  # as in the benchmark's own code
        x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        with torch.inference_mode():
            before = net(pixel_values=x, output_hidden_states=True).hidden_states[-2]
            keys = last.attention.k_proj(last.layernorm_before(before))[0]
        similarity.append(torch.stack([torch.nn.functional.cosine_similarity(k[None], keys) for k in keys]))
    expected = (similarity[0] - similarity[1]).square().mean().item()
    assert expected > 0
    assert distance(first, second) == pytest.approx(expected, rel=1e-3)


def test_clip_similarity_is_of_the_caption_and_of_the_edited_part(tiny_clip):  # noqa: F811
    names = ("clip_similarity_target_image", "clip_similarity_target_image_edit_part")
    whole, part = (find_metrics([f"{name}={tiny_clip}"], PIE_METRICS)[name].function for name in names)
    image = picture(64, 64)
    mask = np.zeros((64, 64), np.uint8)
    mask[10:40, 10:40] = 255
    cut = np.where(mask[..., None] > 0, np.asarray(image), np.uint8(0))
    cosine = find_metrics([f"clip_t={tiny_clip}"])["clip_t"].function(image, "a cat")
    assert whole(image, "a cat") == pytest.approx(max(0, 100 * cosine))
    assert part(image, "a cat", mask) == pytest.approx(whole(Image.fromarray(cut), "a cat"))


def test_the_command_evaluates_it(pie, tiny_model, tiny_clip, tiny_dino, tmp_path, monkeypatch, capsys):  # noqa: F811
    names = [
        "psnr_unedit_part",
        f"structure_distance={tiny_dino}",
        f"clip_similarity_source_image={tiny_clip}",
        f"clip_similarity_target_image_edit_part={tiny_clip}",
    ]
    arguments = [
        "evaluate",
        "--benchmark",
        "pie-bench",
        "--data",
        str(pie),
        "-m",
        str(tiny_model),
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--keep",
        "0.5",
        "--selector",
        "mask",
        "--output",
        str(tmp_path),
    ]
    for name in names:
        arguments += ["--metric", name]
    monkeypatch.setattr(sys, "argv", ["sparse-context", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, capsys.readouterr().err
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert list(figures) == ["all", "random", "change style"]
    assert figures["random"]["dense"]["scores"].keys() == {name.partition("=")[0] for name in names}
    scores = figures["change style"]["dense"]["scores"]
    (second,) = read_pie_bench(pie)[1:]
    similarity = find_metrics([f"clip_similarity_target_image={tiny_clip}"], PIE_METRICS)[
        "clip_similarity_target_image"
    ]
    own = similarity.function(second.open_references()[0], "a cat")
    assert scores["clip_similarity_source_image"]["mean"] == pytest.approx(own, abs=1e-5)
    assert "psnr_unedit_part" not in scores  # there is nothing but the edit
    assert figures["all"]["dense"]["scores"]["psnr_unedit_part"]["n"] == 1
