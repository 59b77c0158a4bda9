"""`sparse-context serve` in a process of its own, on the embedded model and on none."""

import os
import re
import signal
import subprocess
import sys

import openai
import pytest

from server.shared import PATIENCE, png

COMMAND = [sys.executable, "-m", "sparse_context", "serve", "--port", "0"]


def start(tmp_path, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "SPARSE_CONTEXT_API_KEY"}
    return subprocess.Popen(
        [*COMMAND, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_the_embedded_model_is_served_until_a_signal_and_what_runs_is_finished(tmp_path):
    with start(tmp_path) as process:
        try:
            said = process.stderr.readline()
            port = re.search(r"serving sparse-context-embedded on http://127\.0\.0\.1:(\d+)$", said)
            assert port is not None, said
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port[1]}/v1", api_key="none", timeout=PATIENCE) as client:
                answer = client.images.edit(image=png(), prompt="a cat", extra_body={"num_inference_steps": 1})
                assert answer.size == "128x128"
                stream = client.images.edit(image=png(), prompt="a cat", stream=True, partial_images=1)
                first = next(iter(stream))
                process.send_signal(signal.SIGTERM)
                events = [first, *stream]
            assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert (process.returncode, out) == (-signal.SIGTERM, "")
    lines = err.splitlines()
    assert "ready, making at most " in lines[0] and " POST /v1/images/edits 200 " in lines[-1]
    assert "a cat" not in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-m", "no/such/folder"], "sparse-context: "),
        (["-m", "{weights}"], "sparse-context: The model .* is incomplete: weights of its transformer are missing."),
        (["--host", "0.0.0.0"], "sparse-context: host is '0.0.0.0', which others can reach, and there is no API key"),
        (["--host", "192.0.2.1", "--api-key-file", "key"], "sparse-context: 192.0.2.1:0 cannot be listened on"),
        (["--keep", "3.5"], "sparse-context: keep is 3.5: pass a ratio above 0"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(tmp_path, tiny_model, arguments, says):
    import shutil

    from safetensors.torch import load_file, save_file

    (tmp_path / "key").write_text("0123456789abcdef\n")
    if "{weights}" in arguments:
        folder = shutil.copytree(tiny_model, tmp_path / "partial")
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        kept = load_file(weights)
        del kept["norm_out.linear.weight"]
        save_file(kept, weights, metadata={"format": "pt"})
        arguments = ["-m", str(folder)]
    with start(tmp_path, *arguments) as process:
        out, err = process.communicate(timeout=PATIENCE)
    last = err.splitlines()[-1]
    assert (process.returncode, out) == (2, "")
    assert re.match(says, last) and "Traceback" not in err
