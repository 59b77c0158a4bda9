"""The command `sparse-context app`: its address, its models, its settings, and its end."""

import json
import socket
import subprocess
import sys
from contextlib import closing
from dataclasses import fields

import gradio as gr
import pytest
from app_browser import free_port, running_app
from test_layers import run_without

from app.conftest import in_a_loop
from sparse_context.app.controls import Controls, fresh, read_fields
from sparse_context.app.serve import listen
from sparse_context.app.sessions import Session
from sparse_context.cli import main
from sparse_context.config import SparseContextConfig
from sparse_context.pipelines import Request
from sparse_context.pipelines.settings_file import Settings, write_settings


def refused(monkeypatch, capsys, *arguments):
    """What the command says before it has loaded anything."""
    monkeypatch.setattr("sys.argv", ["sparse-context", "app", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        in_a_loop(main)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    return said.err.removeprefix("sparse-context: ").strip()


def test_an_address_that_cannot_be_had_is_said_at_once(monkeypatch, capsys):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(monkeypatch, capsys, "--port", port)
    assert said == f"The app cannot use 127.0.0.1:{port} (Address already in use): pass another --host or --port."
    assert refused(monkeypatch, capsys, "--port", 0) == "port is 0: pass a number from 1 to 65535."
    assert refused(monkeypatch, capsys, "--port", 70000) == "port is 70000: pass a number from 1 to 65535."
    said = refused(monkeypatch, capsys, "--host", "203.0.113.7")  # of no machine: RFC 5737
    assert said.startswith("The app cannot use 203.0.113.7:7860 (")


def test_an_address_is_free_again_at_once():
    port = free_port()
    for _ in range(2):
        with listen("127.0.0.1", port) as sock:
            assert sock.getsockname() == ("127.0.0.1", port)


def test_bad_input_is_one_sentence(monkeypatch, capsys, tmp_path, tiny_model):
    said = refused(monkeypatch, capsys, "--model", tmp_path / "none")
    assert said == f"The model {tmp_path / 'none'} does not exist: pass a folder in the diffusers layout or a hub id."
    said = refused(monkeypatch, capsys, "--model", tiny_model, "--model", "a/b", "--lora", "cat.safetensors")
    assert said == "The LoRA cat.safetensors is for one model, and there are 2: name one --model."
    (tmp_path / "settings.json").write_text('{"kep": 0.1}')
    said = refused(monkeypatch, capsys, "--settings", tmp_path / "settings.json")
    assert said.endswith("'kep' is no setting here. Did you mean 'keep'?")


def test_without_gradio_the_command_says_what_to_install():
    code = """
sys.argv = ["sparse-context", "app"]
from sparse_context.__main__ import main
main()
"""
    done = run_without(["gradio"], code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sparse-context: gradio is not installed: pip install 'sparse-context[app]'.\n"


def test_the_command_line_does_not_import_gradio():
    code = "import sys, sparse_context.cli; print({'gradio', 'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_the_app_leaves_nothing_when_it_ends(tiny_model, tmp_path):
    with running_app(tmp_path, "--model", tiny_model, "--dtype", "float32"):
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("sparse-context-")]
    assert {path.name for path in tmp_path.iterdir()} <= {"addresses.txt", "log.txt"}
    assert (tmp_path / "log.txt").read_text().count("\n") == 1


def make_controls(start):
    with gr.Blocks(analytics_enabled=False):
        controls = Controls(["model"], start)
        controls.make_slots()
        controls.make_prompt()
    return controls


def test_what_the_page_has_one_control_for_is_the_same_for_all_references():
    in_a_loop(make_controls, Request("", config=SparseContextConfig(overview=[4, 4])))
    with pytest.raises(ValueError, match=r"overview is \[4, None\], and the page has one for all references: pass one"):
        in_a_loop(make_controls, Request("", config=SparseContextConfig(overview=[4, None])))


def test_counts_of_each_reference_are_refused_and_a_small_ratio_is_on_the_slider():
    with pytest.raises(ValueError, match=r"keep is \[400, 200\], and a card of the page takes a ratio or auto"):
        in_a_loop(make_controls, Request("", config=SparseContextConfig(keep=[400, 200])))
    controls = in_a_loop(make_controls, Request("", config=SparseContextConfig(keep=0.005)))
    assert (controls.slots[0].keep.minimum, controls.slots[0].keep.value) == (0.005, 0.005)


@pytest.mark.parametrize("text", ["2", "none", "nan"])
def test_a_negative_prompt_is_a_text_whatever_it_says(text):
    (field,) = [each for each in fields(Request) if each.name == "negative_prompt"]
    assert read_fields([field], [text]) == {"negative_prompt": text}


# What the page says at first ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "cards"),
    [
        (SparseContextConfig(), [(0.2, False, "auto", "auto", "")] * 2),
        (
            SparseContextConfig(keep=[0.5, "auto"], task="edit"),
            [(0.5, False, "edit", "auto", ""), (0.2, True, "edit", "auto", "")],
        ),
        (
            SparseContextConfig(keep=400, selector={"edges": 0.3, "detail": 0.7}),
            [(0.2, False, "auto", "edges=0.3,detail=0.7", "")] * 2,
        ),
        (
            SparseContextConfig(keep=1, selector=["edges", None]),
            [(1, False, "auto", "edges", ""), (1, False, "auto", "auto", "")],
        ),
    ],
)
def test_cards_say_what_the_settings_say(config, cards):
    assert [fresh(config, i) for i in range(2)] == cards


def test_what_the_settings_say_is_what_the_page_makes_of_it(tmp_path):
    """From a file to the controls, and from their values to a request."""
    config = SparseContextConfig(
        keep=40, share="joint", coverage=0.25, overview=None, overview_layout="spread", multiple_of=8, psnr=30.0
    )
    start = Request("the cat", (), config, seed=3, steps=2, height=64)
    write_settings(Settings(request=start), tmp_path / "settings.json")
    assert "multiple_of" in json.loads((tmp_path / "settings.json").read_text())
    controls, spec = in_a_loop(make_controls, start), Settings().spec
    scene = controls.scene(Session(), {"model": spec}, [control.value for control in controls.inputs])
    assert scene.request() == start


def test_every_field_has_a_control():
    """So that a new one of a config or a request is on the page without a line of code. (A phrase is that of one
    reference, and the command names the model that finds it.)"""
    labels = {control.label.lower().replace(" ", "_") for control in in_a_loop(make_controls, Request("")).inputs}
    names = {each.name for record in (SparseContextConfig, Request) for each in fields(record)}
    assert "phrase" in labels and names - labels == {"references", "config", "inpaint", "phrases", "text_model"}


def test_values_that_are_defaults_are_not_said():
    (field,) = [each for each in SparseContextConfig.__dataclass_fields__.values() if each.name == "merge"]
    assert read_fields([field], [0]) == {} and read_fields([field], [0.5]) == {"merge": 0.5}
    (field,) = [each for each in SparseContextConfig.__dataclass_fields__.values() if each.name == "overview"]
    assert read_fields([field], ["none"]) == {"overview": None} and read_fields([field], ["4"]) == {"overview": 4}
    assert read_fields([field], ["trained"]) == {} and read_fields([field], [""]) == {}
