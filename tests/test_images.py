import errno
import json
import os
import resource
import shutil
import struct
import tempfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, features

from sparse_context.images import (
    MAX_BYTES,
    READ_FORMATS,
    PictureError,
    check_output,
    open_mask,
    open_picture,
    picture_size,
    save_picture,
    save_text,
)

RAMP16 = np.linspace(0, 65535, 64 * 8).astype(np.uint16).reshape(8, 64)
RAMP8 = (RAMP16 >> 8).astype(np.uint8)


def noise(width=40, height=30, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, extra=b""):
    """A PNG from its bytes, for the kinds that Pillow does not write; `rows` are the bytes of each row."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + chunk(b"IEND", b"")


def sentence(path, call=open_picture, *arguments):
    """The message of the error, which must name the file and be one line."""
    with pytest.raises(PictureError) as caught:
        call(path, *arguments)
    message = str(caught.value)
    assert os.path.basename(os.fspath(path)) in message
    assert "\n" not in message
    return message


# Reading: kinds of pixels


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_rgb_is_read_exactly(tmp_path, format):
    Image.fromarray(noise()).save(tmp_path / "a", format=format, **({"lossless": True} if format == "WEBP" else {}))
    picture = open_picture(tmp_path / "a")
    assert picture.mode == "RGB" and picture.info == {}
    assert np.array_equal(np.asarray(picture), noise())


@pytest.mark.parametrize("format", ["JPEG", "AVIF"])
def test_lossy_formats_are_read(tmp_path, format):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF")
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "a", format=format, quality=95)
    picture = open_picture(tmp_path / "a")
    assert (picture.mode, picture.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(picture).astype(int) - (200, 100, 50)).max() <= 3


def test_a_phone_jpeg_with_a_second_picture_gives_the_first(tmp_path):
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert open_picture(tmp_path / "a.jpg").getpixel((8, 8))[0] > 250


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_grey_keeps_its_ramp(tmp_path, name):
    Image.fromarray(RAMP16).save(tmp_path / name)
    picture = np.asarray(open_picture(tmp_path / name))
    assert picture.shape == (8, 64, 3)
    assert np.array_equal(picture[..., 0], RAMP8)


def test_dark_16_bit_grey_is_not_taken_for_8_bit(tmp_path):
    for name in ("a.png", "a.pgm", "a.tif"):
        Image.fromarray(np.full((4, 4), 255, np.uint16)).save(tmp_path / name)
        assert open_picture(tmp_path / name).getextrema() == ((0, 0),) * 3


def test_16_bit_rgb_and_rgba_png(tmp_path):
    values = np.stack([RAMP16, RAMP16[::-1], RAMP16[:, ::-1]], -1)
    (tmp_path / "rgb.png").write_bytes(png(64, 8, 16, 2, [row.astype(">u2").tobytes() for row in values]))
    assert np.array_equal(np.asarray(open_picture(tmp_path / "rgb.png")), values >> 8)

    values = np.dstack([values, RAMP16])
    (tmp_path / "rgba.png").write_bytes(png(64, 8, 16, 6, [row.astype(">u2").tobytes() for row in values]))
    picture = open_picture(tmp_path / "rgba.png")
    assert picture.mode == "RGBA"
    assert np.array_equal(np.asarray(picture), values >> 8)


def test_32_bit_integers_by_the_range_they_use(tmp_path):
    def grey(values):
        Image.fromarray(values.astype(np.int32)).save(tmp_path / "a.tif")
        return np.asarray(open_picture(tmp_path / "a.tif"))[..., 0]

    assert np.array_equal(grey(RAMP8), RAMP8)
    assert np.array_equal(grey(RAMP16), RAMP8)
    stretched = grey(RAMP16.astype(np.int64) * 30_000 - 500_000)
    assert stretched[0, 0] == 0 and stretched[-1, -1] == 255
    assert np.array_equal(np.sort(stretched, axis=None), stretched.ravel())


def test_floats_by_the_range_they_use(tmp_path):
    def grey(values):
        Image.fromarray(values.astype(np.float32)).save(tmp_path / "a.tif")
        return np.asarray(open_picture(tmp_path / "a.tif"))[..., 0]

    assert np.array_equal(grey(RAMP8 / 255), RAMP8)
    assert np.array_equal(grey(RAMP8), RAMP8)
    stretched = grey(RAMP16 / 65535 * 7 - 3)
    assert stretched[0, 0] == 0 and stretched[-1, -1] == 255
    assert grey(np.array([[np.nan, 1.0], [np.inf, 0.0]])).tolist() == [[0, 255], [0, 0]]
    assert grey(np.full((2, 2), -4.0)).tolist() == [[0, 0], [0, 0]]


def test_cmyk_palette_grey_and_bilevel(tmp_path):
    red = Image.new("RGB", (16, 16), "red")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(np.asarray(open_picture(tmp_path / "cmyk.jpg")).astype(int) - (255, 0, 0)).max() <= 3
    red.convert("CMYK").save(tmp_path / "cmyk.tif")
    red.convert("P").save(tmp_path / "palette.png")
    red.save(tmp_path / "palette.gif")
    for name in ("cmyk.tif", "palette.png", "palette.gif"):
        picture = open_picture(tmp_path / name)
        assert picture.mode == "RGB" and picture.getcolors() == [(256, (255, 0, 0))]

    Image.fromarray(noise(channels=1)).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(open_picture(tmp_path / "grey.png"))[..., 2], noise(channels=1))
    bits = noise(channels=1) > 127
    Image.fromarray(bits).save(tmp_path / "bilevel.png")
    assert np.array_equal(np.asarray(open_picture(tmp_path / "bilevel.png"))[..., 0], bits * 255)


# Reading: transparency


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_rgba_keeps_colours_and_alpha(tmp_path, name):
    values = noise(channels=4)
    Image.fromarray(values).save(tmp_path / name, **({"lossless": True, "exact": True} if name == "a.webp" else {}))
    picture = open_picture(tmp_path / name)
    assert picture.mode == "RGBA"
    assert np.array_equal(np.asarray(picture), values)


def test_grey_with_alpha(tmp_path):
    values = noise(channels=4)[..., :2]
    Image.merge("LA", [Image.fromarray(values[..., band]) for band in (0, 1)]).save(tmp_path / "a.png")
    picture = np.asarray(open_picture(tmp_path / "a.png"))
    assert np.array_equal(picture, values[..., [0, 0, 0, 1]])


def test_opaque_alpha_is_no_transparency(tmp_path):
    Image.fromarray(noise()).convert("RGBA").save(tmp_path / "a.png")
    picture = open_picture(tmp_path / "a.png")
    assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), noise())


def test_palette_transparency(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putdata([0, 1])
    palette.save(tmp_path / "bytes.png", transparency=bytes([255, 64]))
    assert np.asarray(open_picture(tmp_path / "bytes.png")).tolist() == [[[255, 0, 0, 255], [0, 255, 0, 64]]]
    palette.save(tmp_path / "index.gif", transparency=1)
    assert np.asarray(open_picture(tmp_path / "index.gif"))[..., 3].tolist() == [[255, 0]]


def test_one_transparent_colour(tmp_path):
    colours = Image.new("RGB", (2, 1), (1, 2, 3))
    colours.putpixel((1, 0), (4, 5, 6))
    colours.save(tmp_path / "rgb.png", transparency=(4, 5, 6))
    assert np.asarray(open_picture(tmp_path / "rgb.png")).tolist() == [[[1, 2, 3, 255], [4, 5, 6, 0]]]

    row = struct.pack(">2H", 1000, 2000)
    (tmp_path / "grey16.png").write_bytes(png(2, 1, 16, 0, [row], chunk(b"tRNS", struct.pack(">H", 1000))))
    assert np.asarray(open_picture(tmp_path / "grey16.png")).tolist() == [[[3, 3, 3, 0], [7, 7, 7, 255]]]

    row = struct.pack(">6H", 1000, 2000, 3000, 40000, 50000, 60000)
    extra = chunk(b"tRNS", struct.pack(">3H", 40000, 50000, 60000))
    (tmp_path / "rgb16.png").write_bytes(png(2, 1, 16, 2, [row], extra))
    assert np.asarray(open_picture(tmp_path / "rgb16.png"))[..., 3].tolist() == [[255, 0]]


# Reading: frames, orientation, profiles, names, shapes


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(tmp_path, format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(tmp_path / "a", format=format, save_all=True, append_images=frames[1:], **options)
    assert open_picture(tmp_path / "a").getcolors() == [(256, (255, 0, 0))]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_colours_and_alpha(tmp_path, name, orientation):
    upright = noise(6, 4, 4)
    # What a camera stores so that the viewer, following the orientation tag, sees `upright`.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if name == "a.webp" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=exif, **options)
    picture = open_picture(tmp_path / name)
    assert picture.size == (6, 4) == picture_size(tmp_path / name)
    assert np.array_equal(np.asarray(picture), upright)


def test_damaged_exif_leaves_the_pixels(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.png")), noise())
    assert picture_size(tmp_path / "a.png") == open_picture(tmp_path / "a.png").size


def test_a_colour_profile_is_converted_to_srgb(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # The same profile with red and green exchanged, under another name: pure red in it is green in sRGB.
    exchanged = srgb.replace(b"rXYZ", b"xXYZ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"xXYZ", b"gXYZ", 1)
    exchanged = exchanged.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 77))
    for profile, expected in [(srgb, (255, 0, 0, 77)), (lab, (255, 0, 0, 77)), (b"nonsense", (255, 0, 0, 77))]:
        red.save(tmp_path / "a.png", icc_profile=profile)
        assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == expected
    red.save(tmp_path / "a.png", icc_profile=exchanged)
    picture = open_picture(tmp_path / "a.png")
    r, g, b, alpha = picture.getpixel((0, 0))
    assert r <= 1 and g >= 254 and b <= 1 and alpha == 77
    assert picture.info == {}


@pytest.mark.parametrize("name", ["with spaces.png", "Ünïcødé 写真 🐈.png", "'quoted'.png", "no suffix", "-m.png"])
def test_any_name(tmp_path, name):
    save_picture(Image.fromarray(noise()), tmp_path / "a.png")
    shutil.move(tmp_path / "a.png", tmp_path / name)
    assert np.array_equal(np.asarray(open_picture(str(tmp_path / name))), noise())


def test_messages_show_unicode_names_as_they_are_and_stay_on_one_line(tmp_path):
    assert "写真 ü.png" in sentence(tmp_path / "写真 ü.png")
    with pytest.raises(PictureError, match=r"two\\nlines\.png' does not exist"):
        open_picture(tmp_path / "two\nlines.png")


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 3000)])
def test_odd_shapes(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").size == size


# Reading: what cannot be read


def test_what_is_not_there_or_not_a_file(tmp_path):
    assert "does not exist" in sentence(tmp_path / "missing.png")
    assert "does not exist" in sentence("missing folder/a.png")
    assert "is a folder" in sentence(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a plain file" in sentence(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    assert "is empty" in sentence(tmp_path / "empty.png")
    with pytest.raises(PictureError, match="null byte"):
        open_picture("a\0.png")
    with pytest.raises(PictureError, match="'' does not exist"):
        open_picture("")


@pytest.fixture
def as_a_plain_user():
    """A folder that belongs to nobody in particular, seen by a user without root's rights."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        if root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_permissions(as_a_plain_user):
    folder = as_a_plain_user
    save_picture(Image.fromarray(noise()), folder / "a.png")
    (folder / "a.png").chmod(0)
    assert "may not be read" in sentence(folder / "a.png")
    (folder / "a.png").chmod(0o444)
    assert "Permission denied" in sentence(folder / "a.png", check_output)
    folder.chmod(0o555)
    assert "Permission denied" in sentence(folder / "b.png", check_output)
    with pytest.raises(PictureError, match="Permission denied"):
        save_picture(Image.fromarray(noise()), folder / "b.png")
    assert os.listdir(folder) == ["a.png"]


