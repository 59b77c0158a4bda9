"""Files and bodies that mean harm, or came to it on the way; slow senders; what is left behind."""

import contextlib
import gc
import io
import json
import os
import pickle
import socket
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from server.shared import PATIENCE, multipart, opened, pixels, png, wait_for, written

PNG = png()


def post(service, image, path="/v1/images/edits", **fields):
    """Status and JSON of an edit of this file."""
    kind, body = multipart([("prompt", "the cat"), ("seed", "0"), *fields.items(), ("image", image)])
    status, headers, answer = service.get(path, {"Content-Type": kind}, "POST", body)
    assert headers["content-type"] == "application/json"
    return status, json.loads(answer)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width, height, data=b"", extra=b""):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


ODD = {
    "16 bit": written(Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))),
    "cmyk": written(Image.fromarray(pixels()).convert("CMYK"), "JPEG"),
    "palette": written(Image.fromarray(pixels()).quantize(16)),
    "one bit": written(Image.fromarray(pixels()).convert("1")),
    "animated": written(Image.fromarray(pixels()), "GIF", save_all=True, append_images=[Image.fromarray(pixels(1))]),
    "animated webp": written(
        Image.fromarray(pixels()), "WEBP", save_all=True, append_images=[Image.fromarray(pixels(1))]
    ),
    "polyglot of zip": PNG + b"PK\x03\x04" + bytes(100) + b"PK\x05\x06" + bytes(18),
    "polyglot of html": png_of(
        64, 64, (b"\0" + bytes(192)) * 64, chunk(b"tEXt", b"Comment\0<script>alert(1)</script>")
    ),
    "tiny": png(0, 8, 8),
    "very wide": png(0, 1200, 8),
    "transparent": written(Image.fromarray(np.dstack([pixels(), np.full((64, 64), 128, np.uint8)]))),
}


def test_a_strip_is_refused_before_it_is_padded(service):
    status, answer = post(service, png(0, 200_000, 8))
    assert status == 400 and answer["error"]["message"].startswith(
        "A reference has 200000x8 pixels, too long a strip to be padded to 8:1: crop it"
    )


@pytest.mark.parametrize("name", ["keep[\u00b2]", f"keep[{'1' * 500}]"])
def test_a_name_with_an_odd_number_is_an_entry_of_that_name(service, name):
    status, answer = post(service, PNG, **{name: "0.5"})
    assert status == 400 and answer["error"]["message"].startswith("keep is ")


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b'{"\\ud800": 1, "prompt": "x"}', 400, "There is no field "),
        (b'{"seed": 1, "prompt": "x", "seed": 2}', 400, "The body has 'seed' twice: write it once."),
        (b'{"prompt": "' + b"x" * 2**20 + b'"}', 413, "The body is larger than 1048576 bytes: send a shorter one."),
        (
            b'{"prompt": "x", "size": "16384x64", "output_format": "webp"}',
            400,
            "size is 16384x64, and webp holds 16383",
        ),
    ],
)
def test_a_body_that_cannot_be(service, body, status, said):
    kind = {"Content-Type": "application/json"}
    found, _, answer = service.get("/v1/images/generations", kind, "POST", body)
    assert found == status and json.loads(answer)["error"]["message"].startswith(said)


