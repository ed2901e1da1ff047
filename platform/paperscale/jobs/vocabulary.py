"""Whether a set's tokens are those that weights were trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paperscale.data.shards import MANIFEST
from paperscale.data.tokenizer import FILE, Tokenizer
from paperscale.errors import UserError
from paperscale.recipes import parse_yaml


def missing(datamodule: Any) -> list[str]:
    """Return the folders of shards that are not there."""
    return [path for path in datamodule.paths if "://" not in path and not (Path(path) / MANIFEST).exists()]


def trained_on(recipe: Path) -> Path | None:
    """Return the tokenizer of the set that a recipe trains on; ``None`` where there is none on this machine."""
    if not recipe.is_file():
        return None
    data = (parse_yaml(recipe.read_text()) or {}).get("data", {}).get("init_args", {})
    where = data.get("tokenizer") or data.get("path") or ""
    where = str(where[0] if isinstance(where, list) and where else where)
    file = Path(where) if where.endswith(".json") else Path(where) / FILE
    return file if where and file.is_file() else None


def check_tokenizer(datamodule: Any, recipe: Path) -> None:
    """Refuse a set whose tokens have other numbers than those that weights were trained on, as far as that is known.

    Args:
        datamodule: of what is to be trained or scored.
        recipe: that the weights were trained with; there is none beside those of other libraries.

    Raises:
        UserError: names both.
    """
    if not hasattr(datamodule, "tokenizer") or missing(datamodule) or not getattr(datamodule, "has_tokenizer", True):
        return
    file = trained_on(recipe)
    if file is None or Tokenizer.load(file).to_json() == datamodule.tokenizer().to_json():
        return
    if hasattr(datamodule, "tokenizer_path"):
        fix = f"set data.tokenizer={file}"
    else:
        fix = f"prepare it anew with `paperscale data prepare NAME --tokenizer {file}`"
    raise UserError(f"the weights know the tokens of {file}, and {datamodule.paths[0]} is read with others: {fix}")
