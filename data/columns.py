"""Which columns of a table hold the images and their labels, by type, name and content.

A table is Arrow with the features that `datasets` gives it: of parquet files, a saved data set, or the hub.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import pyarrow
import pyarrow.compute
from datasets import ClassLabel, Dataset, Features, Image, Value

from config.training_config import nearest_name
from utils.image_utils import SUFFIXES, is_image_start, printable
from utils.logging_utils import UserError

FIRST_ROWS = 8  # which tell whether texts are paths, and bytes are images
# Names of columns without case and punctuation, the best first.
IMAGE_NAMES = (
    *("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "pixelvalues", "images", "imagebytes"),
    *("imagedata", "imgbytes"),
)
PATH_NAMES = (
    *("filename", "imagefilename", "filepath", "imagepath", "imgpath", "imagefile", "imagename", "imgname"),
    *("photopath", "path", "file"),
)
LABEL_NAMES = (
    *("label", "labels", "class", "classname", "classlabel", "labelname", "labeltext", "category", "categoryname"),
    *("species", "speciesname", "scientificname", "commonname", "plant", "plantname", "flower", "flowername"),
    *("taxon", "taxonname", "name", "finelabel", "target", "cls", "y", "classid", "labelid", "categoryid", "speciesid"),
)
SPLIT_NAMES = ("split", "partition", "subset", "fold", "set")
GROUP_NAMES = ("observationid", "obsid", "individualid", "specimenid")  # not plantid, which may be that of a species


def kind_of(feature) -> str:
    """What a column may be used as: image, class (a ClassLabel), text, number, or else "other"."""
    if isinstance(feature, Image):
        return "image"
    if isinstance(feature, ClassLabel):
        return "class"
    if isinstance(feature, Mapping) and "bytes" in feature:
        stores = getattr(feature["bytes"], "dtype", "")
        return "image" if stores.endswith("binary") or (stores == "null" and "path" in feature) else "other"
    kinds = {"binary": "image", "large_binary": "image", "string": "text", "large_string": "text", "bool": "number"}
    dtype = feature.dtype if isinstance(feature, Value) else ""
    return kinds.get(dtype, "number" if re.match(r"u?int\d|float\d", dtype) else "other")


def plain_key(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def values_of(column: pyarrow.ChunkedArray) -> list:
    """The values of a column; what is not UTF-8 in texts becomes a question mark."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values = pyarrow.compute.cast(column, pyarrow.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="replace") for value in values]


def first_values(rows: Dataset) -> Callable[[str], list]:
    """The reader of a column's first values that `find_images` takes."""
    return lambda name: [value for value in values_of(rows.data.column(name).slice(0, FIRST_ROWS)) if value is not None]


def find_images(features: Features, head: Callable[[str], list]) -> tuple[list[str], bool]:
    """(columns of images, whether they hold paths of files), the best name first; `head`: first values of a column."""
    found = [name for name, feature in features.items() if kind_of(feature) == "image"]
    found = [name for name in found if not _is_doubtful(name, features[name]) or _look_like_images(head(name))]
    by_path = not found
    if by_path:
        texts = [name for name, feature in features.items() if kind_of(feature) == "text"]
        found = [name for name in texts if _look_like_paths(head(name))]
    order = (*IMAGE_NAMES, *PATH_NAMES)
    keys = {name: plain_key(name) for name in found}
    return sorted(found, key=lambda name: order.index(keys[name]) if keys[name] in order else len(order)), by_path


def find_image_column(features: Features, head: Callable[[str], list], where: str) -> tuple[str, bool]:
    """(the column of images, whether it holds paths of files). Raises UserError for none, or for several."""
    found, by_path = find_images(features, head)
    if len(found) > 1 and plain_key(found[0]) not in (*IMAGE_NAMES, *PATH_NAMES):
        raise UserError(
            f"{where}: several columns hold images ({', '.join(map(printable, found))}); rename the one to use to image"
        )
    if found:
        return found[0], by_path
    for name, feature in features.items():
        if kind_of(feature) == "text" and any(value.startswith(("http://", "https://")) for value in head(name)):
            raise UserError(
                f"{where}: has no images, but web addresses in the column {printable(name)}; download the images into "
                "<class name>/photo.jpg"
            )
    raise UserError(
        f"{where}: no column of images among {', '.join(map(printable, features))}; expected is one of image files "
        "(the Image of `datasets`, or their bytes) or of their paths"
    )


