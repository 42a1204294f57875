"""Images as they come, and as nobody should have made them: each with the expected result of reading it."""

import io
import os
import random
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

import utils.image_utils  # noqa: F401  PIL writes HEIF with it

OPENS = ""  # else words of the error
REFUSED = ": "  # an error of any words


def _picture(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> Image.Image:
    width, height = size
    ramp = np.add.outer(np.arange(height), np.arange(width))[:, :, None] * np.array([3, 5, 7])
    return Image.fromarray((ramp % 256).astype(np.uint8)).convert(mode)


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _with_exif(block: bytes) -> bytes:
    """A JPEG with this as its APP1 segment."""
    plain = _saved(_picture(), "JPEG")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]


def _jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose header claims this size."""
    plain = bytearray(_saved(_picture(), "JPEG"))
    place = plain.index(b"\xff\xc0") + 5
    plain[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(plain)


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(parts)


def _header(width: int, height: int, bits: int = 8, color: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _frames() -> dict:
    return {"save_all": True, "append_images": [_picture().rotate(90), _picture().rotate(180)]}


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("photo.txt", "no image")
    return file.getvalue()


def contents() -> dict[str, tuple[bytes, str]]:
    """File name -> (bytes, OPENS or words of the error)."""
    jpeg, png = _saved(_picture(), "JPEG"), _saved(_picture(), "PNG")
    sixteen = Image.fromarray((np.arange(2400, dtype=np.uint16) * 27).reshape(40, 60))
    floats = Image.fromarray(np.array([[-3e38, float("nan"), float("inf"), 3e38]] * 4, dtype=np.float32))
    pixels = zlib.compress(bytes(40 * (1 + 60 * 3)))
    text_bomb = b"x\0\0" + zlib.compress(bytes(90_000_000))
    broken_crc = bytearray(png)
    broken_crc[-5] ^= 1
    loop = (
        b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 0) + struct.pack("<I", 8)
    )  # a directory that follows itself
    return {
        "plain.jpg": (jpeg, OPENS),
        "progressive.jpg": (_saved(_picture(), "JPEG", progressive=True), OPENS),
        "cmyk.jpg": (_saved(_picture("CMYK"), "JPEG"), OPENS),
        "gray.jpg": (_saved(_picture("L"), "JPEG"), OPENS),
        "UPPER.JPEG": (jpeg, OPENS),
        "16 bit.png": (_saved(sixteen, "PNG"), OPENS),
        "1 bit.png": (_saved(_picture("1"), "PNG"), OPENS),
        "palette.png": (_saved(_picture("P"), "PNG", transparency=3), OPENS),
        "alpha.png": (_saved(_picture("RGBA"), "PNG"), OPENS),
        "gray alpha.png": (_saved(_picture("LA"), "PNG"), OPENS),
        "animated.gif": (_saved(_picture(), "GIF", **_frames()), OPENS),
        "animated.webp": (_saved(_picture(), "WEBP", **_frames()), OPENS),
        "animated.png": (_saved(_picture(), "PNG", **_frames()), OPENS),
        "lossless.webp": (_saved(_picture(), "WEBP", lossless=True), OPENS),
        "windows.bmp": (_saved(_picture(), "BMP"), OPENS),
        "lzw.tif": (_saved(_picture(), "TIFF", compression="tiff_lzw"), OPENS),
        "pages.tiff": (_saved(_picture(), "TIFF", **_frames()), OPENS),
        "cmyk.tiff": (_saved(_picture("CMYK"), "TIFF"), OPENS),
        "lab.tiff": (_saved(_picture("LAB"), "TIFF"), OPENS),
        "float.tiff": (_saved(floats, "TIFF"), OPENS),
        "a png.jpg": (png, OPENS),
        "a webp.png": (_saved(_picture(), "WEBP"), OPENS),
        "iphone.heic": (_saved(_picture(), "HEIF"), OPENS),
        "a heic.jpg": (_saved(_picture(), "HEIF"), OPENS),
        "plain.avif": (_saved(_picture(), "AVIF"), OPENS),
        "sideways.jpg": (_saved(_picture(), "JPEG", exif=_exif(6)), OPENS),
        "orientation 99.jpg": (_saved(_picture(), "JPEG", exif=_exif(99)), OPENS),
        "exif noise.jpg": (_with_exif(b"Exif\0\0" + random.Random(0).randbytes(500)), OPENS),
        "exif far.jpg": (_with_exif(b"Exif\0\0II*\0\xff\xff\xff\x7f"), OPENS),
        "exif huge.jpg": (_with_exif(b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(60000)), OPENS),
        "profile broken.png": (_saved(_picture(), "PNG", icc_profile=b"no profile"), OPENS),
        "junk behind.jpg": (jpeg + random.Random(1).randbytes(5000), OPENS),
        "one pixel.png": (_saved(_picture(size=(1, 1)), "PNG"), OPENS),
        "thread.png": (_saved(_picture(size=(1, 3000)), "PNG"), OPENS),
        "ribbon.png": (_saved(_picture(size=(5000, 3)), "PNG"), OPENS),
        "line\nbreak.jpg": (jpeg, OPENS),
        "\u2618 \U0001f33b.jpg": (jpeg, OPENS),
        "-rf {0} %s $(x) 'q'.jpg": (jpeg, OPENS),
        "\u202egpj.jpg": (jpeg, OPENS),
        f"{'long' * 60}.jpg": (jpeg, OPENS),
        "empty.jpg": (b"", "is empty (0 bytes)"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "cannot be decoded"),
        "head.jpg": (jpeg[:30], "its header cannot be read"),
        "half.png": (png[: len(png) // 2], "cannot be decoded"),
        "half.webp": (_saved(_picture(), "WEBP")[:200], REFUSED),
        "half.gif": (_saved(_picture(), "GIF")[:900], "cannot be decoded"),
        "half.bmp": (_saved(_picture(), "BMP")[:900], "cannot be decoded"),
        "half.tiff": (_saved(_picture(), "TIFF", compression="tiff_lzw")[:-500], REFUSED),
        "crc.png": (bytes(broken_crc), OPENS),  # of the end mark alone: every pixel is there
        "junk before.jpg": (b"junk" + jpeg, "is not an image"),
        "page.jpg": (b"<!doctype html><html>404 not found</html>", "is not an image"),
        "text.png": (b"no image at all\n", "is not an image"),
        "vector.jpg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is not an image"),
        "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print", "is not an image"),
        "paper.jpg": (b"%PDF-1.7\n1 0 obj", "is not an image"),
        "archive.jpg": (_zip(), "is not an image"),
        "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "is not an image"),
        "zeros.jpg": (bytes(4000), "is not an image"),
        "noise.jpg": (random.Random(2).randbytes(4000), "is not an image"),
        "pickle.jpg": (b"\x80\x04cos\nsystem\n(S'touch planted'\ntR.", "is not an image"),
        "bomb.png": (_saved(Image.new("1", (9000, 9000)), "PNG"), "above the limit of 64,000,000 pixels"),
        "wide bomb.png": (_png(_header(2**31 - 1, 1), (b"IDAT", pixels), (b"IEND", b"")), "above the limit of"),
        "vast.jpg": (_jpeg_of_size(65500, 65500), "above the limit of 64,000,000 pixels"),
        "nothing.jpg": (_jpeg_of_size(0, 0), REFUSED),
        "no size.png": (_png(_header(0, 0), (b"IDAT", pixels), (b"IEND", b"")), REFUSED),
        "text bomb.png": (
            _png(_header(60, 40), (b"zTXt", text_bomb), (b"IDAT", pixels), (b"IEND", b"")),
            "its header cannot be read",
        ),
        "no pixels.png": (_png(_header(60, 40), (b"IEND", b"")), "cannot be decoded"),
        "loop.tiff": (loop, "is not an image"),
    }  # fmt: skip


# Not regular files: how each is made, and the expected result of reading it.
def _link(target: str):
    return lambda path: path.symlink_to(target)


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(4_000_000_000)


PLACES = {
    "folder.jpg": (Path.mkdir, "it is a folder, not a file"),
    "link to photo.jpg": (_link("plain.jpg"), OPENS),
    "link to nowhere.jpg": (_link("gone.jpg"), "cannot be read (No such file"),
    "loop of links.jpg": (_link("loop of links.jpg"), "cannot be read (Too many levels of symbolic links)"),
    "without end.jpg": (_link("/dev/zero"), "it is a device or pipe, not a file"),
    "pipe.jpg": (os.mkfifo, "it is a device or pipe, not a file"),
    "sparse.jpg": (_sparse, "4,000,000,000 bytes are above the limit of"),
}


def write_corpus(folder: Path) -> dict[str, str]:
    """All of it as files in a folder; name -> OPENS or words of the error. One name is not UTF-8 and not among them."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for name, (data, words) in contents().items():
        (folder / name).write_bytes(data)
        expected[name] = words
    for name, (make, words) in PLACES.items():
        make(folder / name)
        expected[name] = words
    (folder / os.fsdecode(b"latin \xe9t\xe9.jpg")).write_bytes(contents()["plain.jpg"][0])
    return expected
