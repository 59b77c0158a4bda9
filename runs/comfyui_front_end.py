"""ComfyUI's own front end in Chromium: what the tests of the nodes and the makers of their pictures share."""

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

WIDTH, GAP = 300, 60  # of a node, and between columns, in the graph's pixels
PATIENCE = 600_000  # milliseconds: a busy machine is no error
THUMBNAIL = 480  # pixels wide

READY = """
() => !!(window.LiteGraph?.registered_node_types?.['SparseContext'] && window.app?.vueAppReady && window.app.graph)
"""

SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
"""Under which nothing lies over the graph, and texts are drawn at any zoom."""

ARRANGE = """
([columns, width, gap]) => {
  const heights = {LoadImage: 340, SparseContext: 760, SparseContextReport: 300, CLIPTextEncode: 130, SaveImage: 360}
  const below = {}
  for (const node of window.app.graph.nodes) {
    const column = columns[node.id]
    node.setSize([width, Math.max(node.computeSize()[1], heights[node.type] ?? 0)])
    node.pos = [column * (width + gap), below[column] ?? 0]
    below[column] = node.pos[1] + node.size[1] + gap
  }
}
"""

NAME = """
() => {
  for (const node of window.app.graph.nodes)
    if (node.title === node.type) node.title = window.LiteGraph.registered_node_types[node.type].title
}
"""

FIT = """
([width, height, margin]) => {
  const canvas = window.app.canvas, boxes = window.app.graph.nodes.map((node) => node.getBounding())
  const [left, top] = [0, 1].map((axis) => Math.min(...boxes.map((box) => box[axis])))
  const [right, bottom] = [0, 1].map((axis) => Math.max(...boxes.map((box) => box[axis] + box[axis + 2])))
  const sides = [right - left + 2 * margin, bottom - top + 2 * margin]
  canvas.ds.scale = Math.min(1, width / sides[0], height / sides[1])
  canvas.ds.offset = [margin - left, margin - top]
  canvas.setDirty(true, true)
  return sides.map((side) => side * canvas.ds.scale)
}
"""


@contextmanager
def opened(address: str, browser: Any, size: tuple[int, int] = (1600, 1000)) -> Iterator[Any]:
    """A page with the front end of a server, ready to use."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    for name, value in SETTINGS.items():
        page.request.post(f"{address}/settings/{name}", data=json.dumps(value))
    page.goto(address)
    page.wait_for_function(READY)
    try:
        yield page
    finally:
        context.close()


def load_graph(page: Any, graph: Mapping[str, Any], name: str = "workflow") -> None:
    """Open a graph of the front end's format, or of the API's."""
    how = "loadGraphData(graph)" if "nodes" in graph else "loadApiJson(graph, name)"
    page.evaluate(f"async ([graph, name]) => {{ await window.app.{how} }}", [graph, name])
    page.evaluate(NAME)  # nodes of a graph of the API's are called by their types


def read_graph(page: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The graph that is open, in the front end's format and in the API's."""
    read = "const made = await window.app.graphToPrompt(); return [made.workflow, made.output]"
    return page.evaluate(f"async () => {{ {read} }}")


def arrange(page: Any, columns: Mapping[str, int]) -> None:
    """Put the nodes of the open graph into columns, by their numbers, and move all of it into view."""
    page.evaluate(ARRANGE, [columns, WIDTH, GAP])
    page.evaluate("() => window.app.canvas.fitViewToSelectionAnimated({duration: 1})")
    page.wait_for_timeout(1500)


def pruned(value: Any) -> Any:
    """A graph without what is null in it, but for links that are not there."""
    if isinstance(value, dict):
        return {key: pruned(each) for key, each in value.items() if each is not None or key == "link"}
    return [pruned(each) for each in value] if isinstance(value, list) else value


def run_by_hand(page: Any) -> None:
    """Press the button that runs the graph, and wait until it has run."""
    count = "Object.keys(await (await fetch('/history')).json()).length"
    before = page.evaluate(f"async () => {count}")
    page.get_by_role("button", name="Run", exact=True).first.click()
    page.wait_for_function(f"async (before) => {count} > before", arg=before, polling=1000)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(4000)  # until what came of it is drawn


