"""What the official client sends, in all its forms, and what it reads."""

import asyncio
import io

import numpy as np
import openai
import pytest
from PIL import Image

from server.shared import opened, pixels, png, written
from sparse_context import SparseContextConfig
from sparse_context.pipelines import Request


@pytest.fixture(scope="module")
def client(service):
    return service.client()


def alone(service, references, seed, keep=0.2, **fields):
    """What the engine makes of it without a server, as an array."""
    config = fields.pop("config", SparseContextConfig(keep=keep))
    images = [Image.fromarray(each) for each in references]
    return np.asarray(service.server.engine(Request("the cat", images, config, seed=seed, **fields)).image)


def test_a_picture_is_that_of_the_engine_and_its_tokens_are_counted(service, client):
    answer = client.images.edit(image=[png(0), png(1)], prompt="the cat", extra_body={"seed": 5})
    assert np.array_equal(np.asarray(opened(answer.data[0])), alone(service, [pixels(0), pixels(1)], 5))
    assert (answer.size, answer.output_format, answer.background) == ("64x64", "png", "opaque")
    usage = answer.usage
    assert (usage.input_tokens_details.image_tokens, usage.output_tokens) == (26, 64)
    assert usage.input_tokens == 26 + usage.input_tokens_details.text_tokens == usage.total_tokens - 64
    report = answer.model_extra["sparse_context"]
    assert (report["selection"]["kept"], report["selection"]["total"]) == (26, 128)
    assert [made["seed"] for made in report["pictures"]] == [5]
    assert report["request_id"] == answer._request_id


@pytest.mark.parametrize(
    "image",
    [
        png(),
        io.BytesIO(png()),
        ("../../x.bin", png(), "text/html"),
        [png()],
        ("a.png", written(Image.fromarray(pixels()), "WEBP", lossless=True)),
    ],
    ids=["bytes", "file", "tuple", "list", "another format than its name says"],
)
def test_a_reference_comes_in_every_form(service, client, image):
    answer = client.images.edit(image=image, prompt="the cat", extra_body={"seed": 1})
    assert np.array_equal(np.asarray(opened(answer.data[0])), alone(service, [pixels()], 1))


