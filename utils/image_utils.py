"""Photos: any file becomes an upright RGB picture within limits, and is sized in the one way every script uses.

H, W: height and width in pixels of the upright photo.
"""

import io
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401  registers two formats that PIL loads late

from utils.logging_utils import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000  # the largest phone sensors in common use; decoded as RGB that is 192 MB in a worker
EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class PhotoError(UserError):
    """A photo that cannot be used; the message names the file and the reason."""


def open_photo(source: dict | str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The photo as an upright RGB picture: EXIF rotation applied, alpha on white, 16 bit rescaled, first frame.

    `source` is a path or a row's image, {"bytes": file contents or None, "path": str or None}.
    Raises PhotoError for a file that is missing, empty, no photo, broken, or above `max_pixels`.
    """
    name, image = _open_header(source, max_pixels)
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise whatever a broken file makes them trip over
        raise PhotoError(f"{name}: cannot be decoded ({error})") from error


def photo_size(source: dict | str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) of the upright photo, from the file's header alone. Raises PhotoError like open_photo."""
    name, image = _open_header(source, max_pixels)
    try:
        sideways = image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
    except Exception as error:
        raise PhotoError(f"{name}: its EXIF block cannot be read ({error})") from error
    return (image.width, image.height) if sideways else (image.height, image.width)


def fit_photo(photo: Image.Image, image_size: int | None) -> Image.Image:
    """The whole photo as a square of `image_size` pixels, bicubic, aspect not kept; None leaves its own size.

    The square is what the base view of LLaVA-NeXT does to any photo anyway, and gives every photo equally many tokens.
    """
    if image_size is None or photo.size == (image_size, image_size):
        return photo
    return photo.resize((image_size, image_size), Image.Resampling.BICUBIC)


def fitted_size(size: tuple[int, int], image_size: int | None) -> tuple[int, int]:
    """(H, W) that fit_photo gives a photo of this (H, W)."""
    return size if image_size is None else (image_size, image_size)


def _open_header(source: dict | str | Path, max_pixels: int) -> tuple[str, Image.Image]:
    path = source.get("path") if isinstance(source, dict) else source
    contents = source.get("bytes") if isinstance(source, dict) else None
    name = str(path or "photo without a name")
    name = name if name.isprintable() else repr(name)
    try:
        if contents is None:
            contents = Path(path).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        raise PhotoError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not contents:
        raise PhotoError(f"{name}: is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(contents), formats=FORMATS)
    except UnidentifiedImageError:
        raise PhotoError(f"{name}: is not a photo in any of the formats {', '.join(FORMATS)}") from None
    except Exception as error:
        raise PhotoError(f"{name}: its header cannot be read ({error})") from error
    if image.width * image.height > max_pixels:
        raise PhotoError(
            f"{name}: {image.width} x {image.height} is above the limit of {max_pixels:,} pixels; make it smaller"
        )
    return name, image


def check_bad_share(bad: Collection[str], photos: int, max_bad_fraction: float) -> None:
    """Raise PhotoError if more than this share of so many photos cannot be opened; `bad` says which and why."""
    if len(bad) > max_bad_fraction * photos:
        raise PhotoError(
            f"{len(bad)} of {photos} photos cannot be opened, above max_bad_fraction={max_bad_fraction} "
            f"({'; '.join(sorted(bad)[:5])}); mend or remove them, or raise --max-bad-fraction"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """PIL clips these modes at 255, which turns a 16-bit photo almost white; here 65535 is white.

    A floating-point photo has no fixed white: it is stretched from its own minimum to its own maximum.
    """
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        values = (values - values.min()) / max(np.ptp(values), 1e-12) * 65535
    return Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
