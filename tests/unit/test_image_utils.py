"""Tests of image utils."""

import io
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.conftest import ROOT
from tests.faults.corpus import OPENS, PLACES, contents, write_corpus
from utils.image_utils import (
    FORMATS,
    ImageError,
    count_image_tokens,
    fit_image,
    is_image_start,
    open_image,
    read_image_size,
)

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> dict:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": f"lily.{kind.lower()}"}


def gradient(mode: str = "RGB") -> Image.Image:
    ramp = np.linspace(0, 255, 40 * 30 * 3).reshape(40, 30, 3).astype(np.uint8)
    return Image.fromarray(ramp).convert(mode)


@pytest.mark.parametrize(("side", "expected"), [(336, (336, 336)), (None, (30, 40))])
def test_fit_is_the_whole_image_as_a_square_or_its_own_size(side, expected):
    assert fit_image(gradient(), side).size == expected


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_opens(kind):
    image = open_image(encoded(gradient(), kind))
    assert image.mode == "RGB" and image.size == (30, 40) and read_image_size(encoded(gradient(), kind)) == (40, 30)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    image = gradient("L").convert("I;16") if mode == "I;16" else gradient("RGB").convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "LAB", "F", "I") else "PNG"
    # Pillow 12.3 cannot read its own uncompressed YCbCr.
    options = {"compression": "tiff_lzw"} if mode == "YCbCr" else {}
    assert open_image(encoded(image, kind, **options)).mode == "RGB"


def test_sixteen_bits_are_rescaled_and_not_clipped():
    ramp = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    assert np.asarray(open_image(encoded(Image.fromarray(ramp))))[0, :, 0].tolist() == [0, 100, 255]