def encoded(tmp_path, format):
    path = tmp_path / f"whole.{format.lower()}"
    Image.fromarray(noise()).save(path, format=format)
    return path.read_bytes()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated(tmp_path, format):
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    whole = encoded(tmp_path, format)
    path = tmp_path / "cut.png"
    for length in (1, 5, 20, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:length])
        assert "damaged" in sentence(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_corrupt(tmp_path):
    whole = bytearray(encoded(tmp_path, "PNG"))
    whole[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    (tmp_path / "a.png").write_bytes(whole)
    assert "damaged or cut short" in sentence(tmp_path / "a.png")


def test_a_corrupt_tiff_says_nothing_but_the_sentence(tmp_path, capfd):
    Image.fromarray(noise()).save(tmp_path / "a.tif", compression="tiff_lzw")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[100:1000] = b"\xff" * 900
    (tmp_path / "a.tif").write_bytes(data)
    assert "damaged or cut short" in sentence(tmp_path / "a.tif")
    assert capfd.readouterr() == ("", "")
    os.write(2, b"restored")
    assert capfd.readouterr().err == "restored"


@pytest.mark.parametrize("format", READ_FORMATS)
def test_flipped_bytes_give_a_picture_or_a_sentence(tmp_path, format):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF")
    whole = encoded(tmp_path, format)
    generator = np.random.default_rng(1)
    path = tmp_path / "flipped"
    for count in (1, 2, 8) * 30:
        data = np.frombuffer(whole, np.uint8).copy()
        # Half of them in the first bytes, where the structure is.
        where = generator.integers(0, generator.choice([min(80, len(data)), len(data)]), count)
        data[where] = generator.integers(0, 256, count)
        path.write_bytes(data)
        try:
            assert open_picture(path).mode in ("RGB", "RGBA")
        except PictureError as error:
            assert "flipped" in str(error)


@pytest.mark.parametrize(
    "data",
    [
        b"hello, this is text",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\0" * 100,
    ],
)
def test_not_a_picture(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    assert "not a picture that can be read" in sentence(tmp_path / "a.png")


@pytest.mark.parametrize("format", ["ICO", "TGA", "PCX", "SGI", "JPEG2000"])
def test_formats_off_the_list_are_not_opened(tmp_path, format):
    if format == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this Pillow is built without JPEG 2000")
    Image.fromarray(noise()).save(tmp_path / "a.png", format=format)
    assert "not a picture that can be read" in sentence(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 9_000), (2**31 - 1, 1)])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png(*size, 8, 2, [b"\0" * 3]))
    message = sentence(tmp_path / "bomb.png")
    assert "too large" in message and "100 megapixels" in message