BAD = {
    "empty": (b"", "The image cannot be used: it is empty; send another copy."),
    "truncated": (PNG[: len(PNG) // 2], "The image cannot be used: a picture of {} bytes is damaged or cut short ("),
    "only a head": (PNG[:33], "The image cannot be used: a picture of 33 bytes is "),
    "text": (b"GIF89a? no", "The image cannot be used: a picture of 10 bytes is not a picture that can be read"),
    "svg": (
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "The image cannot be used: a picture of 41 bytes is not a pic",
    ),
    "script": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n(x) print\n",
        "The image cannot be used: a picture of 34 bytes is not a pict",
    ),
    "bomb": (png_of(60_000, 60_000, bytes(1000)), "The image cannot be used: a picture of "),
    "20,000 px wide": (png_of(20_000, 20_000, bytes(10)), "The image cannot be used: a picture of "),
    "pickle": (pickle.dumps(os.getcwd), "The image cannot be used: a picture of "),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_picture_is_a_reference_like_any_other(service, kind):
    status, answer = post(service, ODD[kind])
    assert status == 200, answer
    assert answer["size"] == "64x64" and answer["sparse_context"]["selection"]["kept"] > 0


def test_a_picture_is_turned_as_its_exif_says(service):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = written(Image.fromarray(pixels(0, 96, 64)).rotate(90, expand=True), "TIFF")
    rotated = written(Image.open(io.BytesIO(turned)), "TIFF", exif=exif)
    upright = written(Image.fromarray(pixels(0, 96, 64)), "TIFF")
    answers = [post(service, image, keep="1")[1] for image in (rotated, upright)]
    assert answers[0]["data"] == answers[1]["data"]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_one_sentence(service, kind):
    data, says = BAD[kind]
    before = service.figure("running_jobs"), service.figure("pictures_total")
    start = time.process_time()
    status, answer = post(service, data)
    assert time.process_time() - start < 5
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "image", "invalid_image")
    assert answer["error"]["message"].startswith(says.format(len(data)))
    assert "Traceback" not in answer["error"]["message"] and "\n" not in answer["error"]["message"]
    assert (service.figure("running_jobs"), service.figure("pictures_total")) == before


def test_the_place_of_a_bad_picture_is_named(service):
    kind, body = multipart([("prompt", "x"), ("image[]", PNG), ("image[]", b"no")])
    status, _, answer = service.get("/v1/images/edits", {"Content-Type": kind}, "POST", body)
    assert status == 400 and b"The image 2 cannot be used" in answer


def test_a_large_picture_within_the_bounds_is_taken(service):
    wide = written(Image.new("RGB", (20_000, 400), "red"))
    status, answer = post(service, wide)
    assert status == 200, answer


# Bodies ---------------------------------------------------------------------------------------------------------------


def talk(service, head, body=b"", wait=True):
    """What comes back on a connection on which this was sent."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as connection:
        try:
            connection.sendall(head.replace("\n", "\r\n").encode() + body)
        except OSError:
            pass
        return rest(connection) if wait else b""


def rest(connection):
    """What comes back until the server closes: an answer may come in pieces."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received


EDIT = "POST /v1/images/edits HTTP/1.1\nHost: 127.0.0.1\nConnection: close\n"
FORM = EDIT + "Content-Type: multipart/form-data; boundary=limit\n"


def test_a_body_that_says_it_is_too_large_is_not_read(serve, tmp_path, monkeypatch):
    service = serve(body=100_000)
    kind, body = multipart([("prompt", "x"), ("image", bytes(200_000))])
    received = talk(service, f"{FORM}Content-Length: {len(body)}\n\n", body)
    assert received.startswith(b"HTTP/1.1 413 ") and b"The request has more than 100000 bytes: send smaller" in received
    assert talk(service, f"{FORM}Content-Length: 9000000000000\n\n").startswith(b"HTTP/1.1 413 ")


def test_a_body_that_grows_too_large_is_cut_at_the_byte(serve):
    service = serve(body=100_000)
    _, body = multipart([("prompt", "x"), ("image", bytes(90_000))])
    small = hex(len(body))[2:].encode() + b"\r\n" + body + b"\r\n0\r\n\r\n"
    assert talk(service, f"{FORM}Transfer-Encoding: chunked\n\n", small).startswith(b"HTTP/1.1 400 ")  # no picture
    _, body = multipart([("prompt", "x"), ("image", bytes(200_000))])
    pieces = [body[i : i + 5000] for i in range(0, len(body), 5000)]
    large = b"".join(hex(len(piece))[2:].encode() + b"\r\n" + piece + b"\r\n" for piece in pieces) + b"0\r\n\r\n"
    assert talk(service, f"{FORM}Transfer-Encoding: chunked\n\n", large).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("head", "body", "status", "says"),
    [
        (EDIT + "Content-Type: multipart/form-data\n", b"x", 400, b"The form cannot be read: Missing boundary"),
        (FORM, b"no form at all", 400, b"The form cannot be read: Invalid multipart data."),
        (FORM, b"--limit\r\n\r\nx\r\n--limit--\r\n", 400, b"The form cannot be read: The Content-Disposition header"),
        (FORM, multipart([("prompt", "x" * 300_000)])[1], 400, b"The form cannot be read: Part exceeded maximum size"),
        (FORM, multipart([("a", "x")] * 300)[1], 400, b"The form cannot be read: Too many fields"),
        (FORM, multipart([("image", b"x")] * 30)[1], 400, b"The form cannot be read: Too many files"),
        (FORM, multipart([("keep[a][b]", "1"), ("image", PNG)])[1], 400, b"is too deep: send it as one JSON text."),
        (FORM, multipart([("keep", "1"), ("keep[]", "1"), ("image", PNG)])[1], 400, b"'keep' was sent in two ways"),
        (
            FORM,
            multipart([("prompt", "x"), ("image", "/etc/passwd")])[1],
            400,
            b"send the bytes of a picture as a file",
        ),
        (FORM, multipart([("prompt", "x")])[1], 400, b"There is no image: send one or more files named image."),
        (FORM, multipart([("image", PNG)])[1], 400, b"There is no prompt: say what to make."),
        (FORM, multipart([("prompt", b"x"), ("image", PNG)])[1], 400, b"prompt is "),
        (
            FORM,
            multipart([("keep", b"x"), ("prompt", "x"), ("image", PNG)])[1],
            400,
            b"keep is a file: send it as text.",
        ),
        (FORM, b"", 400, b"There is no image"),
        (
            EDIT + "Content-Type: application/json\n",
            b"{}",
            415,
            b"The body's type is 'application/json': send multipart",
        ),
        (EDIT, b"x", 415, b"The body's type is ''"),
        (EDIT.replace("edits", "generations") + "Content-Type: application/json\n", b"{", 400, b"The body is not JSON"),
        (EDIT.replace("edits", "generations") + "Content-Type: application/json\n", b"[" * 10**5, 400, b"is not JSON"),
        (
            EDIT.replace("edits", "generations") + "Content-Type: application/json\n",
            b"[1]",
            400,
            b"The body is [1]: send",
        ),
        (
            EDIT.replace("edits", "generations") + "Content-Type: application/json\n",
            b'{"prompt": 1}',
            400,
            b"prompt is 1",
        ),
        (
            EDIT.replace("edits", "generations") + "Content-Type: application/json\n",
            b'{"prompt": NaN}',
            400,
            b"not JSON",
        ),
        (EDIT.replace("edits", "generations") + "Content-Type: text/plain\n", b"{}", 415, b"send application/json"),
    ],
    ids=lambda value: repr(value)[-40:],
)
def test_a_body_that_is_none_is_one_sentence(service, head, body, status, says):
    received = talk(service, f"{head}Content-Length: {len(body)}\n\n", body)
    assert received.startswith(f"HTTP/1.1 {status} ".encode())
    assert says in received and b'"type":"invalid_request_error"' in received


