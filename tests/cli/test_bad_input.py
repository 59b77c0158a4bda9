"""Bad input that needs no model: one sentence on stderr, exit code 2, and not a file more than before."""

import pytest

from sparse_context.cli import _fail, _said

PICTURES = {
    "missing.png": "does not exist",
    "truncated.png": "is damaged or cut short",
    "corrupt.png": "is damaged or cut short",
    "text.png": "is not a picture that can be read",
    "empty.png": "is empty",
    "bomb.png": "is too large (as its header says)",
    "a folder.png": "is a folder",
}


CHOICES = {
    "--keep 0": "keep is 0: pass a ratio above 0 and up to 1",
    "--keep 1.2": "keep is 1.2: pass a ratio",
    "--keep -1": "keep is -1: pass a ratio",
    "--keep -0.1": "keep is -0.1: pass a ratio",
    "--keep nan": "keep is nan: pass a ratio",
    "--keep inf": "keep is inf: pass a ratio",
    "--keep lots": "keep is 'lots': pass a ratio such as 0.2, a count such as 400, or auto.",
    "--keep 0.1 --keep 0.2 --keep 0.3": "--keep has 3 values for 1 references",
    "--selector nonsense": "There is no selector 'nonsense': choose one of random, uniform",
    "--selector edgs": "Did you mean 'edges'?",
    "--selector edges,saliency": "There is no selector 'edges,saliency'",
    "--selector edges=1,salience=1": "There is no selector 'salience'",
    "--selector edges=1,saliency": "write a blend as saliency=0.7,edges=0.3",
    "--selector edges=1,saliency=x": "write a blend as saliency=0.7,edges=0.3",
    "--selector edges=1,edges=2": "write a blend as saliency=0.7,edges=0.3",
    "--selector edges=1e308,detail=1e308": "The weights of the blend add up to inf: pass smaller ones",
    "--selector edges=-1": "The weight of 'edges' in the blend is -1.0: pass a number above 0",
    "--selector edges=nan": "The weight of 'edges' in the blend is nan",
    "--selector edges --selector uniform": "--selector has 2 values for 1 references",
    "--task paint": "task is 'paint': choose one of auto, edit, global, subject",
    "--coverage 2": "coverage is 2.0: pass a share from 0 to 1",
    "--coverage nan": "coverage is nan",
    "--merge 2": "merge is 2.0: pass the share of the budget for averages, from 0 to 1",
    "--overview 1": "overview is 1: pass a factor from 2 to 16, 'auto', 'trained' or None",
    "--overview four": "overview is 'four': pass a factor such as 4, auto, trained or none",
    "--overview 4 --overview 4": "--overview has 2 values for 1 references",
    "--overview 4 --merge 0.5": "merge is 0.5 and overview 4: leave one of the two out",
    "--overview 4 --overview-layout over": "--overview-layout is 'over': choose one of spread, reference",
    "--share mine": "share is 'mine': choose 'joint' or 'equal'",
    "--floor -1": "floor is -1",
    "--mask {in}/band.png": "has 96x64 pixels but its picture has 64x64; resize the mask",
    "--mask {in}/corner.png --mask {in}/corner.png": "There are 2 masks for 1 references: pass one --mask for each.",
    "--mask {in}/missing.png": "does not exist",
    "--mask {in}/text.png": "is not a picture",
    "--mask {in}/corner.png --selector edges": "--mask was given, but --selector does not use it",
    "--mask {in}/corner.png --selector edges=1,uniform=1": "--mask was given, but --selector does not use it",
    "--output no/such/out.png": "does not exist; make it first",
    "--output .": "does not end in the name of a picture format",
    "--output out": "does not end in the name of a picture format",
    "--output out.gif": "end it in .png, .jpg, .jpeg, .webp",
    "--output {in}/text.png/out.png": "does not exist",
    "--nonsense": "No such option: --nonsense",
    "--keep": "requires an argument",
    "--floor many": "Invalid value for '--floor': ",
}


