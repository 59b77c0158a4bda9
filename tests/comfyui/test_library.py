"""What a node says where its library is missing, or a part of it."""

import pytest
from comfyui_core import ROOT
from test_layers import run_without

CODE = f"""
sys.path.insert(0, {str(ROOT / "runs")!r})
import importlib
from comfyui_core import load_pack
load_pack()
from sparse_context_nodes.card import card
from sparse_context_nodes.library import library
try:
    with library():
        importlib.import_module("sparse_context_nodes.building")
except ImportError as error:
    print(error)
print(card("It says so.").width)
"""


@pytest.mark.parametrize(
    ("package", "sentence"),
    [
        ("cv2", "cv2 is not installed: pip install opencv-python-headless."),
        ("sparse_context", "The library of these nodes is not installed: pip install sparse-context."),
        ("diffusers", None),
    ],
)
def test_a_missing_part_is_one_sentence_and_the_node_can_still_draw(package, sentence):
    done = run_without([package], CODE)
    assert (done.stdout.splitlines(), done.stderr) == ([*filter(None, [sentence]), "512"], "")
