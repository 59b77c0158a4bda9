"""What is on the screen as Python and as a command."""

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..selectors.registry import PHRASE_SELECTORS
from .scene import Reference, Scene, one_or_all


def mask_name(reference: Reference) -> str:
    """The file that a painted mask is downloaded as."""
    return f"{Path(reference.name).stem}-mask.png"


def spec_settings(scene: Scene) -> dict[str, Any]:
    """What of the model is not by default."""
    return {each.name: value for each in fields(scene.spec) if (value := getattr(scene.spec, each.name)) != each.default}


def to_python(scene: Scene) -> str:
    """A script that makes the picture of the scene, of files of the references' names in the working folder."""
    references = scene.references
    names = [f"image_{i}" for i in range(1, len(references) + 1)]
    painted = any(each.painted is not None for each in references)
    phrases = any(each.selector in PHRASE_SELECTORS for each in references if isinstance(each.selector, str))
    lines = [
        f"from sparse_context import SparseContextConfig{', mask' if painted else ''}",
        f"from sparse_context.images import {'open_mask, ' if painted else ''}open_picture" if references else "",
        "from sparse_context.pipelines import Engine, ModelSpec, Request",
        "from sparse_context.selectors.registry import PHRASE_SELECTORS" if phrases else "",
    ]
    lines = [line for line in lines if line] + [""]
    for name, each in zip(names, references, strict=True):
        lines.append(f"{name} = open_picture({each.name!r})")
        if each.painted is not None:
            lines.append(f"mask_{name[6:]} = mask([open_mask({mask_name(each)!r}, {name}.size)])")
    settings = _config_settings(scene)
    arguments = ", ".join(f"{name}={text}" for name, text in settings.items())
    lines.append(f"config = SparseContextConfig({arguments})")
    call = "".join(f", {name}={value!r}" for name, value in scene.call.items())
    spec = ", ".join(f"{name}={value!r}" for name, value in spec_settings(scene).items())
    lines += [
        f"engine = Engine(ModelSpec({spec}))",
        f"generation = engine(Request({scene.prompt!r}, [{', '.join(names)}], config{call}))",
        'generation.image.save("out.png")',
    ]
    return "\n".join(lines) + "\n"


def _config_settings(scene: Scene) -> dict[str, str]:
    """The arguments of the config, as Python."""
    settings = {name: repr(value) for name, value in scene.config.items()}
    references = scene.references
    if any(each.painted is not None for each in references):
        settings.setdefault("coverage", "0.0")
    if scene.keep is not None or not references:
        return _order({"keep": repr(0.2 if scene.keep is None else scene.keep)} | _of_references(scene) | settings)
    return _order({"keep": repr(one_or_all([each.keep for each in references]))} | _of_references(scene) | settings)


def _of_references(scene: Scene) -> dict[str, str]:
    texts = [_selector_text(scene, i) for i in range(len(scene.references))]
    if not texts:
        return {}
    selector, task = one_or_all(texts), one_or_all([each.task for each in scene.references])
    shown = selector if isinstance(selector, str) else f"[{', '.join(selector)}]"
    return {"task": repr(task), "selector": shown}


def _order(settings: dict[str, str]) -> dict[str, str]:
    """Without what is there by default."""
    usual = {"task": "'auto'", "selector": "None"}
    return {name: text for name, text in settings.items() if usual.get(name) != text}


def _selector_text(scene: Scene, i: int) -> str:
    reference = scene.references[i]

    def part(each: Any) -> str:
        if each is reference.painted:
            return f"mask_{i + 1}"
        if isinstance(each, str) and each in PHRASE_SELECTORS:
            return f"PHRASE_SELECTORS[{each!r}]({reference.phrase!r})"
        return repr(each)

    if reference.painted is None:
        return part(reference.selector) if not isinstance(reference.selector, Mapping) else repr(reference.selector)
    return "{" + ", ".join(f"{part(each)}: {weight!r}" for each, weight in scene.blend_of(reference)) + "}"


def to_command(scene: Scene) -> str:
    """The command that makes the picture of the scene."""
    parts: list[tuple[str, ...]] = [("--image", each.name) for each in scene.references]
    parts.append(("--prompt", scene.prompt))
    references = scene.references
    keeps = one_or_all([each.keep for each in references]) if scene.keep is None and references else scene.keep
    parts += _repeated("--keep", keeps)
    parts += _repeated("--task", one_or_all([each.task for each in references]) if references else "auto", "auto")
    parts += _repeated("--selector", one_or_all([_option(scene, each) for each in references] or ["auto"]), "auto")
    if any(each.painted is not None for each in references):
        parts += [("--mask", "none" if each.painted is None else mask_name(each)) for each in references]
    settings = {**scene.config, **scene.call, **spec_settings(scene)}
    if any(each.painted is not None for each in references):
        settings.setdefault("coverage", 0.0)
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        parts.append((option,) if value is True else (option, "none" if value is None else str(value)))
    return "sparse-context generate " + " \\\n    ".join(shlex.join(part) for part in parts) + "\n"


def _repeated(option: str, values: Any, usual: Any = None) -> list[tuple[str, str]]:
    if values is None or values == usual:
        return []
    return [(option, str(value)) for value in (values if isinstance(values, list) else [values])]


def _option(scene: Scene, reference: Reference) -> str:
    """A selector as the command line has it."""
    selector: Any = reference.selector
    if reference.painted is not None:
        parts = {"mask" if part is reference.painted else part: weight for part, weight in scene.blend_of(reference)}
        return "mask" if [*parts] == ["mask"] else _blend(parts)
    if isinstance(selector, Mapping):
        return _blend(selector)
    return "auto" if selector is None else selector


def _blend(weights: Mapping[str, float]) -> str:
    return ",".join(f"{name}={weight!r}" for name, weight in weights.items())