def test_a_floating_point_image_is_stretched():
    values = np.array([[-2.0, 0.0, 2.0]], dtype=np.float32)
    assert np.asarray(open_image(encoded(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


def test_alpha_lies_on_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 255])
    assert open_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.new("RGB", (30, 40), "white")
    stored.paste("black", (0, 0, 8, 8))  # the first stored corner; EXIF says which corner of the upright image that is
    source = encoded(stored, file_format, exif=exif, quality=95)
    upright = open_image(source)
    assert read_image_size(source) == (upright.height, upright.width) == ((30, 40) if orientation >= 5 else (40, 30))
    right, low = upright.width - 4, upright.height - 4
    corners = {
        1: (4, 4),
        2: (right, 4),
        3: (right, low),
        4: (4, low),
        5: (4, 4),
        6: (right, 4),
        7: (right, low),
        8: (4, low),
    }
    assert upright.getpixel(corners[orientation])[0] < 60


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    source = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(source).getpixel((0, 0)) == (255, 0, 0)


def test_paths_open_too(tmp_path):
    gradient().save(tmp_path / "a b\n☘.png")
    assert open_image(tmp_path / "a b\n☘.png").size == (30, 40)
    assert open_image({"bytes": None, "path": str(tmp_path / "a b\n☘.png")}).size == (30, 40)


def bomb() -> bytes:
    return encoded(Image.new("1", (9000, 9000)))["bytes"]


BROKEN = [
    (b"", "lily.jpg: is empty (0 bytes)"),
    (b"<html>not found</html>", "lily.jpg: is not an image in any of the formats JPEG, PNG"),
    (
        b"version https://git-lfs.github.com/spec/v1",
        "lily.jpg: is a pointer of Git LFS, not the image; fetch it with git lfs pull",
    ),
    (encoded(gradient(), "JPEG")["bytes"][:300], "lily.jpg: "),
    (encoded(gradient())["bytes"][:-60], "lily.jpg: cannot be decoded"),
    (bomb(), "lily.jpg: 9000 x 9000 is above the limit of 64,000,000 pixels"),
    (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "lily.jpg: "),
]


@pytest.mark.parametrize(("contents", "words"), BROKEN, ids=range(len(BROKEN)))
def test_a_corrupted_image_is_an_error_with_file_and_reason(contents, words):
    with pytest.raises(ImageError) as raised:
        open_image({"bytes": contents, "path": "lily.jpg"})
    assert str(raised.value).startswith(words) and "\n" not in str(raised.value)


def test_a_missing_image(tmp_path):
    with pytest.raises(ImageError, match=r"gone.jpg: cannot be read \(No such file"):
        open_image(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="image without a name: cannot be read"):
        open_image({"bytes": None, "path": None})


def test_the_limit_holds_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr("utils.image_utils.MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match="30 x 40 is above the limit of 1,000 pixels"):
        read_image_size(encoded(gradient()))


# ---- images as they come, and as nobody should have made them


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return folder, write_corpus(folder)


@pytest.mark.parametrize("name", [*contents(), *PLACES])
def test_hostile_images_are_read_or_are_an_error_in_one_sentence(name, corpus):
    folder, expected = corpus
    if expected[name] == OPENS:
        image = open_image(folder / name)
        assert image.mode == "RGB" and read_image_size(folder / name) == (image.height, image.width)
        assert np.asarray(fit_image(image, 84)).shape == (84, 84, 3)
    else:
        with pytest.raises(ImageError) as raised:
            open_image(folder / name)
        assert expected[name] in str(raised.value) and str(raised.value).isprintable()


def test_an_image_of_the_largest_numbers_is_still_stretched():
    values = np.array([[-3e38, 0.0, 3e38]], dtype=np.float32)
    assert np.asarray(open_image(encoded(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


LARGEST = """
import io
from PIL import Image
from utils.image_utils import MAX_PIXELS, open_image
side = int(MAX_PIXELS**0.5)
for kind, mode in (("JPEG", "CMYK"), ("PNG", "I;16"), ("PNG", "RGBA"), ("TIFF", "F")):
    file = io.BytesIO()
    options = {"TIFF": {"compression": "tiff_deflate"}, "PNG": {"compress_level": 1}}.get(kind, {})
    Image.new(mode, (side, side)).save(file, kind, **options)
    open_image({"bytes": file.getvalue(), "path": None})
# Not ru_maxrss: a process takes that over from the one that started it.
print(next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not report a process's peak")
def test_the_largest_images_take_bounded_memory():
    found = subprocess.run([sys.executable, "-c", LARGEST], cwd=ROOT, capture_output=True, text=True)
    assert float(found.stdout) < 1200, found  # MB of the whole process, with each of them


# ---- anyres geometry


@pytest.mark.parametrize(
    ("size", "tokens", "tiles"),
    [((336, 336), 1176, 3), ((500, 667), 2340, 5), ((667, 500), 2352, 5), ((500, 500), 2928, 5), ((1, 1000), 576, 4)],
)
def test_image_tokens_of_known_sizes(size, tokens, tiles):
    assert count_image_tokens(size, PINPOINTS, 336, 14) == (tokens, tiles)


def test_our_arithmetic_agrees_with_the_model_and_the_processor(tiny):
    """Images of many shapes through the real processor and the model's own packing of features."""
    model = tiny.model()
    for size in [(1, 300), (300, 1), (2, 2), (70, 70), (69, 71), (35, 140), (211, 97), (97, 211)]:
        image = Image.new("RGB", size[::-1])
        encoded = tiny.processor(images=[image], text=[tiny.prompt.prompt], return_tensors="pt")
        tokens, tiles = tiny.native.count_tokens(size)
        with torch.no_grad():
            features = model.get_image_features(encoded["pixel_values"], encoded["image_sizes"]).pooler_output
        assert (encoded["input_ids"] == tiny.processor.image_token_id).sum() == tokens == len(features[0])
        assert encoded["pixel_values"].shape[1] == tiles


@pytest.mark.parametrize("kind", ["P", "1", "I;16", "I", "RGBA", "CMYK"])
def test_a_thumbnail_shows_what_the_whole_image_shows(kind):
    ramp = np.linspace(0, 65535, 60 * 90).reshape(60, 90)
    deep = {"I;16": np.uint16, "I": np.int32}
    image = Image.fromarray(ramp.astype(deep[kind])) if kind in deep else Image.fromarray(ramp // 257).convert("L")
    image = image if kind in deep else image.convert("RGB").convert(kind)
    file = io.BytesIO()
    image.save(file, "TIFF")
    row = {"bytes": file.getvalue(), "path": None}
    whole = open_image(row)
    whole.thumbnail((30, 30))
    small = open_image(row, 30)
    assert small.size == (30, 20) and small.mode == "RGB" and np.array_equal(small, whole)


@pytest.mark.parametrize(
    ("size", "decoded"), [((1600, 1200), (200, 150)), ((600, 2), (300, 1)), ((150, 100), (150, 100))]
)
def test_the_thumbnail_of_a_jpeg_is_decoded_small_and_upright(size, decoded, monkeypatch):
    sizes = []
    transpose = ImageOps.exif_transpose
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: sizes.append(image.size) or transpose(image))
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", size, "red").save(file, "JPEG", exif=exif)
    small = open_image({"bytes": file.getvalue(), "path": None}, 150)
    assert sizes == [decoded] and small.height == 150 and small.height > small.width


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"mif1", b"avif"])
def test_phone_formats_are_known_by_their_first_bytes(brand):
    assert is_image_start(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0")
    assert not is_image_start(b"\0\0\0\x18ftypmp42\0\0\0\0")


def test_a_text_that_begins_as_a_bitmap_does_is_no_image(tmp_path):
    """Two letters are not enough: notes on a BMW lie among images."""
    Image.new("RGB", (3, 3)).save(tmp_path / "photo.bmp")
    assert is_image_start((tmp_path / "photo.bmp").read_bytes()[:16]) and not is_image_start(b"BMW 320, Berlin")


def test_heic_of_any_name_says_what_reads_it_where_nothing_does(monkeypatch):
    row = {"bytes": b"\0\0\0\x18ftypheic" + bytes(100), "path": "photo.jpg"}
    monkeypatch.setattr("utils.image_utils.reads_heif", lambda: False)
    with pytest.raises(ImageError, match=r"photo.jpg: is HEIC/HEIF, which pillow-heif reads \(pip install pillow-heif"):
        open_image(row)


def progressive(side: int, repeats: int) -> bytes:
    """A JPEG whose last scan comes again and again."""
    file = io.BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", progressive=True)
    contents = file.getvalue()
    return contents[:-2] + contents[contents.rindex(b"\xff\xda") : -2] * repeats + contents[-2:]


def many_tiles(count: int) -> bytes:
    """A TIFF whose tiles are all the same bytes."""
    tags = [(256, 7900), (257, 7900), (258, 8), (259, 1), (262, 1), (277, 1), (322, 16), (323, 16)]
    start = 8 + 2 + 12 * 10 + 4
    entries = [(tag, 1, value) for tag, value in tags] + [(324, count, start), (325, count, start + 4 * count)]
    head = struct.pack("<2sHIH", b"II", 42, 8, 10) + b"".join(
        struct.pack("<HHII", tag, 4, *rest) for tag, *rest in entries
    )
    return head + bytes(4) + struct.pack("<I", start + 8 * count) * count + struct.pack("<I", 256) * count + bytes(256)


def test_what_would_take_too_long_to_decode_is_refused():
    assert open_image({"bytes": progressive(64, 1000), "path": "small.jpg"}).size == (64, 64)
    for bomb in (progressive(4000, 90), many_tiles(100_001)):
        began = time.perf_counter()
        with pytest.raises(ImageError, match=r"a: \d+ x \d+ in [\d,]+ parts takes too long to decode; save it anew"):
            open_image({"bytes": bomb, "path": "a"})
        assert time.perf_counter() - began < 2


def test_a_reason_of_several_lines_becomes_one(monkeypatch):
    """As libheif's of a file that was cut."""

    def fail(image):
        raise ValueError("Invalid input: end of file\n  at box iloc\n")

    monkeypatch.setattr("utils.image_utils._to_rgb", fail)
    with pytest.raises(ImageError) as raised:
        open_image(encoded(Image.new("RGB", (8, 8))) | {"path": "a.png"})
    assert str(raised.value) == "a.png: cannot be decoded (Invalid input: end of file at box iloc)"