@pytest.mark.parametrize("face", ["generate", "select"])
@pytest.mark.parametrize(("name", "says"), PICTURES.items())
def test_a_bad_picture(refused, face, name, says):
    given = [f"{{in}}/{name}"] if face == "select" else ["--image", f"{{in}}/{name}", "--prompt", "x", "-m", "{model}"]
    message = refused(face, *given)
    assert says in message and name in message


@pytest.mark.parametrize("face", ["generate", "select"])
@pytest.mark.parametrize(("options", "says"), CHOICES.items())
def test_a_bad_choice(refused, face, options, says):
    given = ["{in}/a.png"] if face == "select" else ["--image", "{in}/a.png", "--prompt", "x", "-m", "{model}"]
    assert says in refused(face, *given, *options.split(" "))


@pytest.mark.parametrize(
    ("arguments", "says"),
    {
        "nonsense": "No such command 'nonsense'",
        "--nonsense": "No such option: --nonsense",
        "select": "Missing argument",
        "select {in}/a.png --token 0": "token is 0: pass its side in pixels, from 1 to 256.",
        "select {in}/a.png --token 200": "less than one token of 200 pixels",
        "select {in}/a.png {in}/b.png --keep 2 --floor 0 --selector mask": "neither a mask nor an alpha channel",
        "select {in}/a.png {in}/b.png {in}/c.png --keep 2": "makes 2 tokens for 3 references",
        "generate --image {in}/a.png": "Missing option '--prompt'",
        "generate --prompt": "requires an argument",
        "generate --prompt x --show-tokens t.png": "--show-tokens draws on the references, but there are none",
        "generate --prompt x --mask {in}/corner.png": "There are 1 masks for 0 references",
        "generate --prompt x --output a.png --compare a.png": "name the same file",
        "generate --prompt x --image {in}/a.png --output a.png --show-tokens ./a.png": "name the same file",
        "generate --prompt x --image {in}/a.png --output {in}/a.png": "a.png is also an input and would be overwritten",
        "generate --prompt x --image {in}/a.png --mask {in}/corner.png --compare {in}/corner.png": "is also an input",
        "select {in}/a.png {in}/b.png --output {in}/b.png": "b.png is also an input",
        "generate --prompt x --show-tokens no/t.png": "the folder",
        "generate --prompt x --image {in}/a.png --overview 4 --reference-max-pixels 0": "--reference-max-pixels is 0",
        "generate --prompt x --image {in}/a.png --overview none --reference-max-pixels 9": "only an overview shows",
        "generate --prompt x --compare c.bmp": "end it in .png",
        "serve --port 70000": "port is 70000: pass a number from 0 to 65535.",
        "serve --max-body 0": "--max-body is 0: pass 1 or more.",
        "serve --max-references -3": "--max-references is -3: pass 1 or more.",
        "serve --max-megapixels nan": "--max-megapixels is nan: pass a number above 0",
        "serve --max-output-megapixels 1e-9": "--max-output-megapixels is 1e-09: pass a number above 0",
        "serve --queue 0": "queue is 0: pass 1 or more.",
        "serve --deadline inf": "deadline is inf: pass a number of seconds above 0.",
        "serve --cache -1": "--cache is -1: pass MiB, or 0 for none.",
        "serve --batch many": "batch is 'many': pass a number of pictures, or auto.",
        "serve --keep-high nan": "--keep-high: keep is nan: pass a ratio",
        "serve --api-key-file nope": "--api-key-file nope cannot be read (No such file or directory): name a text file",
        "serve --api-key-file {in}": "cannot be read (Is a directory): name a text file with the key.",
        "serve --api-key-file {in}/a.png": "a.png cannot be read (it is no text): name a text file with the key.",
        "serve --ray-config {in}/a.png": "a.png is there and would be overwritten: give --ray-config another name.",
        "serve --replicas 2": "--replicas is for replicas on Ray: pass --ray too, or leave it out.",
        "serve --max-replicas 2": "--max-replicas is for replicas on Ray",
        "serve --gpus 1": "--gpus is for replicas on Ray",
        "batch {in}/text.png --output o --gpus 1": "--gpus is for workers on Ray: pass --ray too, or leave it out.",
        "bench --predict --plot p.png": "--plot is for what is timed: leave it or --predict out.",
        "bench --predict --device cpu": "--device is for what is timed: leave it or --predict out.",
        "bench --predict --turns 3": "--turns is for what is timed",
        "bench --predict --minutes 3": "--minutes is for what is timed",
        "bench --quality q.json": "--quality is for the plot: pass --plot too, or leave it out.",
        "bench --output p.png --plot ./p.png": "name the same file: give each its own.",
        "bench --output q.json --plot p.png --quality q.json": "name the same file: give each its own.",
        "bench --output no/where.json": "no' does not exist; make it first",
        "recommend --image {in}/a.png --prompt x --output r --overview 99": "overview is 99: pass a factor",
        "recommend --image {in}/a.png --prompt x --output r --task foo": "task is 'foo': choose one of",
        "recommend --image {in}/a.png --prompt x --output r --keep nan": "keep is nan: pass a ratio",
        "recommend --image {in}/a.png --prompt x --output r --keep 5": "keep is 5.0: pass a ratio above 0",
        "demo --output {in}/a.png": "a.png cannot be used (File exists): name another file or folder",
        "batch {in}/text.png --output o --format tiff": "format is 'tiff': choose png, jpg or webp.",
        "recommend --data d.jsonl --prompt x": "--data has prompts of its own: leave --prompt out.",
        "evaluate --benchmark pie-bench --data d --split test": "pie-bench has a layout of its own: leave --split",
    }.items(),
)
def test_bad_arguments(refused, arguments, says):
    assert says in refused(*arguments.split(" "))


