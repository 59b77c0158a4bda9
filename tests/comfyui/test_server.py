"""Whole graphs in a real ComfyUI: over its HTTP API, and by hand in its front end, with tiny models."""

import json
import os
import warnings

import numpy as np
import pytest
from app_browser import find_browser, running_browser
from comfyui_front_end import arrange, load_graph, opened, read_graph, run_by_hand
from comfyui_server import example_pictures, fetch, run_graph, running_server
from comfyui_workflows import UI, WORKFLOWS, small
from PIL import Image
from sparse_context_nodes.words import TIPS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "COMFYUI_DIR" not in os.environ,
        reason="COMFYUI_DIR is not set: the path of a checkout of ComfyUI, whose requirements this Python has",
    ),
]
ONE = "FLUX.2 klein 4B - one reference"
TWO = "FLUX.2 klein 4B - two references"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("comfyui")


@pytest.fixture(scope="module")
def address(folder):
    with running_server(folder, example_pictures()) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome is installed: apt-get install chromium")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Playwright's own
        with running_browser(program) as browser:
            yield browser


@pytest.fixture(scope="module")
def page(address, browser):
    with opened(address, browser) as page:
        yield page


def graph_of(title, **settings):
    """The graph of a workflow, small, with other settings of Sparse Context; None removes an input."""
    nodes = small(WORKFLOWS[title]().nodes)
    inputs = nodes[number_of(nodes, "SparseContext")]["inputs"]
    inputs.update({name: value for name, value in settings.items() if value is not None})
    for name, value in settings.items():
        if value is None:
            del inputs[name]
    return nodes


def number_of(nodes, kind):
    return next(number for number, node in nodes.items() if node["class_type"] == kind)


def without_nodes(nodes):
    """The same graph without Sparse Context."""
    sparse, report = number_of(nodes, "SparseContext"), number_of(nodes, "SparseContextReport")
    instead = {sparse: nodes[sparse]["inputs"]["model"], report: nodes[report]["inputs"]["latent"]}
    left = {number: node for number, node in nodes.items() if number not in instead}
    for node in left.values():
        node["inputs"] = {
            name: instead.get(value[0], value) if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
    return left


def run(address, folder, nodes):
    """The picture that a graph makes, the report, and the picture in the node (or None)."""
    ended = run_graph(address, nodes)
    assert ended["status"]["status_str"] == "success", ended["status"]
    outputs = ended["outputs"]
    (saved,) = outputs[number_of(nodes, "SaveImage")]["images"]
    with Image.open(folder / "output" / saved["subfolder"] / saved["filename"]) as image:
        made = np.asarray(image)
    if not any(node["class_type"] == "SparseContext" for node in nodes.values()):
        return made, None, None
    (report,) = outputs[number_of(nodes, "SparseContextReport")]["text"]
    (shown,) = outputs[number_of(nodes, "SparseContext")]["images"]
    with Image.open(folder / "temp" / shown["subfolder"] / shown["filename"]) as image:
        image.load()
    return made, report, image


# The API --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", TIPS)
def test_every_input_and_output_has_its_tooltip(address, node):
    info = fetch(f"{address}/object_info/{node}")[node]
    inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
    assert {name: how[1]["tooltip"] for name, how in inputs.items()} == {
        name: tip for name, tip in TIPS[node].items() if name != "description" and not name.startswith("out_")
    }
    assert info["output_tooltips"] == [tip for name, tip in TIPS[node].items() if name.startswith("out_")]
    assert info["description"] == TIPS[node]["description"]


@pytest.mark.parametrize("title", WORKFLOWS)
def test_a_workflow_runs(address, folder, title):
    made, report, shown = run(address, folder, graph_of(title))
    assert made.shape[2] == 3
    lines = report.splitlines()
    count = sum(node["class_type"] == "LoadImage" for node in graph_of(title).values())
    assert [line.split(":")[0] for line in lines[:count]] == [f"reference {i}" for i in range(1, count + 1)]
    assert lines[count].startswith("total: ")
    assert "(20 %)" in lines[count]
    assert lines[-1].startswith("The model's steps should be about ")
    assert shown.height > 384


def test_keeping_all_is_the_graph_without_the_node(address, folder):
    made, report, _ = run(address, folder, graph_of(TWO, keep=1.0))
    assert np.array_equal(made, run(address, folder, without_nodes(graph_of(TWO)))[0])
    assert "total: 128 of 128 tokens (100 %)" in report


def test_without_pictures_latents_decide(address, folder):
    nodes = graph_of(TWO, **{"images.image1": None, "images.image2": None})
    made, report, shown = run(address, folder, nodes)
    assert "13 of 64 tokens (20 %) by detail of the latents" in report
    assert shown.width == 512
    assert not np.array_equal(made, run(address, folder, without_nodes(graph_of(TWO)))[0])


def test_an_overview_is_encoded_by_the_vae(address, folder):
    vae = [number_of(graph_of(ONE), "VAELoader"), 0]
    with_vae, report, _ = run(address, folder, graph_of(ONE, keep=0.25, overview="4", vae=vae))
    averaged, _, _ = run(address, folder, graph_of(ONE, keep=0.25, overview="4"))
    rule = "0.5 residual + 0.5 subject"
    assert report.startswith(f"reference 1: 16 of 64 tokens (25 %): 4 of an overview by 4, 12 sharp by {rule}")
    assert not np.array_equal(with_vae, averaged)


def test_a_phrase_is_looked_for(address, folder, clipseg):
    _, report, _ = run(address, folder, graph_of(ONE, phrases="red", text_model=str(clipseg)))
    assert "outside 'red'" in report.splitlines()[0]  # for one reference is an edit


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"images.image2": None},
            "You connected 1 image, but the model got 2 references: connect one image for each reference, in the "
            "same order, or none at all. Nothing was dropped.",
        ),
        (
            {"keep_each": "0.5; 0.1"},
            "keep_each has '0.5; 0.1': write one value for each reference, such as 0.5, 0.1. A value is a share, a "
            "number of tokens, or auto. The model is returned unchanged.",
        ),
        (
            {"selector": "edges", "images.image1": None, "images.image2": None},
            "The selector edges looks at images, and none is connected: connect one for each reference, or choose "
            "auto, uniform, random or detail. The model is returned unchanged.",
        ),
        (
            {"phrases": "red", "text_model": "/no/such/folder"},
            "The model /no/such/folder is no folder: pass one that holds a config.json, or a hub id. The model is "
            "returned unchanged.",
        ),
        (
            {"keep_each": "0.5, 0.1, 0.2"},
            "keep has 3 values for 2 references: pass one value, or one per reference. The model is returned "
            "unchanged.",
        ),
    ],
)
def test_what_does_not_fit_is_said_and_the_queue_goes_on(address, folder, settings, sentence):
    made, _, _ = run(address, folder, graph_of(TWO, **settings))
    assert np.array_equal(made, run(address, folder, without_nodes(graph_of(TWO)))[0])
    assert f"Sparse Context: {sentence}" in (folder / "log.txt").read_text(encoding="utf-8")