def _is_doubtful(name: str, feature) -> bool:
    """Bytes of no telling name: they may also be a hash or an embedding."""
    return isinstance(feature, Value) and plain_key(name) not in IMAGE_NAMES


def _look_like_images(values: Sequence[bytes]) -> bool:
    return any(is_image_start(value[:16]) for value in values)


def _look_like_paths(values: Sequence[str]) -> bool:
    paths = [value for value in values if value.lower().endswith(SUFFIXES) and "://" not in value]
    return len(paths) * 2 > len(values)


def find_label_column(rows: Dataset, image: str, label_column: str | None, where: str) -> str:
    """The column of labels: the one that is asked for, or that is known so, or alone repeats its values.

    Raises UserError with what to ask for.
    """
    features = rows.features
    usable = {name: kind_of(feature) for name, feature in features.items() if name != image}
    if label_column is not None:
        if label_column not in features:
            listed = ", ".join(map(printable, features))
            raise UserError(
                f"--label-column {label_column}: {where} has no such column{nearest_name(label_column, features)}; it "
                f"has {listed}"
            )
        if label_column == image or usable[label_column] in ("image", "other"):
            raise UserError(
                f"--label-column {label_column}: holds {describe(features[label_column])}; expected is one name or "
                "number for each image"
            )
        return label_column
    candidates = [name for name, kind in usable.items() if kind in ("class", "text", "number")]
    candidates = [name for name in candidates if plain_key(name) not in SPLIT_NAMES]
    known = sorted(
        (name for name in candidates if plain_key(name) in LABEL_NAMES),
        key=lambda name: LABEL_NAMES.index(plain_key(name)),
    )
    if known:
        return next((name for name in known if _repeats(rows, name)), known[0])
    telling = [name for name in candidates if usable[name] != "number" and _repeats(rows, name)]
    if len(telling) == 1:
        return telling[0]
    lists = [name for name in usable if plain_key(name) in LABEL_NAMES]
    if lists:
        raise UserError(
            f"{where}: the column {printable(lists[0])} holds {describe(features[lists[0]])}; expected is one name or "
            "number for each image: name a column that has it with --label-column"
        )
    listed = ", ".join(map(printable, telling or candidates)) or "there is none but the images"
    raise UserError(
        f"{where}: the images are in the column {printable(image)}, and which column has their labels is not clear "
        f"({listed}); name it: --label-column"
    )


def _repeats(rows: Dataset, name: str) -> bool:
    """Whether a column has few distinct values, as labels do and names of files do not."""
    distinct = pyarrow.compute.count_distinct(rows.data.column(name)).as_py()
    return kind_of(rows.features[name]) == "class" or 2 <= distinct <= len(rows) / 2


def describe(feature) -> str:
    if kind_of(feature) == "image":
        return "images"
    return f"{feature.dtype} values" if isinstance(feature, Value) else "lists or records"


def find_group_column(rows: Dataset) -> str | None:
    """The column that tells which images show one plant, if some do."""
    for name, feature in rows.features.items():
        if plain_key(name) in GROUP_NAMES and kind_of(feature) in ("text", "number"):
            column = rows.data.column(name)
            if 2 <= pyarrow.compute.count_distinct(column).as_py() < len(column) - column.null_count:
                return name
    return None


def find_names_column(rows: Dataset, codes: str, image: str) -> str:
    """A column of texts that has one for each value of the column `codes`, as numbers are called; else `codes`."""
    numbers = pyarrow.compute.count_distinct(rows.data.column(codes)).as_py()
    found = []
    for name, feature in rows.features.items():
        if kind_of(feature) not in ("text", "class") or name in (image, codes) or numbers * 2 > len(rows):
            continue
        if pyarrow.compute.count_distinct(rows.data.column(name)).as_py() != numbers:
            continue
        pairs = pyarrow.table({"code": rows.data.column(codes), "name": rows.data.column(name)})
        if pairs.drop_null().group_by(["code", "name"]).aggregate([]).num_rows == numbers:
            found.append(name)
    return min(found, key=lambda name: plain_key(name) not in LABEL_NAMES, default=codes)
