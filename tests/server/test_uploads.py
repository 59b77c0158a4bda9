"""Files of a request on their way to the engine, without a server."""

import io

import numpy as np
import pytest
from PIL import Image
from starlette.datastructures import UploadFile

from server.shared import pixels, png, written
from sparse_context import SparseContextConfig
from sparse_context.pipelines import Request
from sparse_context.server.errors import ApiError
from sparse_context.server.settings import Settings
from sparse_context.server.uploads import take_uploads

HALF = np.zeros((64, 64), np.uint8)
HALF[:, 32:] = 255


def taken(**files):
    values = {
        name: [UploadFile(io.BytesIO(each)) for each in data]
        if isinstance(data, list)
        else UploadFile(io.BytesIO(data))
        for name, data in files.items()
    }
    return take_uploads(values, Settings(name="tiny"), None)


MASKS = {
    "transparent": Image.fromarray(np.dstack([pixels(), 255 - HALF])),
    "white": Image.fromarray(HALF),
    "white in colours": Image.fromarray(HALF).convert("RGB"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_says_where_to_paint_by_what_is_transparent_or_else_white(kind):
    uploads = taken(image=png(), mask=written(MASKS[kind]))
    uploads.check()
    request = uploads.add_to(Request("the cat"))
    assert request.inpaint.mode == "L" and np.array_equal(np.asarray(request.inpaint), HALF)
    assert np.array_equal(np.asarray(request.references[0].convert("RGB")), pixels())


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(
        ApiError, match="The mask is 64x64, but the first image is 96x64: send one of its size."
    ) as caught:
        taken(image=[png(0, 96, 64), png()], mask=written(MASKS["white"])).check()
    assert (caught.value.status, caught.value.param) == (400, "mask")


def test_masks_of_what_to_keep_need_one_for_each_image():
    with pytest.raises(ApiError, match="There are 1 reference_masks for 2 images: send one for each."):
        taken(image=[png(0), png(1)], reference_masks=written(MASKS["white"]))


def test_the_digest_tells_what_a_file_is_for():
    mask = written(MASKS["white"])
    digests = {
        taken(image=mask).digest(),
        taken(image=mask, mask=mask).digest(),
        taken(image=mask, reference_masks=mask).digest(),
        taken(image=[mask, mask]).digest(),
    }
    assert len(digests) == 4 and taken(image=mask).digest() in digests


def test_large_pictures_are_decoded_again_and_files_are_closed_at_the_end(monkeypatch):
    monkeypatch.setattr("sparse_context.server.uploads.HELD", 64 * 64 - 1)
    uploads = taken(image=png())
    uploads.check()
    config = SparseContextConfig(keep=0.5)
    first, second = (uploads.add_to(Request("the cat", config=config)).references[0] for _ in range(2))
    assert first is not second and first.tobytes() == second.tobytes()
    uploads.close()
    assert uploads.images[0].file.closed
