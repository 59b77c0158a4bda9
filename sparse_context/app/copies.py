"""What is on the screen as Python, as a command, and as a file of settings."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..pipelines.settings_file import Settings
from .controls import blend_text
from .scene import Reference, Scene, one_or_all

SETTINGS_FILE = "sparse-context.json"
WITHOUT_OPTION = {"mass", "multiple_of", "negative_prompt", "psnr"}  # what `generate` takes from a file alone


def mask_name(name: str) -> str:
    """The file that a mask is downloaded as, by the name of its reference: cat.png and cat.jpg have one each."""
    return f"{Path(name).name}.mask.png"


def spec_settings(scene: Scene) -> dict[str, Any]:
    """What of the model is not by default."""
    return {
        each.name: value for each in fields(scene.spec) if (value := getattr(scene.spec, each.name)) != each.default
    }


def to_python(scene: Scene) -> str:
    """A script that makes the picture of the scene, of files of the references' names in the working folder."""
    references = scene.references
    names = [f"image_{i}" for i in range(1, len(references) + 1)]
    painted = any(each.painted is not None for each in references)
    lines = [
        f"from sparse_context import SparseContextConfig{', mask' if painted else ''}",
        f"from sparse_context.images import {'open_mask, ' if painted else ''}open_picture" if references else "",
        "from sparse_context.pipelines import Engine, ModelSpec, Request",
    ]
    lines = [line for line in lines if line] + [""]
    for name, each in zip(names, references, strict=True):
        lines.append(f"{name} = open_picture({each.name!r})")
        if each.painted is not None:
            lines.append(f"mask_{name[6:]} = mask([open_mask({mask_name(each.name)!r}, {name}.size)])")
    arguments = "".join(f"    {name}={text},\n" for name, text in _config_settings(scene).items())
    lines.append(f"config = SparseContextConfig(\n{arguments})")
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
    return _order({"keep": repr(scene.own_keeps)} | _of_references(scene) | settings)


def _of_references(scene: Scene) -> dict[str, str]:
    texts = [_selector_text(scene, i) for i in range(len(scene.references))]
    if not texts:
        return {}
    selector, task = one_or_all(texts), one_or_all([each.task for each in scene.references])
    shown = selector if isinstance(selector, str) else f"[{', '.join(selector)}]"
    return {"task": repr(task), "selector": shown, "phrases": repr(one_or_all(scene.phrases))}


def _order(settings: dict[str, str]) -> dict[str, str]:
    """Without what is there by default."""
    usual = {"task": "'auto'", "selector": "None", "phrases": "None"}
    return {name: text for name, text in settings.items() if usual.get(name) != text}


def _selector_text(scene: Scene, i: int) -> str:
    reference = scene.references[i]

    def part(each: Any) -> str:
        if each is not None and each is reference.painted:
            return f"mask_{i + 1}"
        return repr(each)

    if reference.painted is None:
        return part(reference.selector) if not isinstance(reference.selector, Mapping) else repr(reference.selector)
    return "{" + ", ".join(f"{part(each)}: {weight!r}" for each, weight in scene.blend_of(reference)) + "}"


def to_json(scene: Scene) -> str:
    """The settings of the scene, as every face reads them; `pipelines.settings_file` has the keys. Pictures and masks
    stay outside. Raises ValueError for a selector that is a function."""
    return json.dumps(Settings(scene.spec, scene.request()).to_dict(), indent=2, ensure_ascii=False) + "\n"


def to_command(scene: Scene) -> str:
    """The command that makes the picture of the scene, of files of the references' names in the working folder.

    What the command has no option for, it takes from a file, `to_json` (`SETTINGS_FILE`).
    """
    references = scene.references
    images = [("--image", each.name) for each in references]
    masks = [("--mask", "none" if each.painted is None else mask_name(each.name)) for each in references]
    masks = masks if any(each.painted is not None for each in references) else []
    settings = {**_config_options(scene), **scene.call, **spec_settings(scene)}
    options: list[tuple[str, ...]] = []
    if settings.keys().isdisjoint(WITHOUT_OPTION):
        options = [("--prompt", scene.prompt)] + [
            part for name, value in settings.items() for part in _option(name, value)
        ]
    else:
        options = [("--settings", SETTINGS_FILE)]
    return "sparse-context generate " + " \\\n    ".join(shlex.join(part) for part in images + masks + options) + "\n"


def _config_options(scene: Scene) -> dict[str, Any]:
    """What is kept, by the names of the options, as the command line says it."""
    references, said = scene.references, dict(scene.config)
    if any(each.painted is not None for each in references):
        said.setdefault("coverage", 0.0)
    keep = scene.own_keeps if scene.keep is None and references else scene.keep
    task = one_or_all([each.task for each in references]) if references else "auto"
    selector = one_or_all([_selector_option(scene, each) for each in references]) if references else "auto"
    phrases = one_or_all(scene.phrases) if any(scene.phrases) else None
    ours = {"keep": keep, "task": task, "selector": selector, "text": phrases}
    return {
        name: value for name, value in ours.items() if value not in (None, "auto") or name == "keep" and value
    } | said


def _option(name: str, value: Any) -> list[tuple[str, ...]]:
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return [(option,)]
    return [(option, "none" if each is None else str(each)) for each in (value if isinstance(value, list) else [value])]


def _selector_option(scene: Scene, reference: Reference) -> str:
    """A selector as the command line has it."""
    selector: Any = reference.selector
    if reference.painted is not None:
        parts = {"mask" if part is reference.painted else part: weight for part, weight in scene.blend_of(reference)}
        return "mask" if [*parts] == ["mask"] else blend_text(parts)
    if isinstance(selector, Mapping):
        return blend_text(selector)
    return "auto" if selector is None else selector
