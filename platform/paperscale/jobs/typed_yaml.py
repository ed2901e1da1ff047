"""Typed sections from YAML: what is wrong is named by its field, with the nearest right name.

Scalars are taken as they are written, and read by the type of their field: ``1:00:00`` is not the number 3600, ``010``
is not 8, and ``no`` is a word where a word is wanted.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from paperscale.errors import UserError, nearest

_NOTHING = ("", "null", "~")
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class _Loader(yaml.BaseLoader):
    """Leaves every scalar as its text and refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is there twice; join the two")
        return super().construct_mapping(node, deep)


def read(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, every scalar as its text.

    Raises:
        UserError: it cannot be read, is not YAML, or is not a mapping.
    """
    try:
        content = yaml.load(path.read_text(), _Loader)  # noqa: S506  a BaseLoader makes nothing but text
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); make it a readable text file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}; mend that line") from error
    if content in ("", None):
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a mapping; write lines of `field: value`")
    return content


def convert(section: type, content: Mapping[str, Any], synonyms: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    """Return the values of a section's fields, of their types; a section inside it stays a dictionary.

    Args:
        section: a dataclass.
        content: what the file says.
        synonyms: names that people know from elsewhere, and what to use here.
        prefix: what to write before a field's name, such as ``container.``.

    Raises:
        UserError: a field is unknown or of the wrong type.
    """
    kinds = {name: kind for name, kind in get_type_hints(section).items() if name != "name"}
    for key in content:
        if key not in kinds:
            raise UserError(f"unknown field '{prefix}{key}'{_better(key, kinds, synonyms)}")
    return {key: _value(kinds[key], value, prefix + key, synonyms) for key, value in content.items()}


def build(section: type, values: Mapping[str, Any], **others: Any) -> Any:
    """Return a section from converted values.

    Raises:
        UserError: a field that must be given is missing, or the section refuses a value.
    """
    kinds = get_type_hints(section)
    built = {}
    for name, value in values.items():
        kind = _plain(kinds[name])
        if dataclasses.is_dataclass(kind) and value is not None:
            for part in dataclasses.fields(kind):
                needed = part.default is dataclasses.MISSING and part.default_factory is dataclasses.MISSING
                if needed and value.get(part.name) is None:
                    raise UserError(f"{name}: has no `{part.name}`; add one")
            value = build(kind, value)  # type: ignore[arg-type]
        built[name] = value
    return section(**{name: value for name, value in built.items() if value is not None}, **others)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return one mapping laid over another: mappings are merged, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _better(key: str, kinds: Mapping[str, Any], synonyms: Mapping[str, str]) -> str:
    if hint := synonyms.get(key.replace("_", "-")):
        return f"; use {hint}"
    return nearest(key, kinds) or f"; the fields are {', '.join(kinds)}"


def _plain(kind: Any) -> Any:
    """Return the type that is optional, or the type itself."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def _value(kind: Any, value: Any, where: str, synonyms: Mapping[str, str]) -> Any:
    """Return a value of a field's type."""
    plain = _plain(kind)
    if isinstance(value, str) and value in _NOTHING:
        return None
    if dataclasses.is_dataclass(plain):
        if not isinstance(value, dict):
            raise UserError(f"{where}: must be a mapping of fields to values, not {value!r}; write `{where}: {{...}}`")
        return convert(plain, value, synonyms, f"{where}.")  # type: ignore[arg-type]
    if get_origin(plain) is list:
        if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
            raise UserError(
                f"{where}: must be a list of lines, not {value!r}; write `{where}: [...]`, quoted if need be"
            )
        return value
    if get_origin(plain) is dict:
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise UserError(f"{where}: must be a mapping of names to values, not {value!r}; write `{where}: {{A: 1}}`")
        return value
    return _scalar(plain, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, str):
        raise UserError(f"{where}: must be one value, not {value!r}; write `{where}: VALUE`")
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            choices = ", ".join(get_args(kind))
            raise UserError(f"{where}: '{value}' is none of {choices}{nearest(value, get_args(kind)) or '; use one'}")
        return value
    if kind is bool:
        if value.lower() not in _TRUTH:
            raise UserError(f"{where}: '{value}' is neither true nor false; write one of them")
        return _TRUTH[value.lower()]
    if kind is int:
        if not value.removeprefix("-").isdecimal():
            raise UserError(f"{where}: must be a whole number, not '{value}'; write digits only")
        return int(value)
    return value
