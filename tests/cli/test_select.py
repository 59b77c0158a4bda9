"""`sparse-context select` as its users meet it."""

import json
import subprocess
import sys

import pytest

from cli.shared import coloured_cells, listing, odd_pictures, pixels


def test_odd_pictures_are_selected_and_drawn(command, tmp_path):
    (tmp_path / "odd").mkdir()
    paths = odd_pictures(tmp_path / "odd")
    code, out, err = command("select", *paths, "--output", "tökens 猫.png", "--json", "--token", "8")
    assert (code, err) == (0, "")
    grids = {path.name: tuple(r["grid"]) for path, r in zip(paths, json.loads(out)["references"], strict=True)}
    assert grids.pop("turned.jpg") == (12, 8)
    assert grids.pop("tiny.png") == (8, 8)
    assert grids.pop("very wide.png") == (31, 250)
    assert grids.pop("very tall.png") == (250, 31)
    assert set(grids.values()) == {(8, 12)}
    assert len(pixels("tökens 猫.png")) > 384


def test_select_draws_what_it_tells(command):
    code, out, err = command("select", "{in}/a.png", "--token", "8", "--selector", "detail=1,uniform=1", "--keep", "13")
    assert (code, err) == (0, "")
    assert out.startswith("reference 1: 13 of 64 tokens (20 %) by 0.5 detail + 0.5 uniform\n")
    assert out.endswith("\nwrote tokens.png\n")
    assert [len(cells) for cells in coloured_cells("tokens.png")] == [13]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selector", "without"),
    [("contrast=1,edges=1,mask=1", "torch diffusers transformers"), ("saliency=1,mask=1", "diffusers transformers")],
)
def test_select_loads_torch_only_for_the_net(selector, without, inputs, tmp_path):
    code = f"""
import sys
from sparse_context.cli import main
from sparse_context.pipelines.embedded import ADAPTERS
try:
    main()
except SystemExit as end:
    assert end.code == 0
assert not set({without.split()}) & set(sys.modules)
"""
    arguments = ["select", inputs / "wide.png", "--mask", inputs / "band.png", "--selector", selector]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert listing(tmp_path) == ["tokens.png"]
