"""`sparse-context train` as its users meet it: a run, a resumed run, and every bad input in one sentence."""

import json
import os
import subprocess
import sys
import tarfile

import pytest
import torch
from call import CALL
from diffusers import Flux2KleinPipeline, FluxKontextPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from test_training import two_ranks
from tiny import build_flux2, build_kontext, picture
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from sparse_context.cli import main
from sparse_context.images import open_picture
from sparse_context.training.batch import text_encoders
from sparse_context.training.cache import fingerprint
from sparse_context.training.card import LORA_FILE
from sparse_context.training.files import alone
from sparse_context.training.precision import has_fast_bfloat16


@pytest.fixture(autouse=True)
def no_accelerator_yet():
    """One process has one `Accelerator` state; a command has a process of its own, and these tests share one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, seed in (("a", 0), ("b", 1)):
        picture(64, 64, seed).save(folder / f"{name}.png")
    rows = [
        {"references": ["a.png", "b.png"], "image": "b.png", "prompt": "the cat"},
        {"references": ["b.png"], "image": "a.png", "prompt": "the room"},
    ]
    (folder / "good.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "bad.jsonl").write_text('{"prompt": "x"}\n{"references": ["no.png"], "prompt": "x", "image": "a.png"}\n')
    (folder / "one bad.jsonl").write_text('{"references": ["a.png"], "prompt": "x", "image": "no.png"}\n')
    return folder


def call(monkeypatch, capfd, *arguments):
    """(exit code, stdout, stderr) of `sparse-context train`."""
    monkeypatch.setattr(sys, "argv", ["sparse-context", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return exit.value.code, *capfd.readouterr()


def test_it_trains_and_resumes_and_the_result_loads(monkeypatch, capfd, data, tiny_model, tmp_path):
    from accelerate.state import AcceleratorState

    from sparse_context.pipelines.load import load
    from sparse_context.pipelines.spec import ModelSpec

    common = [
        "--data",
        data / "good.jsonl",
        "-m",
        tiny_model,
        "--set",
        "dtype=float32",
        "--set",
        "mixed_precision=no",
        "--set",
        "checkpointing_steps=1",
        "--rank",
        2,
        "--set",
        "dropping.mix=random=1,blobs=1",
        "--set",
        "dropping.coverage=0.1",
        "--set",
        "dropping.merge=0.5",
        "--set",
        "subsets=2",
    ]
    out = tmp_path / "run"
    first = [
        *common,
        "--output-dir",
        out,
        "--max-train-steps",
        2,
        "--validation-data",
        data / "good.jsonl",
        "--set",
        "validation_steps=0",
        "--set",
        "num_validation_images=1",
        "--set",
        "report_to=tensorboard",
    ]
    code, said, errors = call(monkeypatch, capfd, *first)
    assert code == 0, errors
    assert said.strip() == f"wrote {out / 'pytorch_lora_weights.safetensors'}"
    assert [p.name for p in (out / "validation").iterdir()] == ["step-0000002.webp"]
    assert list((out / "tensorboard").glob("events*"))
    code, _, errors = call(monkeypatch, capfd, *common, "--output-dir", out, "--max-train-steps", 3)
    assert code == 2 and "holds a run at step 2: continue it with --resume latest" in errors
    monkeypatch.chdir(data)
    relative = ["--data", "good.jsonl", *common[2:]]
    code, _, errors = call(
        monkeypatch, capfd, *relative, "--output-dir", out, "--max-train-steps", 3, "--resume", "latest"
    )
    assert code == 0, errors
    config = json.loads((out / "config.json").read_text())
    assert config["dropping"]["mix"] == {"random": 1.0, "blobs": 1.0} and config["dropping"]["coverage"] == [0.1]
    assert config["dropping"]["merge"] == [0.5] and config["subsets"] == 2
    assert sorted(p.name for p in out.glob("step-*")) == ["step-0000002", "step-0000003"]
    for other, says in (
        (["--set", "mixed_precision=bf16"], "mixed_precision was 'no' and is now 'bf16'"),
        (["--set", "dtype=bfloat16"], "base_weights was"),
        (["--set", "split=test"], "source was"),
    ):
        again = [*common, "--output-dir", out, "--max-train-steps", 4, "--resume", "latest", *other]
        AcceleratorState._reset_state(reset_partial_state=True)
        code, _, errors = call(monkeypatch, capfd, *again)
        assert code == 2 and f"was started with other settings: {says}" in errors, errors
    AcceleratorState._reset_state(reset_partial_state=True)
    whole = call(
        monkeypatch,
        capfd,
        *common,
        "--output-dir",
        tmp_path / "whole",
        "--max-train-steps",
        3,
        "--set",
        "cache_latents=true",
        "--set",
        "cache_text=true",
    )
    assert whole[0] == 0
    kept = {
        name: len(list((tmp_path / "whole").glob(f"cache/{name}/**/*.safetensors"))) for name in ("latents", "text")
    }
    assert kept == {"latents": 2, "text": 2}
    AcceleratorState._reset_state(reset_partial_state=True)
    code, _, errors = call(
        monkeypatch, capfd, *common, "--output-dir", tmp_path / "new", "--max-train-steps", 1, "--resume", "latest"
    )
    assert code == 0 and f"{tmp_path / 'new'} holds no checkpoint, so the run starts anew." in errors
    code, _, errors = call(
        monkeypatch, capfd, *common, "--output-dir", out, "--max-train-steps", 2, "--resume", "latest"
    )
    assert code == 2 and "is at step 3, and max_train_steps is 2: pass at least as many" in errors
    one, other = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (out, tmp_path / "whole"))
    assert all((one[name] == other[name]).all() for name in one)
    pipe = load(ModelSpec(str(tiny_model), device="cpu", lora=str(out / "pytorch_lora_weights.safetensors")))
    assert pipe.transformer.peft_config

    # the record of a run is a config: it makes the same run again
    AcceleratorState._reset_state(reset_partial_state=True)
    record = tmp_path / "whole" / "config.json"
    code, _, errors = call(monkeypatch, capfd, "--config", record, "--output-dir", tmp_path / "again")
    assert code == 0, errors
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(record.read_text())
    again = load_file(tmp_path / "again" / "pytorch_lora_weights.safetensors")
    assert all((other[name] == again[name]).all() for name in again)


def test_a_resumed_run_on_shards_in_batches_ends_at_equal_weights(monkeypatch, capfd, tiny_model, tmp_path):
    """Two shards of pictures in two shapes, which the batches of two do not mix."""
    from accelerate.state import AcceleratorState

    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(3):
                picture(96 if i < 2 else 64, 64, 10 * shard + i).save(tmp_path / "one.png")
                (tmp_path / "one.txt").write_text(f"the cat {i}")
                for field in ("reference0.png", "image.png", "prompt.txt"):
                    tar.add(tmp_path / f"one.{field[-3:]}", f"{i}.{field}")
    usual = ["--data", tmp_path / "{0..1}.tar", "-m", tiny_model, "--rank", 2, "--train-batch-size", 2]
    usual += ["--set", "dtype=float32", "--set", "mixed_precision=no"]
    for name, *steps in (("whole", 5), ("resumed", 2, 5)):
        for number, count in enumerate(steps):
            AcceleratorState._reset_state(reset_partial_state=True)
            resume = ["--resume", "latest"] if number else []
            options = ["--output-dir", tmp_path / name, "--max-train-steps", count, *resume]
            code, _, errors = call(monkeypatch, capfd, *usual, *options)
            assert code == 0, errors
    whole, resumed = (load_file(tmp_path / name / LORA_FILE) for name in ("whole", "resumed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole) and whole.keys() == resumed.keys()


def test_what_another_trainer_says_and_is_not_used_is_said_once(monkeypatch, capfd, data, tiny_model, tmp_path):
    toml = tmp_path / "data.toml"
    rows = {"image_path": str(data / "a.png"), "control_path": str(data / "b.png"), "caption": "the cat"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows))
    toml.write_text('[general]\nresolution = 512\n[[datasets]]\nimage_jsonl_file = "rows.jsonl"\nnum_repeats = 3\n')
    monkeypatch.setattr("sparse_context.training.launch.load", None)
    with pytest.raises(TypeError, match="NoneType"):  # it got as far as the model
        call(monkeypatch, capfd, "--data", toml, "-m", tiny_model, "--output-dir", tmp_path / "run")
    said = f"{toml}: num_repeats and resolution are not used; this run's own settings apply.\n"
    assert capfd.readouterr().err.count(said) == 1


def test_what_is_trained_for_overviews_is_generated_with_one(monkeypatch, capfd, data, tiny_model, tmp_path):
    """From one command to the other, which is told nothing of overviews."""
    out = tmp_path / "run"
    given = ["--data", data / "good.jsonl", "-m", tiny_model, "--output-dir", out, "--rank", 2, "--max-train-steps", 1]
    code, _, errors = call(monkeypatch, capfd, *given, "--overview-factors", "2,4", "--set", "dropping.dense=0")
    assert code == 0, errors
    assert json.loads((out / "config.json").read_text())["dropping"]["overview_factors"] == [2, 4]
    line = ["generate", "-m", tiny_model, "--lora", out / LORA_FILE, "--image", data / "a.png", "--prompt", "the cat"]
    line += ["--keep", 0.2, "--selector", "edges", "--json", "--output", tmp_path / "made.png"]
    monkeypatch.setattr(sys, "argv", ["sparse-context", *map(str, line)])
    with pytest.raises(SystemExit) as exit:
        main()
    said, errors = capfd.readouterr()
    assert exit.value.code == 0, errors
    (kept,) = json.loads(said)["selection"]["references"]
    assert kept["overview"]["factor"] == 4 and kept["overview"]["layout"] == "spread"


WATCH = """
# Python runs this as it starts. It notes what is opened for writing, made or renamed, each under the name that it gets.
import os, sys

