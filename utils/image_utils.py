"""Images: any file becomes an upright RGB image within limits, resized in the same way by every script.

H, W: height and width in pixels of the upright image.
"""

import contextlib
import io
import itertools
import math
import random
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageEnhance, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401  registers two formats that PIL loads late

from utils.logging_utils import UserError, one_line, printable

with contextlib.suppress(ImportError):  # reads_heif() tells those who have such images
    import pillow_heif

    pillow_heif.register_heif_opener()

HEIF_SUFFIXES = (".heic", ".heif", ".hif")  # of iPhones; read by pillow-heif
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    *HEIF_SUFFIXES,
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
# How files of these formats begin.
HEIF_START = re.compile(rb"....ftyp(?:hei[cmsx]|hev[cx]|mif1|msf1)", re.DOTALL)
IMAGE_START = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|.{8}WEBP|BM.{4}\0{4}|II\*\0|MM\0\*|....ftypavi[fs]|" + HEIF_START.pattern,
    re.DOTALL,
)
LFS_POINTER = b"version https://git-lfs"
MAX_PIXELS = 64_000_000  # of a decoded image; as RGB that is 256 MB in a worker
MAX_JPEG_PIXELS = 256_000_000  # the largest phone sensors have 200 million; a JPEG is decoded smaller
Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS  # PIL warns above it; the limits here are checked first
MAX_BYTES = 400_000_000  # of a file: MAX_PIXELS of 16-bit RGB, not compressed
# A JPEG may repeat its scans without end, and each takes as long as the first: 0.3 MB took 12 s.
JPEG_SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS  # of all scans; progressive ones have about 10
MAX_TILES = 100_000  # of a TIFF; PIL's own loop takes 5 microseconds for each
EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
BASE_VIEW = [[0, 0]]  # as image_grid_pinpoints of a LLaVA-NeXT: no tiles beside the one that shows the whole image


class ImageError(UserError):
    """An image that cannot be read; the message gives the file and the reason."""


