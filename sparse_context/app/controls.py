"""The controls of the page, and from their values to a scene.

What `SparseContextConfig` and `Request` have beside what each reference is asked becomes a control by its type, so a
field that they get is on the page at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, get_type_hints

import gradio as gr

from ..budget import SHARES, is_count
from ..config import TASKS, SparseContextConfig
from ..overview import LAYOUTS
from ..pipelines.spec import ModelSpec, Request
from ..selectors.registry import SELECTORS
from ..texts import read_keep, read_selector
from .scene import Reference, Scene
from .sessions import Session

SLOTS = 10
"""References on the page at most: as many as FLUX.2 and FLUX.3 take."""

LARGEST_SEED = 2**53  # above it, a browser's numbers are not exact

OWN = "per reference"
SAME = "shared"

ON_CARDS = ("keep", "selector", "task", "phrases")
OF_CONFIG = tuple(each for each in fields(SparseContextConfig) if each.name not in (*ON_CARDS, "seed", "text_model"))
OF_CALL = tuple(each for each in fields(Request) if each.name not in ("prompt", "references", "config", "inpaint"))
FIRST = ("seed", "steps")
"""Fields of a request that stand beside the prompt, and not among the rest."""

CHOICES: Mapping[str, Sequence[Any]] = {
    "share": SHARES,
    "overview": ("trained", "auto", "2", "4", "8", "none"),
    "overview_layout": LAYOUTS,
}
"""Of fields that are chosen from a list; of `overview`, any other factor can be typed."""

LABELS = {"psnr": "PSNR"}
HELP = {
    "overview": "A small copy of each reference, beside the kept tokens.",
    "overview_layout": "Where the overview's tokens are placed.",
    "reference_max_pixels": "Take sharp tokens from references of up to this size.",
    "coverage": "Share of the kept tokens to spread evenly, 0 to 1.",
    "share": "How references divide a shared budget.",
    "floor": "Fewest tokens per reference.",
    "multiple_of": "Round the total up to a multiple of this.",
    "merge": "Share of the kept tokens to replace by averages of the others, 0 to 1.",
    "mass": "Share of the total score that auto keeps, 0 to 1.",
    "psnr": "PSNR that auto aims for with an overview, in dB.",
}


Fresh = tuple[float, bool, str, str, str]
"""What the controls of a card say, in their order: keep, auto, task, selector, phrase."""


WIDTH = 5


@dataclass(eq=False)
class Slot:
    """The controls of one reference."""

    card: gr.Column
    overlay: gr.HTML
    keep: gr.Slider
    auto: gr.Checkbox
    task: gr.Dropdown
    selector: gr.Dropdown
    phrase: gr.Textbox
    paint: gr.Button
    remove: gr.Button

    @property
    def values(self) -> list[gr.components.Component]:
        """Those that say what is asked of the reference."""
        return [self.keep, self.auto, self.task, self.selector, self.phrase]


def fresh(config: SparseContextConfig, i: int) -> Fresh:
    """What the card of reference `i`, from 0, says at first, where `config` is what the app was started with."""

    def own(value: Any) -> Any:
        return (value[i] if i < len(value) else value[-1]) if isinstance(value, (list, tuple)) else value

    keep, selector = own(config.keep), own(config.selector)
    ratio = keep if isinstance(keep, float) or keep == 1 else 0.2
    text = "auto" if selector is None else blend_text(selector) if isinstance(selector, Mapping) else selector
    return ratio, keep == "auto", own(config.task), text, own(config.phrases) or ""


def blend_text(weights: Mapping[str, float]) -> str:
    """A blend as the command line has it."""
    return ",".join(f"{name}={weight!r}" for name, weight in weights.items())


def make_slot(number: int, said: Fresh) -> Slot:
    """The controls of reference `number`, from 0, which is not there yet. said: their values."""
    with gr.Column(visible=False, min_width=200, elem_classes="card", elem_id=f"reference-{number + 1}") as card:
        overlay = gr.HTML(elem_classes="drawn")
        keep = gr.Slider(min(0.01, said[0]), 1, said[0], step=0.01, label="Keep", elem_classes="keep")
        auto = gr.Checkbox(said[1], label="Choose keep automatically")
        with gr.Row(elem_classes="pair"):
            task = gr.Dropdown(list(TASKS), value=said[2], label="Task", min_width=80, filterable=False)
            selector = gr.Dropdown(
                ["auto", *SELECTORS],
                value=said[3],
                label="Selector",
                min_width=80,
                allow_custom_value=True,
            )
        phrase = gr.Textbox(said[4], label="Phrase", placeholder="the red car")
        with gr.Row(elem_classes="pair"):
            paint = gr.Button("Paint mask", size="sm", min_width=60)
            remove = gr.Button("Remove", size="sm", min_width=60)
    return Slot(card, overlay, keep, auto, task, selector, phrase, paint, remove)


def make_field(field: Any, hint: Any, default: Any) -> gr.components.Component:
    """A control for a field of a record, by its name and type, that says `default` at first."""
    kinds = set(getattr(hint, "__args__", (hint,)))
    said = {
        "label": LABELS.get(field.name, field.name.replace("_", " ").capitalize()),
        "info": HELP.get(field.name),
        "min_width": 120,
    }
    if field.name in CHOICES:
        optional = type(None) in kinds and "none" not in CHOICES[field.name]
        choices = [*([("default", "")] if optional else []), *CHOICES[field.name]]
        return gr.Dropdown(
            choices,
            value=("" if optional else "none") if default is None else str(default),
            allow_custom_value=field.name == "overview",
            **said,
        )
    if kinds <= {int, float}:
        return gr.Number(default, precision=None if float in kinds else 0, step=1 if kinds == {int} else 0.05, **said)
    return gr.Textbox("" if default is None else str(default), placeholder="default", **said)


class Controls:
    """All controls that say what the scene is. They are made where this is made, within a page."""

    def __init__(self, models: Sequence[str], start: Request) -> None:
        """models: their names. start: what the controls say at first; it has no references.

        Raises ValueError where that says something of each reference for which the page has one control for all.
        """
        keeps = start.config.keep
        if isinstance(keeps, (list, tuple)) and any(is_count(keep) for keep in keeps):
            raise ValueError(
                f"keep is {keeps!r}, and a card of the page takes a ratio or auto: pass one count, or ratios."
            )
        if start.seed > LARGEST_SEED:
            raise ValueError(f"seed is {start.seed}, and a page is exact up to {LARGEST_SEED}: pass a smaller one.")
        for each in OF_CONFIG:
            value = getattr(start.config, each.name)
            if isinstance(value, (list, tuple)) and value:
                if len(set(value)) > 1:
                    raise ValueError(f"{each.name} is {value!r}, and the page has one for all references: pass one.")
                start = replace(start, config=replace(start.config, **{each.name: value[0]}))
        self.models, self.start = models, start
        self.slots: list[Slot] = []
        self.config: list[gr.components.Component] = []
        self.call: list[gr.components.Component] = []

    def make_slots(self) -> None:
        """The cards of all references."""
        with gr.Row(elem_classes="cards"):
            self.slots = [make_slot(i, self.fresh(i)) for i in range(SLOTS)]

    def fresh(self, i: int) -> Fresh:
        """What the card of reference `i`, from 0, says at first."""
        return fresh(self.start.config, i)

    def make_prompt(self) -> None:
        """The prompt, the model, and what is most often changed of a call."""
        config_hints, call_hints, start = get_type_hints(SparseContextConfig), get_type_hints(Request), self.start
        keep = start.config.keep
        counts = isinstance(keep, int) and keep != 1
        call = {each.name: (each, call_hints[each.name], getattr(start, each.name)) for each in OF_CALL}
        self.prompt = gr.Textbox(start.prompt, label="Prompt", lines=2, elem_id="prompt")
        with gr.Row(elem_classes="pair"):
            self.model = gr.Dropdown(
                list(self.models), value=self.models[0], label="Model", min_width=160, visible=len(self.models) > 1
            )
            first = [make_field(*parts) for name, parts in call.items() if name in FIRST]
        with gr.Accordion("More settings", open=False):
            with gr.Row(elem_classes="pair"):
                self.budget = gr.Radio([OWN, SAME], value=SAME if counts else OWN, label="Budget", min_width=200)
                self.keep = gr.Textbox(
                    str(keep) if counts else "0.2",
                    label="Shared keep",
                    info="A ratio (0.2), a count (400) or auto.",
                    min_width=120,
                    visible=counts,
                )
            with gr.Row(elem_classes="fields"):
                self.config = [
                    make_field(each, config_hints[each.name], getattr(start.config, each.name)) for each in OF_CONFIG
                ]
                rest = [make_field(*parts) for name, parts in call.items() if name not in FIRST]
        self.call = first + rest

    @property
    def triggers(self) -> list[Any]:
        """The events that say that the scene is another one: at once for what is moved or chosen, and for what is
        written, once the control is left or a line ends."""
        every: list[Any] = self.inputs  # whose events gradio adds to each class by itself
        at_once = [each.input for each in every if each is not self.prompt]
        texts = [each for each in self.inputs if isinstance(each, gr.Textbox)]
        return at_once + [event for each in texts for event in (each.blur, each.submit)]

    @property
    def inputs(self) -> list[gr.components.Component]:
        """What `scene` takes the values of, in order."""
        shared = [self.prompt, self.model, self.budget, self.keep, *self.config, *self.call]
        return shared + [value for slot in self.slots for value in slot.values]

    def scene(self, session: Session, specs: Mapping[str, ModelSpec], values: Sequence[Any]) -> Scene:
        """The scene that the values of `inputs` and the pictures of a page make. Raises ValueError for values that are
        none."""
        prompt, model, budget, keep = values[:4]
        rest = list(values[4:])
        config = read_fields(OF_CONFIG, rest[: len(self.config)])
        if self.start.config.text_model is not None:  # which model is loaded is not for a page to say
            config["text_model"] = self.start.config.text_model
        in_order = sorted(OF_CALL, key=lambda each: each.name not in FIRST)
        call = read_fields(in_order, rest[len(self.config) :][: len(self.call)])
        cards = rest[len(self.config) + len(self.call) :]
        references = [
            read_reference(loaded.name, loaded.picture, loaded.painted, cards[i * WIDTH : (i + 1) * WIDTH])
            for i, loaded in enumerate(session.pictures)
        ]
        shared = None if budget == OWN else read_keep(str(keep).strip())
        return Scene(references, prompt or "", specs[model], shared, config, call)


def read_reference(name: str, picture: Any, painted: Any, values: Sequence[Any]) -> Reference:
    """What the controls of a slot ask of a picture, in the order of `Fresh`."""
    keep, auto, task, selector, phrase = values
    return Reference(
        name, picture, "auto" if auto else keep, task, read_selector(selector or "auto"), phrase or "", painted
    )


def read_fields(records: Sequence[Any], values: Sequence[Any]) -> dict[str, Any]:
    """What is said other than by default, by the name of the field."""
    said = {}
    for field, value in zip(records, values, strict=True):
        is_text = field.type in ("str | None", str | None)
        read = value if is_text or not isinstance(value, str) else from_text(value)
        default = None if field.default is MISSING else field.default
        if value in ("", None) or read == default:
            continue
        said[field.name] = read
    return said


def from_text(text: str) -> Any:
    """A number, None for "none", or the text itself."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return None if text == "none" else text