@pytest.mark.parametrize("head", ["no http\n\n", "GET /health HTTP/1.1\n\n", "GET /health HTTP/1.1\nA: " + "x" * 10**5])
def test_what_is_no_http_is_said_in_the_same_shape(service, head):
    received = talk(service, head)
    assert (
        received.startswith(b"HTTP/1.1 400 ") and b'{"error": {"message": "Invalid HTTP request received."' in received
    )


# Slow senders ---------------------------------------------------------------------------------------------------------


def test_a_body_that_drips_is_given_up(serve):
    service = serve(upload_seconds=0.5, uploads=1)
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as slow:
        slow.sendall((FORM + "Content-Length: 1000\n\n--lim").replace("\n", "\r\n").encode())
        wait_for(lambda: service.figure("uploads") == 1)
        status, answer = post(service, PNG)  # while the only place for a body is taken
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        received = rest(slow)
    assert received.startswith(b"HTTP/1.1 408 ") and b"The request did not arrive within 0.5 s" in received
    wait_for(lambda: service.figure("uploads") == 0)
    assert post(service, PNG)[0] == 200


def test_a_head_that_drips_is_given_up(serve, monkeypatch):
    monkeypatch.setattr("sparse_context.server.run.HEAD_SECONDS", 0.5)
    service = serve()
    for sent in (b"", b"GET /health HTTP/1.1\r\nHost:", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /he"):
        with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as slow:
            slow.sendall(sent)
            received = rest(slow)
            assert received.startswith(b"HTTP/1.1 200 OK") if b"\r\n\r\n" in sent else received == b""


def test_who_does_not_read_the_answers_is_cut(serve, monkeypatch):
    monkeypatch.setattr("sparse_context.server.run.READ_SECONDS", 0.5)
    service = serve()
    asked = 1000  # far more than the buffers between hold

    def answered():
        return service.figure("requests_total", path="/openapi.json", status="200")

    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", service.port))
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * asked)
        wait_for(lambda: answered() and not service.uvicorn.server_state.connections)
    assert 0 < answered() < asked
    assert service.get("/health")[0] == 200


