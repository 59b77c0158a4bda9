"""How soon the overlays of the web app follow a change, in a browser.

The app runs with the embedded model, and Chromium in front of it. In the page a change is timed from the event of the
control until the new overlay has been drawn: a keep moved by a key, a selector and a task chosen from a list. A
generation by the same app in the same minute says what that is compared with.

    python runs/app_latency.py [--output results/app_latency.json]
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from app_browser import App, find_browser, running_app, running_browser
from tables import draw, machine, read, table

from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.3  # seconds in which an overlay has to follow
SAMPLES = 20  # of each kind of change
SCENES = {"in-front": 2, "quarters": 4}  # examples, and how many references they have
SELECTORS = ("edges", "saliency", "detail", "auto")
TASKS = ("edit", "subject", "global")
WINDOW = {"width": 1280, "height": 1000}

WATCH = """() => {
    window.waited = [];
    let began = null;
    for (const kind of ["keydown", "pointerdown", "mousedown"])
        addEventListener(kind, () => { began = performance.now(); }, {capture: true});
    new MutationObserver(records => {
        if (began === null || !records.some(each => each.target.closest?.(".cards") && document.contains(each.target)))
            return;
        const from = began;
        began = null;
        requestAnimationFrame(() => requestAnimationFrame(() => window.waited.push(performance.now() - from)));
    }).observe(document.body, {attributeFilter: ["src"], subtree: true});
}"""
"""Notes the milliseconds from each press of a key or a button until an overlay is new on the screen."""


class Changes:
    """Changes on the page, each with the seconds that the overlays took to follow."""

    def __init__(self, page: Any) -> None:
        self.page = page
        page.evaluate(WATCH)

    def press(self) -> list[float]:
        """Move the first reference's keep by keys, one after the other."""
        self.page.locator("#reference-1 input[type=range]").focus()
        return [self._follow(lambda: self.page.keyboard.press("ArrowRight")) for _ in range(SAMPLES)]

    def choose(self, label: str, names: tuple[str, ...]) -> list[float]:
        """Choose in turns from a list of the first reference."""
        waited = []
        for i in range(SAMPLES):
            self.page.locator("#reference-1").get_by_label(label).click()
            option = self.page.get_by_role("option", name=names[i % len(names)], exact=True)
            waited.append(self._follow(option.click))
        return waited

    def _follow(self, change: Any) -> float:
        """Seconds until the overlays have followed a change."""
        before = self.page.evaluate("window.waited.length")
        change()
        self.page.wait_for_function("n => window.waited.length > n", arg=before)
        self.page.wait_for_timeout(200)  # so that the next one is a change by itself
        return self.page.evaluate("n => window.waited[n]", before) / 1000


def measure(app: App) -> dict[str, Any]:
    """Of each scene and kind of change: how many were in time, and the median as a share of a generation."""
    figures, page = {}, Changes(app.page)
    app.page.get_by_label("Compare with all tokens").uncheck()
    for example, references in SCENES.items():
        app.take(example, references)
        app.generate()  # which pays for more than itself
        generation = app.generate()
        changes = {
            "keep": page.press(),
            "selector": page.choose("Selector", SELECTORS),
            "task": page.choose("Task", TASKS),  # which decides again, for the last selector is auto
        }
        for change, waited in changes.items():
            figures[f"{change}, {references} references"] = {
                "references": references,
                "change": change,
                "in_time": sum(each < LIMIT for each in waited),
                "samples": len(waited),
                "of_generation": round(median(waited) / generation, 4),
                "median_seconds": round(median(waited), 3),
                "worst_seconds": round(max(waited), 3),
            }
            print(change, references, figures[f"{change}, {references} references"], flush=True)
    return figures


def overlays() -> str:
    """How many changes were followed in time, how soon, and how long that is against a generation."""
    result = read("app_latency")
    rows = [
        [
            each["change"],
            str(each["references"]),
            f"{each['in_time']} of {each['samples']}",
            f"{each['median_seconds']:.2f} s",
            f"{each['of_generation']:.1%}",
        ]
        for each in result["figures"].values()
    ]
    head = ["change", "references", f"drawn within {LIMIT} s", "median", "share of one generation"]
    return f"{table(head, rows)}\n\n{machine(result)}"


TABLES = {"app_latency": overlays}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the overlays of the web app in a browser.")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "app_latency.json")
    parser.add_argument("--table", action="store_true", help="only draw the table again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)
    program = find_browser()
    if program is None:
        parser.error("no Chromium or Chrome is installed: apt-get install chromium")
    with (
        tempfile.TemporaryDirectory() as folder,
        running_app(Path(folder), "--device", "cpu") as address,
        running_browser(program) as browser,
    ):
        figures = measure(App(browser.new_page(viewport=WINDOW), address))
    settings = {"limit": LIMIT, "samples": SAMPLES, "window": WINDOW, "model": "the embedded model", "device": "cpu"}
    write_result(arguments.output, "app_latency", settings, figures)
    draw(TABLES)


if __name__ == "__main__":
    main()
