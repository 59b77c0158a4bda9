"""Selecting by a model that cuts pictures out: ONNX files made in code, sessions, and functions."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import CASES
from tiny_finders import scene

from sparse_context import SparseContextConfig, apply_sparse_context, last_selection, matting, select_tokens
from sparse_context.cache import ReferenceCache
from sparse_context.selectors.registry import name_of
from sparse_context.selectors.text import Text

onnx = pytest.importorskip("onnx", reason="the ONNX models of these tests are made with it")
onnxruntime = pytest.importorskip("onnxruntime", reason="what reads ONNX models")

GRID = (8, 8)
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}  # the model gets pixels in [0, 1]


def save(path, kernel=(4.0, -2.0, -2.0), bias=-1.0, side=64, outputs=1, probabilities=False, inputs=1):
    """An ONNX model: of each pixel kernel * pixel + bias, by default above 0 where it is red; and its sigmoid."""
    from onnx import TensorProto, helper

    size = [1, 3, side, side]
    weights = np.array(kernel * outputs, np.float32).reshape(outputs, 3, 1, 1)
    constants = [
        onnx.numpy_helper.from_array(weights, "w"),
        onnx.numpy_helper.from_array(np.float32([bias] * outputs), "b"),
    ]
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["map"])]
    nodes += [helper.make_node("Sigmoid", ["map"], ["said"])] if probabilities else []
    takes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name in ("x", "y")[:inputs]]
    gives = helper.make_tensor_value_info("said" if probabilities else "map", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "cut out", takes, [gives], constants)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def scores_of(selector, image, grid=GRID):
    return selector(image, grid, np.random.default_rng(0))


def pixels(width=64, height=64, seed=0):
    return np.asarray(scene(width, height, seed=seed))


@pytest.mark.parametrize(("size", "grid"), [((64, 64), (8, 8)), ((128, 64), (8, 16)), ((64, 32), (4, 8))])
def test_scores_are_the_model_s_own_probabilities(size, grid, tmp_path):
    image = pixels(*size)
    scores = scores_of(matting(save(tmp_path / "m.onnx"), **PLAIN), image, grid)
    values = image.astype(np.float32) / 255
    logits = 4 * values[..., 0] - 2 * values[..., 1] - 2 * values[..., 2] - 1
    rows, columns = grid
    cells = (1 / (1 + np.exp(-logits))).reshape(rows, size[1] // rows, columns, size[0] // columns).mean((1, 3))
    assert scores.dtype == np.float32 and np.allclose(scores, cells, atol=0.02)
    corner = np.zeros(grid, bool)
    corner[: rows // 2, : columns // 2] = True
    assert np.array_equal(scores > 0.5, corner)
    assert scores.max() < 0.95 and scores.min() > 0.2  # stretched to their own range they would be 0 and 1


def test_a_picture_without_a_subject_is_low_all_over(tmp_path):
    scores = scores_of(matting(save(tmp_path / "m.onnx"), **PLAIN), np.full((64, 64, 3), 128, np.uint8))
    assert np.allclose(scores, 1 / (1 + np.exp(1)), atol=1e-3)


def test_mean_std_and_size_are_arguments(tmp_path):
    mean, std = (0.5, 0.25, 0.125), (0.5, 0.25, 2.0)
    path = save(tmp_path / "m.onnx", kernel=(0.5, 0.25, 4.0), bias=-3.0)
    image = np.full((32, 48, 3), (51, 102, 204), np.uint8)
    logit = 0.5 * (0.2 - 0.5) / 0.5 + 0.25 * (0.4 - 0.25) / 0.25 + 4 * (0.8 - 0.125) / 2 - 3
    scores = scores_of(matting(path, mean=mean, std=std), image, (4, 6))
    assert np.allclose(scores, 1 / (1 + np.exp(-logit)), atol=1e-5)
    imagenet = (np.float32([51, 102, 204]) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    expected = 1 / (1 + np.exp(3 - imagenet @ (0.5, 0.25, 4.0)))
    assert np.allclose(scores_of(matting(path), image, (4, 6)), expected, atol=1e-5)
    any_size = save(tmp_path / "any.onnx", side="side")
    seen = []
    session = onnxruntime.InferenceSession(any_size)

    class Watched:
        get_inputs = session.get_inputs

        def run(self, names, feed):
            seen.append(feed["x"].shape)
            return session.run(names, feed)

    for size in (None, 32, (16, 48)):
        scores_of(matting(Watched(), size=size), image, (4, 6))
    assert seen == [(1, 3, 1024, 1024), (1, 3, 32, 32), (1, 3, 16, 48)]


def test_a_session_and_a_function_are_as_good_as_a_file(tmp_path):
    path = save(tmp_path / "m.onnx")
    image = pixels()
    by_file = matting(path, **PLAIN)
    by_session = matting(onnxruntime.InferenceSession(path), **PLAIN)
    assert np.array_equal(scores_of(by_file, image), scores_of(by_session, image))
    seen = []

    def red(shown):
        seen.append((shown.mode, shown.size))
        return np.asarray(shown)[..., 0] > 200

    by_function = matting(red)
    assert np.array_equal(scores_of(by_function, image), scores_of(by_file, image) > 0.5)
    assert (
        seen == [("RGB", (64, 64))] and by_function.label == "matting by red" and by_file.label == "matting by m.onnx"
    )
    small = matting(lambda shown: shown.resize((8, 8)).getchannel("R").point(lambda v: 255 * (v > 180)))
    assert np.array_equal(scores_of(small, np.dstack([image, image[..., 0]])), scores_of(by_function, image))
    floats = matting(lambda shown: np.asarray(shown, np.float32)[..., 0] / 255)
    assert np.allclose(scores_of(floats, image), image[..., 0].reshape(8, 8, 8, 8).mean((1, 3)) / 255, atol=1e-5)


def test_a_picture_that_is_cut_out_counts_by_its_alpha():
    """As functions give it that cut a picture out: transparent outside, and inside as dark as it was."""
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))

    def cut_out(picture):
        dark = Image.new("RGB", picture.size)
        dark.putalpha(mask)
        return dark

    scores = matting(cut_out)(np.zeros((32, 32, 3), np.uint8), (2, 2), np.random.default_rng(0))
    assert scores.tolist() == [[1, 0], [1, 0]]


def test_it_takes_what_says_probabilities_only_if_that_was_said(tmp_path):
    logits, said = save(tmp_path / "l.onnx"), save(tmp_path / "p.onnx", probabilities=True)
    by_logits = scores_of(matting(logits, **PLAIN), pixels())
    assert np.allclose(by_logits, scores_of(matting(said, output="probabilities", **PLAIN), pixels()), atol=1e-6)
    with pytest.raises(ValueError, match="and output is 'logits': pass output='probabilities'.$"):
        scores_of(matting(said, **PLAIN), pixels())
    with pytest.raises(
        ValueError, match="runs from -1.* to 1.*, and output is 'probabilities': pass output='logits'.$"
    ):
        scores_of(matting(logits, output="probabilities", **PLAIN), pixels())


def test_a_cache_remembers_a_file_and_not_a_function(tmp_path):
    path = save(tmp_path / "m.onnx")
    names = {name_of(matting(path)), name_of(matting(path, **PLAIN)), name_of(matting(path, size=32))}
    assert len(names) == 3 and name_of(matting(path)) in names
    save(path, bias=-0.5)
    assert name_of(matting(path)) is not None and name_of(matting(lambda shown: shown)) is None
    cache = ReferenceCache()
    config = SparseContextConfig(selector=matting(path, **PLAIN), keep=0.25)
    first, again = (select_tokens([pixels()], [GRID], config, score=cache.score) for _ in range(2))
    assert np.array_equal(first.index, again.index) and (cache.hits, cache.misses) == (1, 1)


def test_a_pipeline_selects_by_it_alone_and_in_a_blend(tmp_path):
    case = CASES["klein"]
    pipe = case.build()
    by_file = matting(save(tmp_path / "m.onnx"), **PLAIN)
    apply_sparse_context(pipe, keep=0.25, selector=by_file)
    case.call(pipe, [scene(76, 92)])
    (kept,) = last_selection(pipe).references
    assert kept.selector == "matting by m.onnx" and kept.mask[:6, :5].sum() == kept.mask.sum()
    blended = SparseContextConfig(selector={by_file: 0.5, "edges": 0.5})
    assert select_tokens([pixels()], [GRID], blended).references[0].selector == "0.5 matting by m.onnx + 0.5 edges"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model": "no.onnx"}, "The matting model no.onnx does not exist: pass an ONNX file."),
        ({"model": 3}, "3 cuts nothing out: pass an ONNX file, an InferenceSession of one, or a function."),
        ({"output": "both"}, "output is 'both': choose one of logits, probabilities."),
        ({"mean": (0, 0)}, r"mean is \(0, 0\) and std .*: pass three numbers each, those of std above 0."),
        ({"std": (1, 1, 0)}, r"mean is .* and std \(1, 1, 0\): pass three numbers each, those of std above 0."),
        ({"size": 2.5}, r"size is 2.5: pass a number of pixels, or \(height, width\)."),
        ({"size": True}, r"size is True: pass a number of pixels, or \(height, width\)."),
        ({"size": (3, 0)}, r"size is \(3, 0\): pass a number of pixels, or \(height, width\)."),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        matting(**{"model": save(tmp_path / "m.onnx"), **arguments})


def test_bad_models_and_masks_are_one_sentence(tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match="text.onnx cannot be read .*: pass an ONNX file.$"):
        scores_of(matting(tmp_path / "text.onnx"), pixels())
    two = matting(save(tmp_path / "two.onnx", outputs=2), **PLAIN)
    with pytest.raises(ValueError, match=r"gives one map, and this one gave an array of shape \(1, 2, 64, 64\)"):
        scores_of(two, pixels())
    more = matting(save(tmp_path / "more.onnx", inputs=2), **PLAIN)
    with pytest.raises(ValueError, match="takes one input"):
        scores_of(more, pixels())
    for made, sentence in {
        (lambda shown: "mask"): r"matting by <lambda> returned",
        (lambda shown: np.zeros((4, 4, 3))): r"returned an array of shape \(4, 4, 3\): return a mask",
        (lambda shown: np.full((4, 4), 2.0)): "returned values from 2 to 2: return floats in",
        (lambda shown: np.full((4, 4), -3)): "returned values from -3 to -3: return floats",
        (lambda shown: np.full((4, 4), np.nan)): "returned values from nan to nan",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            scores_of(matting(made), pixels())
    with pytest.raises(ValueError, match="'matting' needs the picture's pixels"):
        scores_of(two, None)


def test_without_onnxruntime_the_sentence_says_what_to_install(tmp_path):
    path = save(tmp_path / "m.onnx")
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
import numpy as np
from sparse_context import matting
try:
    matting({str(path)!r})(np.zeros((64, 64, 3), np.uint8), (8, 8), None)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == (
        "onnxruntime is not installed: pip install 'sparse-context[onnx]'.",
        "",
    )


def test_nothing_is_told_to_the_makers_of_onnx_runtime(tmp_path):
    """Before it reports anything it writes the number of its session into the folder of temporary files."""
    path = save(tmp_path / "m.onnx")
    code = f"""
import numpy as np
from sparse_context import matting
matting({str(path)!r})(np.zeros((64, 64, 3), np.uint8), (8, 8), None)
"""
    environment = {name: text for name, text in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], env={**environment, "TMPDIR": str(tmp_path)}, check=True, timeout=120)
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]


def test_a_phrase_and_a_cut_out_may_be_blended(clipseg, tmp_path):
    by_file = matting(save(tmp_path / "m.onnx"), **PLAIN)
    by_text = Text("red", str(clipseg))
    config = SparseContextConfig(keep=0.25, selector={by_file: 0.5, by_text: 0.5}, task="subject")
    (kept,) = select_tokens([pixels()], [GRID], config).references
    own = scores_of(by_text, pixels())
    assert np.allclose(kept.scores, (scores_of(by_file, pixels()) + own) / 2, atol=1e-6)
