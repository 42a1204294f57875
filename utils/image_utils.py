"""Images: any file becomes an upright RGB picture within limits, and is sized in the one way every script uses.

H, W: height and width in pixels of the upright image.
"""

import io
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401  registers two formats that PIL loads late

from utils.logging_utils import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # of images in folders, in any case
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000  # the largest phone sensors in common use; decoded as RGB that is 256 MB in a worker
MAX_BYTES = 400_000_000  # of a file: 16-bit RGB of so many pixels, not compressed
EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class ImageError(UserError):
    """An image that cannot be used; the message names the file and the reason."""


def is_image_name(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def images_below(folder: Path) -> list[Path]:
    """Files below a folder that are named like images, in the order of their names; nothing hidden."""
    return [path for path in files_below(folder) if is_image_name(path)]


def files_below(folder: Path) -> list[Path]:
    """All but folders and what is hidden."""
    return sorted(
        path
        for path in folder.rglob("*")
        if not path.is_dir() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def open_image(source: dict | str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as an upright RGB picture: EXIF rotation applied, alpha on white, 16 bit rescaled, first frame.

    `source` is a path or a row's image, {"bytes": file contents or None, "path": str or None}.
    Raises ImageError for a file that is missing, empty, no image, broken, or above `max_pixels`.
    """
    name, image = _open_header(source, max_pixels)
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise whatever a broken file makes them trip over
        raise ImageError(f"{name}: cannot be decoded ({error})") from error


def read_image_size(source: dict | str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) of the upright image, from the file's header alone. Raises ImageError like open_image."""
    name, image = _open_header(source, max_pixels)
    try:
        sideways = image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
    except Exception as error:
        raise ImageError(f"{name}: its EXIF block cannot be read ({error})") from error
    return (image.width, image.height) if sideways else (image.height, image.width)


def fit_image(image: Image.Image, image_size: int | None) -> Image.Image:
    """The whole image as a square of `image_size` pixels, bicubic, aspect not kept; None leaves its own size.

    The square is what the base view of LLaVA-NeXT does to any image anyway, and gives every image equally many tokens.
    """
    if image_size is None or image.size == (image_size, image_size):
        return image
    return image.resize((image_size, image_size), Image.Resampling.BICUBIC)


def png_image(image: Image.Image, compress_level: int = -1) -> dict:
    """The image of a row, {"bytes": PNG, "path": None}; a compression level of 0 to 9, -1: zlib's default."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=compress_level)
    return {"bytes": file.getvalue(), "path": None}


def gray_image(size: tuple[int, int]) -> dict:
    """The image of a row: plain grey of this (H, W)."""
    return png_image(Image.new("RGB", size[::-1], (128, 128, 128)))


def fitted_size(size: tuple[int, int], image_size: int | None) -> tuple[int, int]:
    """(H, W) that fit_image gives an image of this (H, W)."""
    return size if image_size is None else (image_size, image_size)


def _open_header(source: dict | str | Path, max_pixels: int) -> tuple[str, Image.Image]:
    path = source.get("path") if isinstance(source, dict) else source
    contents = source.get("bytes") if isinstance(source, dict) else None
    name = printable(str(path or "photo without a name"))
    try:
        if contents is None:
            contents = _read(Path(path or ""), name)
    except ImageError:
        raise
    except (OSError, TypeError, ValueError) as error:
        raise ImageError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not contents:
        raise ImageError(f"{name}: is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(contents), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: is above the limit of {max_pixels:,} pixels; make it smaller ({error})") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: is not an image in any of the formats {', '.join(FORMATS)}") from None
    except Exception as error:
        raise ImageError(f"{name}: its header cannot be read ({error})") from error
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{name}: {image.width} x {image.height} is above the limit of {max_pixels:,} pixels; make it smaller"
        )
    return name, image


def _read(path: Path, name: str) -> bytes:
    """Only of a file: a pipe would be waited for, and a device has no end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(
            f"{name}: cannot be read (it is a {'folder' if path.is_dir() else 'device or pipe'}, not a file)"
        )
    if found.st_size > MAX_BYTES:
        raise ImageError(f"{name}: {found.st_size:,} bytes are above the limit of {MAX_BYTES:,}; make it smaller")
    return path.read_bytes()


def printable(name: str) -> str:
    """A file's name on one line."""
    return name if name.isprintable() else repr(name)


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
    """PIL clips these modes at 255, which turns a 16-bit image almost white; here 65535 is white.

    A floating-point image has no fixed white: it is stretched from its own minimum to its own maximum.
    """
    values = np.asarray(image).astype(np.float32)
    if image.mode == "F":
        values = np.nan_to_num(values, copy=False)
        low, high = float(values.min()), float(values.max())
        values /= max(high / 2 - low / 2, 1e-12)  # halves: the distance of the two may be above the largest number
        values -= low / max(high / 2 - low / 2, 1e-12)
        values *= 65535 / 2
    np.clip(values, 0, 65535, out=values)
    values /= 257
    return Image.fromarray(np.round(values, out=values).astype(np.uint8))
