"""The VAE and its decoder: trained, restored, killed and continued."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from elsewhere import open_files
from PIL import Image
from tiny_scenes import make_tiny_vae, save_assets

from recipes.mini import vae
from recipes.mini.base import restore
from recipes.mini.export import export
from recipes.mini.run_folder import check_config
from recipes.mini.scenes import make_scene
from recipes.mini.vae import DecoderConfig, VaeConfig, decoded_sheet, load_vae, train_decoder, train_vae
from sparse_context.pipelines.embedded import WEIGHTS
from sparse_context.training.checkpoints import newest_step


def read_sheet(folder):
    with Image.open(folder / "sheet-0000002.png") as file:
        return np.asarray(file)


@pytest.mark.parametrize("data", [None, "{", "{}", "[1]", '{"seed": 0}'])
def test_without_its_settings_no_run_of_the_recipe_goes_on(data, tmp_path):
    (tmp_path / "step-0000001").mkdir()
    if data is not None:
        (tmp_path / "config.json").write_text(data)
    with pytest.raises(ValueError, match="config.json (cannot be read|is no record of a run)"):
        check_config(tmp_path, VaeConfig())
    (tmp_path / "step-0000001").rename(tmp_path / "step-0000000")
    check_config(tmp_path, VaeConfig())  # what was restored has seen no settings


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nothing tells what is mapped")
def test_a_vae_is_read_into_memory_so_that_another_can_take_its_place(pipe, tmp_path):
    """Windows moves no file that is mapped."""
    pipe.vae.save_pretrained(tmp_path / "vae" / "final")
    vae = load_vae(tmp_path)
    assert not [path for path in open_files() if path.startswith(os.path.realpath(tmp_path) + os.sep)]
    assert all(torch.equal(weight, pipe.vae.state_dict()[name]) for name, weight in vae.state_dict().items())


def test_a_restored_vae_goes_on_and_a_run_of_it_is_never_restored_over(assets, pipe, few_latents, tmp_path):
    save_assets(assets, tmp_path)
    restore(WEIGHTS, tmp_path)
    train_vae(tmp_path, VaeConfig(steps=2, batch=2, crop=32, lr=1e-6), workers=1)
    vae, before = load_vae(tmp_path).state_dict(), pipe.vae.state_dict()
    learned = [name for name in vae if not name.startswith("bn.")]
    assert any(not torch.equal(vae[name], before[name]) for name in learned)
    assert all(torch.allclose(vae[name], before[name], atol=1e-4) for name in learned)  # two small steps from there
    assert not torch.equal(vae["bn.running_mean"], before["bn.running_mean"])  # measured anew, on these pictures
    sheet = read_sheet(tmp_path / "vae")
    assert sheet.shape == (4 * 128, 4 * 256, 3)  # sixteen pictures, each beside its decoding
    picture = make_scene(assets.split("validation"), "edit_background", 100).references[0]
    assert np.array_equal(sheet[:128, :128], picture)
    assert np.abs(sheet[:128, 128:256].astype(int) - picture).mean() < 30  # the photographs here are noise
    assert np.array_equal(sheet, decoded_sheet(load_vae(tmp_path), assets))  # of the averaged weights
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileExistsError, match="vae is there already: move it away"):
        restore(WEIGHTS, tmp_path)
    with pytest.raises(ValueError, match="was begun with steps 2, not 100: continue it with its own"):
        train_vae(tmp_path, VaeConfig(steps=100, batch=2, crop=32))
    (tmp_path / "moved").rename(tmp_path / "base")
    with pytest.raises(ValueError, match="was trained after the base, which has to follow: run `base`"):
        export(tmp_path, tmp_path / "weights")


def test_by_the_clock_a_vae_is_done_when_the_time_is_up(assets, tiny_parts, few_latents, tmp_path):
    save_assets(assets, tmp_path)
    config = VaeConfig(steps=100, batch=2, crop=32)
    train_vae(tmp_path, config, seconds=60, stop_after=0)  # one step, and time is left
    assert newest_step(tmp_path / "vae") == 1 and not (tmp_path / "vae" / "final").exists()
    train_vae(tmp_path, config, seconds=1e-3)  # by the clock: one step more
    assert newest_step(tmp_path / "vae") == 2 and (tmp_path / "vae" / "final").is_dir()


def test_a_crop_that_the_vae_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="crop is 30: pass a multiple of 4"):
        VaeConfig(crop=30)


def test_a_kill_after_the_last_step_of_a_restored_vae_loses_nothing(assets, few_latents, tmp_path, monkeypatch):
    save_assets(assets, tmp_path)
    make_tiny_vae().save_pretrained(tmp_path / "vae" / "final")
    final, config = tmp_path / "vae" / "final", VaeConfig(steps=1, batch=2, crop=32)
    before = load_vae(tmp_path).state_dict()

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vae, "measure_latents", killed)
        with pytest.raises(KeyboardInterrupt):
            train_vae(tmp_path, config)
    assert newest_step(tmp_path / "vae") == 1
    final.rename(final.with_suffix(".old"))  # as a kill leaves it between the renames
    assert all(torch.equal(weight, before[name]) for name, weight in load_vae(tmp_path).state_dict().items())
    train_vae(tmp_path, config)
    assert not torch.equal(load_vae(tmp_path).state_dict()["encoder.conv_in.weight"], before["encoder.conv_in.weight"])
    at = final.stat().st_ino
    train_vae(tmp_path, config)  # done, and so left as it is, with whatever a decoder's run made of it
    assert final.stat().st_ino == at


# Under autocast torch says once that RMS norm, whose weights stay float32, is not fused
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_decoder_is_trained_and_latents_stay(assets, pipe, tmp_path):
    save_assets(assets, tmp_path)
    restore(WEIGHTS, tmp_path)
    train_decoder(tmp_path, DecoderConfig(steps=2, batch=2))
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == ["final"]
    vae = load_vae(tmp_path)
    changed = {
        name.split(".")[0]
        for name, weight in vae.state_dict().items()
        if not torch.equal(weight, pipe.vae.state_dict()[name])
    }
    assert changed == {"decoder", "post_quant_conv"}
    assert np.array_equal(read_sheet(tmp_path / "decoder"), decoded_sheet(vae, assets))
    assert newest_step(tmp_path / "decoder") == 0  # run again, it does so once more