def test_a_reference_comes_as_a_path(service, client, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    answer = client.images.edit(image=tmp_path / "a.png", prompt="the cat", extra_body={"seed": 1})
    assert np.array_equal(np.asarray(opened(answer.data[0])), alone(service, [pixels()], 1))


def test_without_a_seed_every_answer_is_another_one(client):
    answers = [client.images.edit(image=png(), prompt="the cat") for _ in range(2)]
    seeds = [answer.model_extra["sparse_context"]["pictures"][0]["seed"] for answer in answers]
    assert seeds[0] != seeds[1]
    assert opened(answers[0].data[0]).tobytes() != opened(answers[1].data[0]).tobytes()


def test_several_pictures_have_seeds_that_follow(service, client):
    answer = client.images.edit(image=png(), prompt="the cat", n=3, extra_body={"seed": 7})
    report = answer.model_extra["sparse_context"]["pictures"]
    assert [(made["seed"], made["together"]) for made in report] == [(7, 2), (8, 2), (9, 1)]
    for seed, data in zip((7, 8, 9), answer.data, strict=True):
        difference = np.asarray(opened(data)).astype(int) - alone(service, [pixels()], seed)
        assert np.abs(difference).max() <= 1
    assert answer.usage.output_tokens == 3 * 64


@pytest.mark.parametrize(
    ("extra", "config"),
    [
        ({"keep": 0.5}, {"keep": 0.5}),
        ({"keep": 40}, {"keep": 40}),
        ({"keep": [0.1, 0.5]}, {"keep": [0.1, 0.5]}),
        ({"keep": "[0.1, 0.5]"}, {"keep": [0.1, 0.5]}),
        ({"selector": "edges"}, {"selector": "edges"}),
        ({"selector": {"edges": 0.5, "detail": 1}}, {"selector": {"edges": 0.5, "detail": 1}}),
        ({"selector": '[{"edges": 1, "detail": 1}, null]'}, {"selector": [{"edges": 1, "detail": 1}, None]}),
        ({"selector": ["edges", "detail"]}, {"selector": ["edges", "detail"]}),
        ({"task": "subject"}, {"task": "subject"}),
        ({"task": ["edit", "subject"], "coverage": 0.3}, {"task": ["edit", "subject"], "coverage": 0.3}),
        ({"overview": 4, "overview_layout": "spread"}, {"overview": 4, "overview_layout": "spread"}),
        ({"overview": "none"}, {"overview": None}),
        ({"merge": 0.5, "share": "joint", "floor": 2, "multiple_of": 8}, {"merge": 0.5, "share": "joint", "floor": 2}),
        ({"selector": "random", "selection_seed": 3}, {"selector": "random", "seed": 3}),
    ],
    ids=str,
)
def test_what_to_keep_is_said_by_extra_fields(service, client, extra, config):
    if "multiple_of" in extra:
        config = {**config, "multiple_of": 8}
    answer = client.images.edit(image=[png(0), png(1)], prompt="the cat", extra_body={"seed": 0, **extra})
    config = SparseContextConfig(**{"keep": 0.2, **config})
    assert np.array_equal(np.asarray(opened(answer.data[0])), alone(service, [pixels(0), pixels(1)], 0, config=config))


def test_input_fidelity_is_a_budget(client):
    kept = {}
    for fidelity in ("low", "high"):
        answer = client.images.edit(image=png(), prompt="the cat", input_fidelity=fidelity)
        kept[fidelity] = answer.usage.input_tokens_details.image_tokens
    assert kept == {"low": 13, "high": 32}
    with pytest.raises(openai.BadRequestError, match="keep is 0.1 and input_fidelity 'high': leave one of the two out"):
        client.images.edit(image=png(), prompt="the cat", input_fidelity="high", extra_body={"keep": 0.1})


def test_size_and_steps_are_the_clients(service, client):
    answer = client.images.edit(
        image=png(), prompt="the cat", size="96x32", extra_body={"num_inference_steps": 1, "seed": 0}
    )
    assert answer.size == "96x32" and opened(answer.data[0]).size == (96, 32)
    expected = alone(service, [pixels()], 0, width=96, height=32, steps=1)
    assert np.array_equal(np.asarray(opened(answer.data[0])), expected)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_pictures_come_in_the_format_that_was_asked_for_and_say_nothing_else(client, format):
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    sent = written(Image.fromarray(pixels()), "JPEG", exif=exif, comment=b"a secret", quality=95)
    answer = client.images.edit(image=sent, prompt="the cat", output_format=format, extra_body={"seed": 0})
    picture = opened(answer.data[0])
    assert (picture.format.lower(), answer.output_format) == (format, format)
    assert set(picture.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density", "loop", "background"}
    assert not picture.getexif()


def test_compression_makes_the_file_smaller(client):
    sizes = []
    for compression in (100, 10):
        extra = {"seed": 0}
        answer = client.images.edit(
            image=png(), prompt="the cat", output_format="jpeg", output_compression=compression, extra_body=extra
        )
        sizes.append(len(answer.data[0].b64_json))
    assert sizes[1] < sizes[0] / 2


def test_a_picture_of_a_prompt_alone(service, client):
    answer = client.images.generate(prompt="the cat", n=1, size="64x64", extra_body={"seed": 4})
    assert np.array_equal(np.asarray(opened(answer.data[0])), alone(service, [], 4))
    assert answer.usage.input_tokens_details.image_tokens == 0
    assert answer.model_extra["sparse_context"]["selection"] is None
    events = list(client.images.generate(prompt="the cat", stream=True, extra_body={"seed": 4}))
    assert [event.type for event in events] == ["image_generation.completed"]


def test_pictures_on_the_way_are_streamed(service, client):
    extra = {"seed": 2, "num_inference_steps": 6}
    events = list(client.images.edit(image=png(), prompt="the cat", stream=True, partial_images=2, extra_body=extra))
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    last = events[-1]
    expected = alone(service, [pixels()], 2, steps=6)
    assert np.array_equal(np.asarray(opened(last)), expected)
    assert last.usage.input_tokens_details.image_tokens == 13
    assert last.model_extra["sparse_context"]["selection"]["kept"] == 13
    differences = [np.abs(np.asarray(opened(event)).astype(int) - expected).mean() for event in events[:2]]
    assert differences[0] > differences[1] > 0
    assert {event.size for event in events} == {"64x64"}


def test_a_stream_that_fails_ends_in_an_error_event(client):
    with pytest.raises(openai.APIError, match="found neither a mask nor an alpha channel") as caught:
        list(client.images.edit(image=png(), prompt="the cat", stream=True, extra_body={"selector": "mask"}))
    assert caught.value.code == "invalid_value"


def test_the_asynchronous_client_asks_for_several_at_a_time(service):
    async def ask():
        async with service.client(openai.AsyncOpenAI) as client:
            answers = [client.images.edit(image=png(i), prompt="the cat", extra_body={"seed": i}) for i in range(3)]
            whole = await asyncio.gather(*answers)
            stream = await client.images.edit(image=png(), prompt="the cat", stream=True, extra_body={"seed": 0})
            return whole, [event async for event in stream]

    whole, events = asyncio.run(ask())
    for i, answer in enumerate(whole):
        assert np.array_equal(np.asarray(opened(answer.data[0])), alone(service, [pixels(i)], i))
    assert events[-1].b64_json == whole[0].data[0].b64_json


def test_a_mask_of_what_to_keep(client):
    corner = np.zeros((64, 64), np.uint8)
    corner[32:, 32:] = 255
    mask = written(Image.fromarray(corner))
    extra = {"keep": 0.25, "seed": 0, "coverage": 0}

    def kept(selector):
        # The client passes files of its own fields alone; what else there is goes by a plain form
        more = {} if selector is None else {"selector": selector}
        answer = client.post(
            "/images/edits",
            cast_to=object,
            body={"prompt": "the cat", **extra, **more},
            files=[("image", ("a.png", png())), ("reference_masks", ("m.png", mask))],
            options={"headers": {"Content-Type": "multipart/form-data"}},
        )
        return answer["sparse_context"]["selection"]["references"][0]

    assert (kept(None)["kept"], kept(None)["selector"]) == (16, "mask")
    assert kept({"mask": 1, "edges": 1})["selector"] == "0.5 mask + 0.5 edges"
    with pytest.raises(openai.BadRequestError, match="selector is 'edges', which does not use them: name mask there"):
        kept("edges")


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-image-1': this server has 'tiny'") as caught:
        client.images.edit(image=png(), prompt="the cat", model="gpt-image-1")
    assert caught.value.code == "model_not_found"
    assert client.images.edit(image=png(), prompt="the cat", model="tiny").data


@pytest.mark.parametrize("quality", ["low", "medium", "high", "xhigh", "max", "auto", "standard"])
def test_quality_and_the_users_name_change_nothing(service, client, quality):
    answer = client.images.edit(image=png(), prompt="the cat", quality=quality, user="u", extra_body={"seed": 1})
    assert np.array_equal(np.asarray(opened(answer.data[0])), alone(service, [pixels()], 1))


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": ""}, "prompt", "prompt has 0 characters: pass 1 to 32000 of them."),
        ({"prompt": "x" * 32_001}, "prompt", "prompt has 32001 characters: pass 1 to 32000 of them."),
        ({"n": 11}, "n", "n is 11: pass a whole number from 1 to 10."),
        ({"n": 0}, "n", "n is 0: pass a whole number from 1 to 10."),
        ({"n": 2, "stream": True}, "n", "stream is true and n is 2: pictures are streamed one at a time."),
        ({"partial_images": 1}, "partial_images", "partial_images needs stream: pass stream=true."),
        ({"size": "64"}, "size", "size is '64': pass WIDTHxHEIGHT in pixels, or auto."),
        ({"size": "60x64"}, "size", "width is 60: this model needs a multiple of 8, such as 64."),
        ({"size": "9999x9999"}, "size", "size is 9999x9999: pass 4194304 pixels at most."),
        ({"output_format": "gif"}, "output_format", "output_format is 'gif': choose one of png, jpeg, webp."),
        ({"output_compression": 50}, "output_compression", "output_compression is for jpeg and webp: name one as"),
        ({"background": "transparent"}, "background", "background is 'transparent', but the model paints opaque pict"),
        ({"response_format": "url"}, "response_format", "response_format is 'url', but this server keeps no pictures"),
        ({"frame_count": 3}, "frame_count", "frame_count is not taken: leave it out."),
        ({"markup": png()}, "markup", "markup is not taken: leave it out."),
        ({"mask": png()}, "mask", "Flux2KleinPipeline does not paint into an image: leave mask out, or use one of"),
        ({"image": [png()] * 4}, "image", "There are 4 images, and at most 3 are taken: send fewer."),
        ({"extra_body": {"url": "http://169.254.169.254/"}}, "url", "url is not taken: this server fetches nothing"),
        ({"extra_body": {"url": ["file:///etc/passwd"]}}, "url", "url is not taken: this server fetches nothing"),
        ({"extra_body": {"image": "/etc/passwd"}}, "image", "image is '/etc/passwd': send the bytes of a picture as a"),
        ({"extra_body": {"kep": 0.2}}, "kep", "There is no field 'kep': did you mean keep?"),
        ({"extra_body": {"keep": 1.5}}, "keep", "keep is 1.5: pass a ratio above 0 and up to 1, a count of at least 2"),
        ({"extra_body": {"keep": [0.1, 0.2]}}, "keep", "keep has 2 values for 1 references: pass one value, or one"),
        ({"extra_body": {"selector": "edgs"}}, "selector", "There is no selector 'edgs': choose one of"),
        ({"extra_body": {"selector": {"edges": -1}}}, None, "The weight of 'edges' in the blend is -1: pass a number"),
        ({"extra_body": {"task": "paint"}}, "task", "task is 'paint': choose one of auto, edit, global, subject."),
        ({"extra_body": {"coverage": 2}}, "coverage", "coverage is 2: pass a share from 0 to 1."),
        ({"extra_body": {"seed": -1}}, "seed", f"seed is -1: pass a whole number from 0 to {2**63 - 1}."),
        ({"extra_body": {"seed": "a"}}, "seed", "seed is 'a': pass a whole number from 0 to"),
        ({"extra_body": {"num_inference_steps": 101}}, "num_inference_steps", "num_inference_steps is 101: pass a who"),
        (
            {"extra_body": {"guidance_scale": 2}},
            "guidance_scale",
            "guidance_scale is 2, but this distilled model takes",
        ),
        ({"extra_body": {"negative_prompt": "x"}}, "negative_prompt", "negative_prompt is 'x', but this distilled mod"),
        ({"extra_body": {"true_cfg_scale": 2}}, "true_cfg_scale", "true_cfg_scale is not taken: its name is guidance_"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_said_in_a_sentence_that_names_the_field(client, fields, param, says):
    with pytest.raises(openai.BadRequestError) as caught:
        answer = client.images.edit(**{"image": png(), "prompt": "the cat", **fields})
        list(answer)
    assert caught.value.body["message"].startswith(says)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert set(caught.value.body) == {"message", "type", "param", "code"}