log = open(os.environ["WATCH"], "w", buffering=1)

def note(event, given):
    if event in ("os.mkdir", "os.rename") or (event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR)):
        path = given[event == "os.rename"]
        print(event, path if isinstance(path, int) else os.fsdecode(path), file=log)

sys.addaudithook(note)
"""


@pytest.mark.slow
@pytest.mark.xdist_group(name="processes")
def test_two_processes_train_as_one_and_only_the_first_writes_what_is_kept(data, tiny_model, tmp_path):
    """`accelerate launch -m sparse_context.training`, on one folder. The second process only shares the cache."""
    out = tmp_path / "run"
    arguments = [
        "--data",
        data / "good.jsonl",
        "-m",
        tiny_model,
        "--set",
        "dtype=float32",
        "--set",
        "mixed_precision=no",
        "--output-dir",
        out,
        "--rank",
        2,
        "--max-train-steps",
        2,
        "--set",
        "checkpointing_steps=1",
        "--set",
        "cache_latents=true",
        "--validation-data",
        data / "good.jsonl",
        "--set",
        "validation_steps=1",
        "--set",
        "num_validation_images=1",
    ]
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    watched = [tmp_path / "first.log", tmp_path / "second.log"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "sparse_context.training", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **rank, "PYTHONPATH": str(tmp_path), "WATCH": str(log)},
        )
        for rank, log in zip(two_ranks(), watched, strict=True)
    ]
    said, errors = zip(*(process.communicate(timeout=300) for process in processes), strict=True)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert said == (f"wrote {out / LORA_FILE}\n", "")

    events = [[line.split(" ", 1) for line in log.read_text().splitlines()] for log in watched]
    touched = [
        [(event, path.removeprefix(f"{out}/")) for event, path in each if path.startswith(f"{out}/")] for each in events
    ]
    assert touched[1] and all(path.partition("/")[0] == "cache" for _, path in touched[1])
    steps = ["step-0000001", "step-0000002"]
    pictures = [f"validation/{step}.webp" for step in steps]
    whole = sorted(path for event, path in touched[0] if event == "os.rename" and not path.startswith("cache/"))
    assert whole == sorted([LORA_FILE, "README.md", "config.json", *steps, *pictures])  # each of them once
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [LORA_FILE, "README.md", "cache", "config.json", "log.jsonl", *steps, "validation"]
    )
    assert not [path for path in out.rglob("*") if path.suffix in (".partial", ".part")]

    config = json.loads((out / "config.json").read_text())
    assert (config["processes"], config["max_train_steps"]) == (2, 2)
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [2]
    assert "| steps | 2, one batch a step on each of 2 processes |" in (out / "README.md").read_text()
    with safe_open(out / LORA_FILE, framework="pt") as file:
        assert json.loads(file.metadata()["sparse_context"])["steps"] == 2
    assert all(load_file(path) for path in out.rglob("*.safetensors"))
    assert len(list(out.glob("cache/latents/**/*.safetensors"))) == 2  # a.png and b.png, which both processes encode
    assert len({open_picture(out / name).size for name in pictures}) == 1


def test_without_data_it_says_where_to_name_it(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capfd, "--rank", 2)
    said = "There is no data to train on: name a manifest, a folder or a hub name with --data."
    assert (code, out, err) == (2, "", f"sparse-context: {said}\n")
    assert list(tmp_path.iterdir()) == []


def test_it_has_at_most_nineteen_flags(monkeypatch, capfd):
    code, said, _ = call(monkeypatch, capfd, "--help")
    flags = [word for line in said.splitlines() for word in line.split()[:3] if line.startswith("  -")]
    assert code == 0 and 10 < sum(flag.startswith("--") for flag in flags if flag != "--help") <= 19


def test_check_data_names_every_bad_row_and_loads_no_model(monkeypatch, capfd, data, tmp_path):
    model = tmp_path / "model"  # of whose weights there are none
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    code, said, _ = call(monkeypatch, capfd, "--data", data / "bad.jsonl", "--check-data", "-m", model)
    assert code == 2
    lines = said.strip().splitlines()
    assert [line.split(" ")[1].rstrip(":") for line in lines] == ["1", "1", "2"]
    good, output = data / "good.jsonl", tmp_path / "out"
    code, said, _ = call(monkeypatch, capfd, "--data", good, "--check-data", "--output-dir", output)
    assert code == 0 and said == f"{good}: every row is good.\nwrote {output / 'check-data.png'}\n"
    assert [path.name for path in output.iterdir()] == ["check-data.png"]
    options = ["--validation-data", data / "bad.jsonl", "--output-dir", output]
    code, said, _ = call(monkeypatch, capfd, "--data", good, "--check-data", *options)
    assert code == 2 and f"{data / 'bad.jsonl'}: line 2" in said
    options = ["--validation-data", good, "--output-dir", output]
    code, said, _ = call(monkeypatch, capfd, "--data", good, "--check-data", *options)
    assert code == 2
    shared = [line for line in said.splitlines() if line.startswith("The image of the validation sample")]
    assert [line.partition("sample ")[2] for line in shared] == [
        "000001 is also the image of the sample 000001.",
        "000002 is also a reference of the sample 000001.",
    ]


def test_more_references_than_the_model_takes_are_refused_before_it_is_loaded(monkeypatch, capfd, data, tmp_path):
    row = json.loads((data / "good.jsonl").read_text().splitlines()[0])
    (data / "many.jsonl").write_text(json.dumps({**row, "references": row["references"][:1] * 5}))
    said = "line 1 has 5 references, and the model takes at most 4: list fewer."  # the embedded model
    code, out, _ = call(monkeypatch, capfd, "--data", data / "many.jsonl", "--check-data")
    assert (code, out.strip()) == (2, said)
    monkeypatch.setattr("sparse_context.training.launch.load", None)
    for options in (("--data", "many.jsonl"), ("--data", "good.jsonl", "--validation-data", "many.jsonl")):
        given = [data / one if one.endswith("jsonl") else one for one in options]
        code, _, err = call(monkeypatch, capfd, *given, "--output-dir", tmp_path / "run")
        assert code == 2 and said in err and not (tmp_path / "run").exists()


def test_two_runs_do_not_write_one_folder(monkeypatch, capfd, data, tmp_path):
    with alone(tmp_path / "run"):
        code, _, err = call(monkeypatch, capfd, "--data", data / "good.jsonl", "--output-dir", tmp_path / "run")
    assert code == 2 and err == (
        f"sparse-context: Another run is writing into {tmp_path / 'run'}: wait for its end, or name another folder.\n"
    )
    assert not (tmp_path / "run").exists()


def test_in_a_folder_in_use_nothing_is_said_but_that(monkeypatch, capfd, data, tmp_path):
    """Not that it starts anew, and no model is loaded first."""
    monkeypatch.setattr("sparse_context.training.launch.load", None)
    for made in (False, True):
        if made:
            (tmp_path / "run" / "step-0000001").mkdir(parents=True)
            (tmp_path / "run" / "config.json").write_text('{"dropping": {}}')
        with alone(tmp_path / "run"):
            code, out, err = call(
                monkeypatch,
                capfd,
                "--data",
                data / "good.jsonl",
                "--output-dir",
                tmp_path / "run",
                "--resume",
                "latest",
            )
        said = f"Another run is writing into {tmp_path / 'run'}: wait for its end, or name another folder."
        assert (code, out, err) == (2, "", f"sparse-context: {said}\n")


def spoil(folder, kind):
    """A manifest whose second row has a picture that cannot be used."""
    rows = [json.loads(line) for line in (folder / "good.jsonl").read_text().splitlines()]
    names = {"text": "text.png", "cut": "cut.png", "empty": "empty.png", "gone": "gone.png", "folder": "folder.png"}
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-2000])
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir(exist_ok=True)
    picture(32, 64).convert("L").save(folder / "small.png")
    if kind == "mask":
        rows[1]["reference_masks"] = ["small.png"]
    elif kind == "image":
        rows[1]["image"] = "cut.png"
    else:
        rows[1]["references"] = [names[kind]]
    (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / f"{kind}.jsonl"


@pytest.mark.parametrize("kind", ["text", "cut", "empty", "gone", "folder", "mask", "image"])
def test_bad_pictures_are_found_before_a_model_is_loaded(kind, monkeypatch, capfd, data, tmp_path):
    monkeypatch.setattr("sparse_context.training.launch.load", None)
    code, _, err = call(monkeypatch, capfd, "--data", spoil(data, kind), "--output-dir", tmp_path / "run")
    assert code == 2 and err.startswith("sparse-context: The sample 000002 cannot be used: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_of_a_large_manifest_all_pictures_have_to_be_there_and_the_first_are_opened(monkeypatch, capfd, data, tmp_path):
    monkeypatch.setattr("sparse_context.training.launch.load", None)
    monkeypatch.setattr("sparse_context.samples.read.CHECKED", 1)
    code, _, err = call(monkeypatch, capfd, "--data", spoil(data, "gone"), "--output-dir", tmp_path / "run")
    assert code == 2 and "The sample 000002 cannot be used: " in err and "gone.png" in err
    with pytest.raises(TypeError, match="NoneType"):  # it got as far as the model
        call(monkeypatch, capfd, "--data", spoil(data, "cut"), "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_run_needs_to_go_on_is_missed_before_a_model_is_loaded(monkeypatch, capfd, data, tmp_path):
    monkeypatch.setattr("sparse_context.training.launch.load", None)
    (tmp_path / "run" / "step-0000001").mkdir(parents=True)
    given = ["--data", data / "good.jsonl", "--output-dir", tmp_path / "run", "--resume", "latest"]
    code, _, err = call(monkeypatch, capfd, *given)
    assert code == 2 and "config.json cannot be read (No such file or directory)" in err
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "step-0000002").touch()
    code, _, err = call(monkeypatch, capfd, *given)
    assert code == 2 and "step-0000002 is no folder, and has the name of a checkpoint: move it away." in err


def test_processes_that_cannot_be_forked_are_refused_before_a_model_is_loaded(monkeypatch, capfd, data, tmp_path):
    monkeypatch.setattr("sparse_context.training.launch.load", None)
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    code, _, err = call(
        monkeypatch,
        capfd,
        "--data",
        data / "good.jsonl",
        "--output-dir",
        tmp_path / "run",
        "--set",
        "dataloader_num_workers=2",
    )
    assert code == 2 and "The number of processes is 2, which this system cannot fork: pass 0" in err
    assert not (tmp_path / "run").exists()


def test_all_that_is_not_installed_is_named_at_once(monkeypatch, capfd, data, tmp_path):
    for name in ("tensorboard", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    common = ["--output-dir", tmp_path / "run", "--set", "report_to=tensorboard"]
    code, _, err = call(monkeypatch, capfd, "--data", data, *common)
    assert code == 2 and "TensorBoard" in err and "datasets" in err and err.count("sparse-context[train]") == 1
    code, _, err = call(monkeypatch, capfd, "--data", data / "good.jsonl", *common)
    assert code == 2 and "TensorBoard" in err and "datasets" not in err
    code, _, err = call(
        monkeypatch,
        capfd,
        "--data",
        data / "good.jsonl",
        "--validation-data",
        "owner/name",
        "--output-dir",
        tmp_path / "run",
    )
    assert code == 2 and "TensorBoard" not in err and "datasets" in err and "reading owner/name" in err
    assert not (tmp_path / "run").exists()


BAD = [
    (["--overview-factors", "2,x"], "overview_factors is '2,x': pass whole numbers, separated by commas, or none."),
    (["--overview-factors", "1"], "overview_factors is [1]: pass whole numbers from 2 to 16."),
    (["--set", "ema"], "The setting ema has no value: write it as field=value"),
    (["--set", "lerning_rate=1"], "There is no field 'lerning_rate': did you mean learning_rate"),
    (["--rank", "2", "--set", "rank=4"], "rank is 2, and the setting rank=4 differs: leave one of the two out."),
    (["--set", "rank=many"], "rank is 'many': pass a whole number."),
    (["--config", "nowhere.json"], "The config nowhere.json cannot be read (No such file or directory)"),
    (["--config", "{data}/good.jsonl"], "is no JSON file"),
    (["--data", "nowhere.jsonl"], "does not exist"),
    (["--data", "{data}/bad.jsonl"], "line 1 has no 'references'"),
    (["--data", "{data}/one bad.jsonl", "--validation-data", "{data}/one bad.jsonl"], "no.png"),
    (["--data", "{data}/good.jsonl", "--validation-data", "nowhere.jsonl"], "does not exist"),
    (["--data", "{data}/good.jsonl", "--set", "caption_column=text"], "line 1 has no 'text'"),
    (["-m", "nowhere/at all"], "nowhere/at all"),
    (["--resume", "best"], "resume is 'best'"),
    (["--set", "teach=0.1", "--set", "teach_heads=1.0"], 'good.jsonl says where heads are to look: write "aligned"'),
    (["--set", "mixed_precision=fp16"], "mixed_precision is 'fp16'"),
    (["--set", "dtype=int8"], "dtype is 'int8'"),
    (["--set", "report_to=wandb"], "report_to is 'wandb'"),
    (["--resolution", "16"], "resolution is 16"),
    (["--set", "reference_resolution=1"], "reference_resolution is 1"),
    (["--set", "reference_resolution=0"], "reference_resolution is 0"),
    (["--set", "dtype=float16"], "dtype is 'float16'"),
    (["--train-batch-size", "0"], "--train-batch-size is 0"),
    (["--gradient-accumulation-steps", "0"], "gradient_accumulation_steps is 0"),
    (["--rank", "0"], "rank is 0"),
    (["--rank", "many"], "'--rank'"),
    (["--set", "lora_alpha=-1"], "lora_alpha is -1"),
    (["--learning-rate", "nan"], "learning_rate is nan"),
    (["--set", "lr_scheduler=step"], "lr_scheduler is 'step'"),
    (["--set", "weighting_scheme=mode"], "weighting_scheme is 'mode'"),
    (["--set", "dropping.keep_min=0"], "from 0.0 to 1.0"),
    (["--set", "dropping.keep_min=0.5", "--set", "dropping.keep_max=0.1"], "from 0.5 to 0.1"),
    (["--set", "dropping.dense=2"], "dense is 2"),
    (["--set", "dropping.mix=random"], "dropping.mix is 'random'"),
    (["--set", "dropping.mix=rndom=1"], "no kind of dropping 'rndom'"),
    (["--set", "dropping.coverage=3"], "coverage is [3.0]"),
    (["--set", "dropping.merge=3"], "merge is [3.0]"),
    (["--set", "caption_dropout=1.1"], "caption_dropout is 1.1"),
    (["--set", "subsets=0"], "subsets is 0"),
    (["--set", "distillation=2"], "distillation is 2"),
    (["--full", "--set", "distillation=1"], "leave one of the two out"),
    (["--set", "preservation=-1"], "preservation is -1"),
    (["--set", "validation_keep=0"], "keep is 0.0"),
    (["--set", "dataloader_num_workers=-1"], "dataloader_num_workers is -1"),
    (["--max-train-steps", "0"], "max_train_steps is 0"),
    (["--set", "checkpoints_total_limit=0"], "checkpoints_total_limit is 0"),
    (["--seed", "-1"], "seed is -1"),
    (["--set", "ema=1"], "ema is 1.0"),
    (["--output-dir", "{data}/a.png"], "is a file"),
    (["-m", "{model}", "--set", "lora_layers=to_z"], "lora_layers is to_z"),
    (["-m", "{model}", "--set", "lora_layers=to_z", "--set", "report_to=tensorboard"], "lora_layers is to_z"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_sentence_and_nothing_is_written(
    arguments, message, monkeypatch, capfd, data, tiny_model, tmp_path
):
    monkeypatch.chdir(tmp_path)
    given = [a.replace("{data}", str(data)).replace("{model}", str(tiny_model)) for a in arguments]
    for option, value in (("--data", data / "good.jsonl"), ("--output-dir", tmp_path / "out")):
        given += [] if option in given else [option, str(value)]
    code, said, errors = call(monkeypatch, capfd, *given)
    assert code == 2 and said == ""
    last = errors.strip().splitlines()[-1]
    assert last.startswith("sparse-context: ") and message in last, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_kv_training_of_a_model_with_guidance_says_what_its_result_is_for(monkeypatch, capfd, data, tmp_path):
    model = tmp_path / "tiny klein base"
    build_flux2(Flux2KleinPipeline, is_distilled=False).save_pretrained(model)
    (model / "call.json").write_text(json.dumps(CALL))
    code, _, errors = call(
        monkeypatch,
        capfd,
        "--data",
        data / "good.jsonl",
        "-m",
        model,
        "--kv",
        "--max-train-steps",
        1,
        "--output-dir",
        tmp_path / "out",
    )
    said = f"{model} has guidance, which KV mode has not: the result is for its distilled sibling"
    assert code == 0 and said in errors


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_cached_prompts_belong_to_the_weights_of_every_text_encoder(encoder):
    pipe = build_kontext(FluxKontextPipeline)
    sides = {
        "vocab_size": 9,
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_layers": 1,
        "d_model": 8,
        "d_ff": 8,
        "d_kv": 4,
        "num_heads": 2,
    }
    pipe.register_modules(
        text_encoder=CLIPTextModel(CLIPTextConfig(**sides)), text_encoder_2=T5EncoderModel(T5Config(**sides))
    )
    before = fingerprint(text_encoders(pipe))
    assert fingerprint(text_encoders(pipe)) == before
    with torch.no_grad():
        next(getattr(pipe, encoder).parameters()).add_(1.0)
    assert fingerprint(text_encoders(pipe)) != before


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of norms in autocast
@pytest.mark.parametrize(("dtype", "kinds"), [("float32", 2), ("bfloat16", 1)])
def test_one_cache_serves_runs_whose_encoders_compute_alike(
    monkeypatch, capfd, data, tiny_model, tmp_path, dtype, kinds
):
    """Mixed precision is for encoders of float32 weights; others make the same with and without it."""
    from accelerate.state import AcceleratorState

    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        given = ["-m", tiny_model, "--data", data / "good.jsonl", "--max-train-steps", 1, "--resolution", 64]
        for setting in (
            f"mixed_precision={precision}",
            f"dtype={dtype}",
            f"cache_dir={tmp_path / 'cache'}",
            "cache_latents=true",
            "cache_text=true",
        ):
            given += ["--set", setting]
        code, _, errors = call(monkeypatch, capfd, *given, "--output-dir", tmp_path / precision)
        assert code == 0, errors
        slow = (precision == "bf16" or dtype == "bfloat16") and not has_fast_bfloat16("cpu")
        assert ("This CPU has no instructions for bfloat16" in errors) is slow
    assert [len(list((tmp_path / "cache" / name).iterdir())) for name in ("latents", "text")] == [kinds, kinds]


def test_memory_that_runs_out_is_one_sentence(monkeypatch, capfd, data, tiny_model, tmp_path):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sparse_context.training.launch.finetune", full)
    code, _, err = call(
        monkeypatch, capfd, "-m", tiny_model, "--data", data / "good.jsonl", "--output-dir", tmp_path / "out"
    )
    said = [line for line in err.splitlines() if line.startswith("sparse-context: ")]
    assert code == 2 and len(said) == 1 and "memory ran out: set " in said[0]


@pytest.mark.slow
def test_the_module_for_accelerate_launch_is_the_same_command(data):
    done = subprocess.run(
        [sys.executable, "-m", "sparse_context.training", "--data", str(data / "bad.jsonl"), "--check-data"],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 3