def test_a_mask_of_another_size_is_said(address, folder):
    nodes = graph_of("FLUX.2 klein 4B - mask from a phrase")
    whole = number_of(nodes, "LoadImage")
    nodes[number_of(nodes, "TinySAM3_Detect")]["inputs"]["image"] = [whole, 0]  # before it is scaled
    made, _, _ = run(address, folder, nodes)
    assert np.array_equal(made, run(address, folder, without_nodes(nodes))[0])
    assert (
        "The mask of reference 1 is 512x512 pixels, but its image is 128x128: connect a mask of the image's own size."
    ) in (folder / "log.txt").read_text(encoding="utf-8")


def test_a_value_out_of_range_is_refused_by_comfyui(address):
    with pytest.raises(OSError) as error:
        run_graph(address, graph_of(ONE, keep=1.5))
    (problem,) = json.loads(error.value.read())["node_errors"].values()
    assert problem["errors"][0]["type"] == "value_bigger_than_max"


# The front end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", WORKFLOWS)
def test_the_front_end_opens_a_workflow_as_the_same_graph(page, title):
    load_graph(page, json.loads((UI / f"{title}.json").read_text(encoding="utf-8")))
    _, made = read_graph(page)
    built = WORKFLOWS[title]().nodes
    assert {number: (node["class_type"], node["inputs"]) for number, node in made.items()} == {
        number: (node["class_type"], node["inputs"]) for number, node in built.items()
    }


def test_a_graph_runs_by_hand(page):
    graph = WORKFLOWS[TWO]()
    load_graph(page, small(graph.nodes))
    arrange(page, graph.columns)
    run_by_hand(page)
    widgets = page.evaluate(
        "kind => window.app.graph.nodes.find(node => node.type === kind).widgets.map(each => [each.name, each.value])",
        "SparseContextReport",
    )
    assert dict(widgets)["$$node-text-preview"].startswith("reference 1: 13 of 64 tokens (20 %) by subject")
    shown = "kind => window.app.graph.nodes.find(node => node.type === kind).imgs.map(each => each.naturalWidth)"
    (width,) = page.evaluate(shown, "SparseContext")
    assert width > 700


def test_another_socket_appears_with_every_picture(page):
    def sockets(count):
        load_graph(page, small(WORKFLOWS[{1: ONE, 2: TWO}[count]]().nodes))
        names = "() => window.app.graph.nodes.find(node => node.type === 'SparseContext').inputs.map(each => each.name)"
        return [name for name in page.evaluate(names) if name.startswith(("images", "masks"))]

    assert sockets(1) == ["images.image1", "images.image2", "masks.mask1"]
    assert sockets(2) == ["images.image1", "images.image2", "images.image3", "masks.mask1"]


@pytest.mark.parametrize("node", TIPS)
def test_the_help_page_is_there(page, address, node):
    answer = page.request.get(f"{address}/extensions/sparse-context-nodes/docs/{node}.md")
    assert answer.ok
    assert answer.text().startswith(f"# {fetch(f'{address}/object_info/{node}')[node]['display_name']}\n")


def test_the_page_asks_nobody_else(page, address):
    asked = page.evaluate("() => performance.getEntriesByType('resource').map(each => each.name)")
    assert len(asked) > 20
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()


def test_templates_list_the_workflows(page, address):
    found = fetch(f"{address}/api/workflow_templates")
    assert set(found["sparse-context-nodes"]) == set(WORKFLOWS)
