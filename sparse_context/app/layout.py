"""The controls of the page in their places."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ..selectors.registry import SELECTORS
from .controls import Controls
from .references import COLOURS, OPACITY, take_paths, take_uploads_only

BRUSHES: list[Any] = [(f"rgb{colour}", OPACITY) for colour in COLOURS.values()]
HEAD = "<h1>Sparse Context</h1><p>Drop images, see which of their tokens are kept, and generate with only those.</p>"


class Layout:
    """What is on the page. It is made where this is made, within a `gr.Blocks`."""

    def __init__(self, controls: Controls, examples: Sequence[dict]) -> None:
        """examples: as `embedded.demo.read_examples` has them."""
        self.controls, self.examples = controls, examples
        gr.HTML(HEAD, elem_classes="intro")
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=5, min_width=320):
                self._lay_scene()
            with gr.Column(scale=6, min_width=320), gr.Tabs():
                with gr.Tab("Generate"):
                    self._lay_generate()
                with gr.Tab("Sweep"):
                    self._lay_sweep()
                with gr.Tab("Copy"):
                    self._lay_copy()
        take_uploads_only(self.files)
        take_uploads_only(self.editor)
        take_paths(self.files)

    def _lay_scene(self) -> None:
        self.files = gr.File(
            label="References: drop images here",
            file_count="multiple",
            file_types=["image"],
            height=140,
            elem_id="files",
        )
        with gr.Accordion("Examples", open=False):
            self.gallery = gr.Gallery(
                [(example["truth"], example["name"]) for example in self.examples],
                columns=5,
                height="auto",
                object_fit="contain",
                allow_preview=False,
                interactive=False,
                show_label=False,
                elem_id="examples",
                buttons=[],
            )
        self.summary = gr.HTML(elem_id="summary")
        self.controls.make_slots()
        with gr.Column(visible=False, elem_id="painter") as self.painter:
            self.painted = gr.HTML()
            self.editor = gr.ImageEditor(
                type="pil",
                format="png",
                layers=False,
                sources=(),
                transforms=(),
                show_label=False,
                height=420,
                brush=gr.Brush(colors=BRUSHES, color_mode="fixed", default_size=40),
                eraser=gr.Eraser(default_size=40),
                buttons=[],
                elem_id="editor",
            )
            with gr.Row(elem_classes="pair"):
                self.clear = gr.Button("Clear mask", size="sm")
                self.done = gr.Button("Done", size="sm")
        self.controls.make_prompt()

    def _lay_generate(self) -> None:
        with gr.Row(elem_classes="pair"):
            self.generate = gr.Button("Generate", variant="primary", min_width=120, elem_id="generate")
            self.stop = gr.Button("Stop", min_width=120, elem_id="stop")
        self.compare = gr.Checkbox(True, label="Compare with all tokens")
        status, figures = gr.HTML(elem_id="status"), gr.HTML(elem_id="figures")
        self.answer = [status, gr.HTML(elem_id="result"), figures]

    def _lay_sweep(self) -> None:
        self.keeps = gr.Textbox(
            "0.1, 0.2, 0.5",
            label="Keeps",
            info="Ratios, counts or auto, with commas between.",
        )
        self.selectors = gr.Dropdown(
            ["auto", *(name for name in SELECTORS if name != "mask")],
            value=["auto", "uniform"],
            multiselect=True,
            allow_custom_value=True,
            label="Selectors",
        )
        with gr.Row(elem_classes="pair"):
            self.run_sweep = gr.Button("Run sweep", variant="primary", min_width=120, elem_id="sweep")
            self.stop_sweep = gr.Button("Stop", min_width=120, elem_id="stop-sweep")
        self.swept = [gr.HTML(elem_id="sweep-status"), gr.HTML(elem_id="sweep-result")]

    def _lay_copy(self) -> None:
        self.python = gr.Code(
            language="python", label="As Python", interactive=False, wrap_lines=True, elem_id="python"
        )
        self.command = gr.Code(
            language="shell", label="As a command", interactive=False, wrap_lines=True, elem_id="command"
        )
        self.settings = gr.HTML(elem_id="settings")