def is_image_name(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def looks_like_image(path: Path) -> bool:
    """Whether a regular file begins as one of the image formats does, whatever its name. Raises OSError."""
    with path.open("rb") as file:
        return is_image_start(file.read(16))


def is_image_start(start: bytes) -> bool:
    """Whether the first 16 bytes of a file are those of one of the image formats."""
    return IMAGE_START.match(start) is not None


def reads_heif() -> bool:
    return "HEIF" in Image.registered_extensions().values()


def open_image(source: dict | str | Path, side: int | None = None) -> Image.Image:
    """The upright RGB image: EXIF rotation applied, alpha on white, 16 bit rescaled, first frame.

    `source` is a path or a row's image, {"bytes": file contents or None, "path": str or None}. With `side` the image is
    at most so many pixels wide and high; a large JPEG is decoded small.
    Raises ImageError for a file that is missing, empty, corrupted, above MAX_PIXELS or not an image.
    """
    name, image = _open_header(source, side)
    try:
        image = _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise all kinds of errors for a corrupted file
        raise ImageError(f"{name}: cannot be decoded ({one_line(error)})") from error
    if side is not None:
        image.thumbnail((side, side))
    return image


def read_image_size(source: dict | str | Path) -> tuple[int, int]:
    """(H, W) of the upright image, from the file's header alone. Raises ImageError like open_image."""
    name, image = _open_header(source)
    try:
        sideways = image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
        sideways &= EXIF_ORIENTATION not in getattr(image, "tag_v2", ())  # of a TIFF, for whose size PIL heeds it
    except Exception as error:
        raise ImageError(f"{name}: its EXIF block cannot be read ({one_line(error)})") from error
    return (image.width, image.height) if sideways else (image.height, image.width)


def fit_image(image: Image.Image, image_size: int | None, seed: int | None = None) -> Image.Image:
    """The whole image resized to `image_size` x `image_size` pixels, bicubic, aspect ratio not kept; None: as it is.

    The base view of LLaVA-NeXT makes a square of any image anyway, and a square gives all images the same token count.
    With a `seed` the image is augmented first.
    """
    if seed is not None:
        image = augment_image(image, seed)
    if image_size is None or image.size == (image_size, image_size):
        return image
    return image.resize((image_size, image_size), Image.Resampling.BICUBIC)


def augment_image(image: Image.Image, seed: int) -> Image.Image:
    """Another view of the same plant: a crop of 60 to 100 % of its area, a flip, a little other light and color.

    Hue is kept, since the color of a flower tells species apart. The same `seed` gives the same view.
    """
    draw = random.Random(seed)
    area, ratio = draw.uniform(0.6, 1), math.exp(draw.uniform(-0.2, 0.2))  # of the crop, relative to the whole image's
    width = round(min(math.sqrt(area * ratio), 1) * image.width) or 1
    height = round(min(math.sqrt(area / ratio), 1) * image.height) or 1
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    image = image.crop((left, top, left + width, top + height))
    if draw.random() < 0.5:
        image = ImageOps.mirror(image)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(draw.uniform(0.8, 1.2))
    return image


def crop_sizes(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(H, W) of crops that augment_image may cut from an image of this (H, W): of every shape, and of several areas."""
    for area, step in itertools.product((0.6, 0.7, 0.8, 0.9, 1.0), range(-20, 21)):
        height, width = (min(math.sqrt(area * math.exp(sign * step / 100)), 1) for sign in (-1, 1))
        yield round(height * size[0]) or 1, round(width * size[1]) or 1


def count_image_tokens(size: tuple[int, int], pinpoints: list[list[int]], tile: int, patch: int) -> tuple[int, int]:
    """(image tokens, tiles) that LLaVA-NeXT (Liu et al., 2024) makes of an image of this (H, W).

    `pinpoints` are the (H, W) that an image may be resized to, `tile` is the side in pixels of what the vision tower
    takes, `patch` that of one of its tokens. The first tile shows the whole image, (tile / patch)^2 tokens. The rest
    show it at the pinpoint that keeps most of its pixels and, among equals, wastes least; rows and columns of padding
    are dropped, and each remaining row ends in a newline token. Of the base view alone the first tile is left and a
    newline token; LLaVA-1.5, without pinpoints, has no newline. Independent of the code of processor and model.
    """
    if pinpoints in (BASE_VIEW, []):
        return (tile // patch) ** 2 + len(pinpoints), 1
    height, width = size
    best_height, best_width = max(pinpoints, key=lambda pinpoint: _kept_and_waste(size, pinpoint))
    side = tile // patch
    rows, columns = best_height // tile * side, best_width // tile * side
    if width * rows > height * columns:  # wider than the pinpoint: padded above and below
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    return side * side + rows * (columns + 1), 1 + best_height // tile * (best_width // tile)


def _kept_and_waste(size: tuple[int, int], pinpoint: list[int]) -> tuple[int, int]:
    """Sort key: pixels that a pinpoint keeps of an image, and minus those that it wastes."""
    height, width = size
    scale = min(pinpoint[1] / width, pinpoint[0] / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, kept - pinpoint[0] * pinpoint[1]


def png_image(image: Image.Image, compress_level: int = -1) -> dict:
    """An image as that of a row, {"bytes": PNG, "path": None}; compression level 0 to 9, or -1 for zlib's default."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=compress_level)
    return {"bytes": file.getvalue(), "path": None}


def gray_image(size: tuple[int, int]) -> dict:
    """Plain gray of this (H, W), as the image of a row."""
    return png_image(Image.new("RGB", size[::-1], (128, 128, 128)))


def _open_header(source: dict | str | Path, side: int | None = None) -> tuple[str, Image.Image]:
    """(the file's name for messages, the image, not decoded yet); `side`: as large as is needed later."""
    path = source.get("path") if isinstance(source, dict) else source
    contents = source.get("bytes") if isinstance(source, dict) else None
    name = printable(str(path or "image without a name"))
    try:
        if contents is None:
            contents = _read_file(Path(path or ""), name)
    except (OSError, TypeError, ValueError) as error:
        raise ImageError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not contents:
        raise ImageError(f"{name}: is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(contents), formats=FORMATS)
    except Image.DecompressionBombError as error:
        problem = f"is above the limit of {MAX_PIXELS:,} pixels; make it smaller ({one_line(error)})"
        raise ImageError(f"{name}: {problem}") from None
    except UnidentifiedImageError:
        if contents.startswith(LFS_POINTER):
            raise ImageError(f"{name}: is a pointer of Git LFS, not the image; fetch it with git lfs pull") from None
        if HEIF_START.match(contents) and not reads_heif():
            raise ImageError(f"{name}: is HEIC/HEIF, which pillow-heif reads (pip install pillow-heif)") from None
        raise ImageError(f"{name}: is not an image in any of the formats {', '.join(FORMATS)}") from None
    except Exception as error:
        raise ImageError(f"{name}: its header cannot be read ({one_line(error)})") from error
    scans = len(JPEG_SCAN.findall(contents)) if image.format in ("JPEG", "MPO") else 0
    size, scanned = f"{image.width} x {image.height}", scans * image.width * image.height
    _decode_smaller(image, side)
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{name}: {size} is above the limit of {MAX_PIXELS:,} pixels; make it smaller")
    if scanned > MAX_SCANNED_PIXELS or len(image.tile) > MAX_TILES:
        parts = f"{size} in {max(scans, len(image.tile)):,} parts"
        raise ImageError(f"{name}: {parts} takes too long to decode; save it anew")
    return name, image


def _decode_smaller(image: Image.Image, side: int | None) -> None:
    """Let a JPEG of more pixels be decoded at the largest of 1/2, 1/4, 1/8 of its size that is within MAX_PIXELS.

    With `side` at the smallest of them whose longer side is that long. Of an image PIL heeds one such call alone.
    A progressive one is not: its decoder holds all of it in memory whatever the size asked for.
    """
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO") and pixels <= MAX_JPEG_PIXELS and not image.info.get("progressive"):
        scale = next((scale for scale in (1, 2, 4, 8) if pixels <= MAX_PIXELS * scale**2), 1)
        if side is not None:
            scale = max(scale, min(max(image.size) // side, 8))
        if scale > 1:
            image.draft(None, (max(image.width // scale, 1), max(image.height // scale, 1)))


def _read_file(path: Path, name: str) -> bytes:
    """The bytes of a regular file: reading a pipe would wait for ever, and a device has no end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "folder" if path.is_dir() else "device or pipe"
        raise ImageError(f"{name}: cannot be read (it is a {kind}, not a file)")
    if status.st_size > MAX_BYTES:
        raise ImageError(f"{name}: {status.st_size:,} bytes are above the limit of {MAX_BYTES:,}; make it smaller")
    return path.read_bytes()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    elif image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.buildTransform(*profiles, "LAB", "RGB").apply(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        on_white = Image.new("RGB", image.size, "white")
        on_white.paste(image, mask=image)
        return on_white
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """65535 is white, where PIL clips at 255; floating-point images are stretched, minimum to maximum."""
    values = np.asarray(image).astype(np.float32)
    if image.mode == "F":
        values = np.nan_to_num(values, copy=False)
        low, high = float(np.min(values)), float(np.max(values))
        half = max(high / 2 - low / 2, 1e-12)  # high - low may overflow
        values /= half
        values -= low / half
        values *= 65535 / 2
    np.clip(values, 0, 65535, out=values)
    values /= 257
    return Image.fromarray(np.round(values, out=values).astype(np.uint8))


def image_fingerprint(image: dict) -> list[int]:
    """Tells an image from another of the same id: its size and checksum, or size and time of its file.

    Empty for a file that cannot be found: opening it reports that, and counts it among the unreadable images.
    """
    if image["bytes"] is not None:
        return [len(image["bytes"]), zlib.crc32(image["bytes"])]
    with contextlib.suppress(OSError, ValueError):  # gone, may not be read, or no path that a file can have
        found = Path(image["path"] or "").stat()
        return [found.st_size, found.st_mtime_ns] if stat.S_ISREG(found.st_mode) else []
    return []
