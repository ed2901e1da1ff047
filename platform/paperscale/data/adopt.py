"""``paperscale data index``: make anybody's WebDataset shards a set of ours, without changing them.

The tars stay as and where they are; an index for each and a manifest are written beside them, or into another folder
where the tars cannot be written to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from paperscale.atomic import write_atomically
from paperscale.data import index as shard_index
from paperscale.data.index import Rules
from paperscale.data.shards import MANIFEST, Manifest
from paperscale.data.writer import as_shard, map_in_order
from paperscale.errors import UserError

_SAMPLES_FOR_DUPLICATES = 1 << 27  # 1 GB of hashes
_NEW = ".new"  # of an index until all are made


@dataclass
class Adopted:
    """What was adopted.

    Attributes:
        manifest: of the set.
        fields: members of the samples.
        incomplete: samples that lack a field, by split: left out or kept, as the rules say.
        duplicates: keys that occur in more than one shard of a split, by split.
    """

    manifest: Manifest
    fields: tuple[str, ...] = ()
    incomplete: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)


def adopt(
    folder: Path,
    splits: Mapping[str, Sequence[str]] | None = None,
    rules: Rules | None = None,
    *,
    out: Path | None = None,
    name: str | None = None,
    classes: list[str] | None = None,
    num_processes: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Adopted:
    """Index the tars of a folder and write the manifest that makes them a set.

    Args:
        folder: where the tars are.
        splits: split to its tars, as brace patterns (``train-{000000..001023}.tar``) or globs, relative to
            ``folder``; by default every tar, its split being its name without the number, or the folder it is in.
        rules: which members to index, and what to do with incomplete samples.
        out: where indexes and manifest go; by default beside the tars.
        name: the set's name; by default the folder's.
        classes: names of the labels.
        num_processes: processes that read tars; by default one for each core.
        progress: called with the bytes of each tar that is done.

    Raises:
        UserError: a tar is missing, compressed, damaged, or breaks the rules; what was there before is kept.
    """
    tars = find_tars(folder, splits)
    out = out or folder
    rules = rules or Rules()
    old = _facts(out)
    if not rules.lengths and "lengths" in old:
        rules = Rules(rules.fields, rules.missing, old["lengths"])
    _refuse_unwritable(out)
    adopted = Adopted(Manifest(name or old.get("name") or folder.resolve().name, {}))
    fields: set[str] = set()
    for split, paths in tars.items():
        keys, shards, incomplete = [], [], 0
        work = partial(_index_one, folder, out, rules)
        processes = min(len(paths), num_processes or os.cpu_count() or 1)
        for path, (index, hashes, short) in zip(paths, map_in_order(work, paths, processes, chunk=1), strict=True):
            shards.append(replace(as_shard(index), name=str(path.relative_to(folder))))
            fields |= set(index.fields)
            incomplete += short
            keys.append(hashes)
            progress(path.stat().st_size)
        adopted.manifest.splits[split] = shards
        adopted.incomplete[split] = incomplete
        if sum(map(len, keys)) <= _SAMPLES_FOR_DUPLICATES:
            together = np.concatenate(keys)
            adopted.duplicates[split] = len(together) - len(np.unique(together))
    for shard in (shard for _, shard in adopted.manifest.shards()):
        new = _index_path(out, shard.name, _NEW)
        new.replace(_index_path(out, shard.name))
    _complete(adopted, fields, old, rules, classes, folder, out)
    return adopted


def _complete(
    adopted: Adopted,
    fields: set[str],
    old: dict[str, Any],
    rules: Rules,
    classes: list[str] | None,
    folder: Path,
    out: Path,
) -> None:
    """Fill in the manifest, with what an earlier one knew, and write it."""
    manifest = adopted.manifest
    adopted.fields = tuple(sorted(fields))
    manifest.classes = classes or old.get("classes", [])
    manifest.image = old.get("image", {})
    manifest.schema = {name: old.get("schema", {}).get(name, "") for name in adopted.fields}
    manifest.lengths = dict(rules.lengths)
    manifest.files = {name: digest for name, digest in old.get("files", {}).items() if (out / name).exists()}
    manifest.provenance = old.get("provenance") or {"source": f"shards found in {folder.resolve()}"}
    if out.resolve() != folder.resolve():
        manifest.tars = str(folder.resolve())
    write_atomically(out / MANIFEST, manifest.to_json().encode())


def _refuse_unwritable(out: Path) -> None:
    """Make the folder; refuse one that cannot be written to.

    Raises:
        UserError: it cannot be.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"{out} cannot be written to ({error.strerror}); name a folder for indexes and manifest with --out"
        ) from error