def test_a_client_that_leaves_in_the_middle_of_a_body_is_forgotten(service):
    left = service.figure("requests_total", path="/v1/images/edits", status="499")
    begun = multipart([("image", bytes(2 * 2**20))])[1]
    for _ in range(3):
        talk(service, FORM + "Content-Length: 3000000\n\n", begun[: 2**20], wait=False)
    wait_for(lambda: service.figure("requests_total", path="/v1/images/edits", status="499") == left + 3)
    assert service.figure("uploads") == 0


# What is left behind --------------------------------------------------------------------------------------------------


def open_files():
    """Deleted or temporary files that the process holds open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # closed meanwhile
            continue
    return sorted(path for path in found if path.startswith(("/tmp", os.environ.get("TMPDIR", "/tmp"))))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not list what a process has open")
def test_no_upload_is_left_behind(service, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # what earlier tests left
    before = open_files()
    large = written(Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)))
    assert len(large) > 2 * 2**20  # so it goes to disk
    assert post(service, large)[0] == 200
    assert post(service, large, keep="9e9")[0] == 400
    assert post(service, large[:-1000])[0] == 400
    kind, body = multipart([("prompt", "x"), ("image", large), ("keep", "1"), ("keep[]", "1")])
    assert service.get("/v1/images/edits", {"Content-Type": kind}, "POST", body)[0] == 400
    talk(service, FORM + f"Content-Length: {10**7}\n\n", body, wait=False)
    wait_for(lambda: service.figure("uploads") == 0 and open_files() == before)
    assert os.listdir(tmp_path) == []
    gc.collect()  # nothing was left for the garbage collector to close, which would warn


def test_what_is_asked_with_a_large_picture_is_what_a_small_one_gets(service):
    """A large reference is decoded again when its turn comes."""
    large = Image.fromarray(pixels(3, 2400, 2400))
    answer = service.client().images.edit(image=written(large), prompt="the cat", extra_body={"seed": 0})
    from sparse_context.pipelines import Request

    expected = service.server.engine(Request("the cat", [large], service.server.settings.config, seed=0)).image
    assert np.array_equal(np.asarray(opened(answer.data[0])), np.asarray(expected))