def test_outputs_that_differ_in_capitals_alone_are_one_where_the_system_says_so(refused, monkeypatch):
    monkeypatch.setattr("os.path.normcase", lambda path: str(path).lower())  # as on Windows
    assert "name the same file" in refused(*"generate --prompt x --output a.png --compare A.png".split(" "))


def test_a_name_that_no_file_can_have_is_refused_before_the_work(refused):
    assert "cannot be written (" in refused("generate", "--prompt", "x", "--output", f"{'n' * 300}.png")


def test_a_folder_as_output(refused, tmp_path):
    (tmp_path / "out.png").mkdir()
    assert "is a folder; give the name of a file inside it" in refused("select", "{in}/a.png", "--output", "out.png")


def test_names_of_python_are_printed_as_options_but_not_within_paths(capsys):
    with pytest.raises(SystemExit, match="2"):
        _fail("lora_scale is 2: set cpu_offload, not 'lora_scale' in a/lora_scale.png or lora_scale.")
    said = "--lora-scale is 2: set --cpu-offload, not 'lora_scale' in a/lora_scale.png or --lora-scale."
    assert capsys.readouterr().err == f"sparse-context: {said}\n"


def test_keys_of_a_settings_file_keep_their_names(capsys):
    with pytest.raises(SystemExit, match="2"):
        _fail("The settings a.json: lora_scale is inf")
    assert capsys.readouterr().err == "sparse-context: The settings a.json: lora_scale is inf\n"


def test_what_the_system_says_has_a_way_out_and_no_number():
    assert _said(FileExistsError(17, "File exists", "out")) == (
        "out cannot be used (File exists): name another file or folder, or make room there."
    )
    assert _said(OSError(28, "No space left on device")).startswith("The output cannot be used (No space left")
    assert _said(FileNotFoundError("x.png does not exist.")) == "x.png does not exist."


def test_without_stderr_an_error_is_not_printed_among_results(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    with pytest.raises(SystemExit, match="2"):
        _fail("keep is 2")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "says"),
    {
        '{"keep": 2.5}': "settings.json: keep is 2.5: pass a ratio above 0",
        '{"kep": 2}': "settings.json: 'kep' is no setting here. Did you mean 'keep'?",
        "{": "settings.json cannot be read",
        '{"selector": ["edges", "edges"]}': "There are 2 selectors for 1 references: give one, or as many.",
    }.items(),
)
def test_bad_settings_of_a_file(refused, tmp_path, text, says):
    (tmp_path / "settings.json").write_text(text)
    given = ["--image", "{in}/a.png", "--mask", "{in}/corner.png", "--prompt", "x", "--settings", "settings.json"]
    assert says in refused("generate", "-m", "{model}", *given)