def _index_path(out: Path, name: str, ending: str = "") -> Path:
    return out / (name + shard_index.SUFFIX + ending)


def _index_one(folder: Path, out: Path, rules: Rules, tar: Path) -> tuple[shard_index.ShardIndex, Any, int]:
    """Index one tar and write its index aside; return it, the hashes of its keys, and its incomplete samples."""
    index = shard_index.build(tar, rules)
    path = _index_path(out, str(tar.relative_to(folder)), _NEW)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, shard_index.to_bytes(index))
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in index.all_keys())
    kept = int((index.members["offset"] == 0).any(1).sum())
    return index, np.frombuffer(digests, np.uint64), index.dropped + kept


def _facts(out: Path) -> dict[str, Any]:
    """Return what an earlier manifest says, whatever its version."""
    try:
        found = json.loads((out / MANIFEST).read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def find_tars(folder: Path, splits: Mapping[str, Sequence[str]] | None = None) -> dict[str, list[Path]]:
    """Return the tars of each split, in the order of their names or of the patterns.

    Raises:
        UserError: the folder is missing, a pattern matches nothing, a tar it names is missing, or a tar is in two
            splits.
    """
    if "://" in str(folder) or ":/" in str(folder):
        raise UserError(f"{folder} is a URL; index the shards where they can be written to, and copy the set there")
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise UserError(f"{folder} {what}; name the folder that holds the tars")
    if splits is None:
        found = _by_name(folder)
    else:
        found = {
            split: [path for pattern in patterns for path in _matching(folder, split, pattern)]
            for split, patterns in splits.items()
        }
    split_of: dict[Path, str] = {}
    for split, paths in found.items():
        for path in paths:
            if path in split_of:
                where = f"twice in {split}" if split_of[path] == split else f"in {split_of[path]} and in {split}"
                raise UserError(f"{path} is {where}: its samples would be in both; give each tar once")
            split_of[path] = split
    return found


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """Return the tars below a folder: the split is the name without the number, or else the folder's."""
    found: dict[str, list[Path]] = {}
    paths = [path for path in folder.rglob("*.tar*") if re.fullmatch(r".*\.(tar|tar\.(gz|bz2|xz|zst)|tgz)", path.name)]
    for path in sorted(path for path in paths if path.is_file()):
        inside = path.parent.relative_to(folder)
        prefix = re.sub(r"[-_.]?\d+$", "", path.name.partition(".tar")[0])
        split = prefix if inside == Path() else inside.parts[0]
        found.setdefault(split or "train", []).append(path)
    if not found:
        raise UserError(f"{folder} holds no .tar file; name the folder that holds the shards")
    return found


def _matching(folder: Path, split: str, pattern: str) -> list[Path]:
    from braceexpand import braceexpand

    asked = f"--split {split}={pattern}"
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:  # unbalanced braces
        raise UserError(f"{asked}: {error}; write for example 'train-{{0000..0099}}.tar'") from error
    paths: list[Path] = []
    for name in names:
        if any(c in name for c in "*?["):
            here = sorted(path for path in folder.glob(name) if path.is_file())
            if not here:
                raise UserError(f"{asked}: no file of {folder} matches; {_first_tars(folder)}")
            paths += here
        elif (folder / name).is_file():
            paths.append(folder / name)
        else:
            raise UserError(
                f"{asked}: {folder / name} is missing; give the numbers of the shards that are there "
                f"({_first_tars(folder)})"
            )
    return paths


def _first_tars(folder: Path) -> str:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.tar"))
    return f"it holds {', '.join(names[:3])}{'...' if len(names) > 3 else ''}" if names else "it holds no tar"
