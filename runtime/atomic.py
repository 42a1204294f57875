"""Files that hold the old content or the new one, whatever happens meanwhile."""

import os
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Write beside `path`, sync to disk, then replace it."""
    draft = path.with_name(f"{path.name}.draft")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