def draw_workflows(folder: Path, graphs: Mapping[str, Any], into: Path) -> None:
    """Each graph of `comfyui_workflows` in the front end's format, and a thumbnail of it."""
    from app_browser import find_browser, running_browser
    from comfyui_server import example_pictures, running_server

    program = find_browser()
    if program is None:
        raise SystemExit("No Chromium or Chrome is installed: apt-get install chromium.")
    into.mkdir(exist_ok=True)
    with (
        running_server(folder, example_pictures()) as address,
        running_browser(program) as browser,
        opened(address, browser, (2400, 1500)) as page,
    ):
        for title, graph in graphs.items():
            load_graph(page, graph.nodes, title)
            arrange(page, graph.columns)
            drawn, _ = read_graph(page)
            text = json.dumps(pruned(drawn), indent=1, ensure_ascii=False)
            (into / f"{title}.json").write_text(text + "\n", encoding="utf-8")
            picture = whole(page)
            picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
            picture.convert("RGB").save(into / f"{title}.jpg", quality=85)


def draw_pages(folder: Path, graph: Any, nodes: Mapping[str, Any], into: Path) -> None:
    """The pictures of the pages about the nodes: a graph that ran by hand, its node Sparse Context, and the same with a
    setting that does not fit. nodes: those of `graph`, with tiny models' settings."""
    from app_browser import find_browser, running_browser
    from comfyui_server import example_pictures, running_server

    program = find_browser()
    if program is None:
        raise SystemExit("No Chromium or Chrome is installed: apt-get install chromium.")
    with (
        running_server(folder, example_pictures()) as address,
        running_browser(program) as browser,
        opened(address, browser, (2600, 1500)) as page,
    ):
        load_graph(page, nodes, "two references")
        arrange(page, graph.columns)
        run_by_hand(page)
        save(whole(page), into / "comfyui-graph.webp", 1600)
        save(close_up(page, "SparseContext"), into / "comfyui-node.webp", 700)
        page.evaluate(
            "() => { const node = window.app.graph.nodes.find(each => each.type === 'SparseContext');"
            " node.widgets.find(each => each.name === 'keep_each').value = '0.5; 0.1' }"
        )
        run_by_hand(page)
        save(close_up(page, "SparseContext"), into / "comfyui-sentence.webp", 700)


def whole(page: Any, margin: int = 30) -> Image.Image:
    """All of the open graph, and nothing else of the page."""
    screen = page.locator("canvas").first
    size = screen.bounding_box()
    width, height = page.evaluate(FIT, [size["width"], size["height"], margin])
    with without_buttons(page):
        canvas = Image.open(io.BytesIO(screen.screenshot()))
    return canvas.crop((0, 0, int(width), int(height)))


@contextmanager
def without_buttons(page: Any) -> Iterator[None]:
    """Within, nothing lies over the canvas."""
    style = page.add_style_tag(
        content="body * { visibility: hidden } canvas, .dom-widget, .dom-widget * { visibility: visible }"
    )
    page.wait_for_timeout(1500)
    try:
        yield
    finally:
        style.evaluate("(element) => element.remove()")


def close_up(page: Any, kind: str, scale: float = 1.8) -> Image.Image:
    """One node, by its type, with what is around it."""
    box = page.evaluate(
        """
        ([kind, scale]) => {
          const node = window.app.graph.nodes.find(each => each.type === kind), view = window.app.canvas.ds
          view.scale = scale
          view.offset = [-node.pos[0] + 60, -node.pos[1] + 60]
          window.app.canvas.setDirty(true, true)
          return [60 * scale, 60 * scale, node.size[0] * scale, node.size[1] * scale]
        }
        """,
        [kind, scale],
    )
    left, top, width, height = box
    margin = 40 * scale  # above, there is the title
    with without_buttons(page):
        canvas = Image.open(io.BytesIO(page.locator("canvas").first.screenshot()))
    return canvas.crop(
        (int(left - margin), int(top - margin), int(left + width + margin), int(top + height + margin / 2))
    )


def save(picture: Image.Image, path: Path, width: int) -> None:
    """A picture as WebP, no wider than `width`."""
    picture = picture.convert("RGB")
    picture.thumbnail((width, 10 * width), Image.Resampling.LANCZOS)
    picture.save(path, quality=88, method=6)