def test_too_many_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(tmp_path, "PNG"))
    os.truncate(tmp_path / "a.png", MAX_BYTES + 1)  # a sparse file: no space is taken
    assert "too large (1024 MiB)" in sentence(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_zero_size(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png(*size, 8, 2, []))
    sentence(tmp_path / "a.png")
    (tmp_path / "a.ppm").write_bytes(b"P6 %d %d 255\n" % size)
    sentence(tmp_path / "a.ppm")


def test_threads_read_alike(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(open_picture(tmp_path / "a.png"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8 and all(np.array_equal(np.asarray(picture), noise()) for picture in seen)


# Masks


def test_a_mask_is_its_alpha_or_its_luminance(tmp_path):
    values = noise(channels=4)
    Image.fromarray(values).save(tmp_path / "alpha.png")
    mask = open_mask(tmp_path / "alpha.png", (40, 30))
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), values[..., 3])

    Image.fromarray(values[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(open_mask(tmp_path / "grey.png", (40, 30))), values[..., 0])
    # Black and white painted in an editor that saves an opaque alpha channel: the paint is the mask.
    Image.fromarray(values[..., 0]).convert("RGBA").save(tmp_path / "painted.png")
    assert np.array_equal(np.asarray(open_mask(tmp_path / "painted.png", (40, 30))), values[..., 0])
    Image.fromarray(RAMP16).save(tmp_path / "grey16.png")
    assert np.array_equal(np.asarray(open_mask(tmp_path / "grey16.png", (64, 8))), RAMP8)


def test_a_mask_of_another_size(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "mask.png")
    message = sentence(tmp_path / "mask.png", open_mask, (30, 40))
    assert "40x30" in message and "30x40" in message
    assert "does not exist" in sentence(tmp_path / "none.png", open_mask, (30, 40))


# Writing


def test_check_output_accepts_and_leaves_nothing(tmp_path):
    for name in ("a.png", "b.JPG", "c.jpeg", "d.webp", "写真 1.png"):
        check_output(tmp_path / name)
    assert os.listdir(tmp_path) == []
    (tmp_path / "old.png").write_bytes(b"old")
    check_output(tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_check_output_refuses(tmp_path):
    assert "the folder" in sentence(tmp_path / "none" / "a.png", check_output)
    (tmp_path / "file").touch()
    assert "does not exist" in sentence(tmp_path / "file" / "a.png", check_output)
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in sentence(tmp_path / "folder.png", check_output)
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a plain file" in sentence(tmp_path / "pipe.png", check_output)
    for name in ("a", "a.gif", "a.tiff", "a.png.txt", ".png"):
        assert ".png, .jpg, .jpeg, .webp" in sentence(tmp_path / name, check_output)
        with pytest.raises(PictureError, match="picture format"):
            save_picture(Image.new("RGB", (2, 2)), tmp_path / name)
    with pytest.raises(PictureError):
        check_output("a\0.png")
    with pytest.raises(PictureError):
        check_output("")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_png_round_trip(tmp_path, mode):
    image = Image.fromarray(noise(channels=4)).convert(mode)
    save_picture(image, tmp_path / "a.PNG")
    with Image.open(tmp_path / "a.PNG") as saved:
        assert saved.mode == mode
    expected = image if mode == "RGBA" else image.convert("RGB")
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.PNG")), np.asarray(expected))
    assert os.listdir(tmp_path) == ["a.PNG"]


@pytest.mark.parametrize("name, format", [("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")])
def test_the_suffix_chooses_the_format(tmp_path, name, format):
    save_picture(Image.new("RGB", (16, 16), (200, 100, 50)), tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.format == format
    assert np.abs(np.asarray(open_picture(tmp_path / name)).astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("mode", ["1", "P", "LA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_every_mode_is_written(tmp_path, mode, name):
    image = Image.new(mode, (16, 16))
    save_picture(image, tmp_path / name)
    assert open_picture(tmp_path / name).size == (16, 16)


def test_jpeg_lays_transparency_on_white(tmp_path):
    image = Image.new("RGBA", (32, 16), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (16, 0, 32, 16))
    save_picture(image, tmp_path / "a.jpg")
    picture = open_picture(tmp_path / "a.jpg")
    assert picture.getpixel((4, 8))[1] < 5 and picture.getpixel((28, 8)) == (255, 255, 255)


def test_too_long_for_the_format(tmp_path):
    for name, width in (("a.jpg", 65_501), ("a.webp", 16_384)):
        image = Image.new("L", (width, 1))
        assert ".png" in sentence(tmp_path / name, lambda path, image=image: save_picture(image, path))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_no_half_file_and_the_older_one(tmp_path, monkeypatch):
    (tmp_path / "old.png").write_bytes(b"old")

    def full(self, file, **options):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    for name in ("old.png", "new.png"):
        with pytest.raises(PictureError, match=f"{name}.*No space left on device.*free some space"):
            save_picture(Image.new("RGB", (8, 8)), tmp_path / name)
    assert os.listdir(tmp_path) == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_an_interrupt_leaves_no_half_file_and_the_older_one(tmp_path, monkeypatch):
    (tmp_path / "old.png").write_bytes(b"old")

    def interrupted(self, file, **options):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "old.png")
    assert os.listdir(tmp_path) == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_a_real_limit_on_the_file_leaves_no_half_file(tmp_path):
    (tmp_path / "old.png").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    image = Image.fromarray(noise(400, 300))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(PictureError, match="File too large"):
            save_picture(image, tmp_path / "old.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_permissions_follow_the_umask_and_the_older_file(tmp_path):
    image = Image.new("RGB", (2, 2))
    previous = os.umask(0o027)
    try:
        save_picture(image, tmp_path / "new.png")
        (tmp_path / "private.png").touch(mode=0o600)
        save_picture(image, tmp_path / "private.png")
    finally:
        os.umask(previous)
    assert (tmp_path / "new.png").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "private.png").stat().st_mode & 0o777 == 0o600


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "there" / "real.png")
    check_output(tmp_path / "link.png")
    save_picture(Image.new("RGB", (2, 2)), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert os.listdir(tmp_path / "there") == ["real.png"]


def test_text_is_written_whole(tmp_path):
    path = tmp_path / "a.json"
    save_text(json.dumps({"name": "写真", "bytes": "\udcff"}, ensure_ascii=False), path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "写真", "bytes": "\udcff"}
    assert os.listdir(tmp_path) == ["a.json"]
    assert "could not be written" in sentence(tmp_path / "none" / "a.json", lambda path: save_text("x", path))
