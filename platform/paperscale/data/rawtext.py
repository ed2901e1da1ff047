"""Sets of text that is tokenised as it is read: what is asked of a text depends on its characters and words.

Their samples are ``json``: questions about a passage (:mod:`paperscale.data.questions`), sentences whose words have
tags (:mod:`paperscale.data.tagged`). They have no tokenizer beside them, ``data.tokenizer`` names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from paperscale.data.absent import AbsentSet
from paperscale.data.files import open_folder
from paperscale.data.shards import ShardSet
from paperscale.data.stream import ShardStream
from paperscale.data.tasks import TaskStream
from paperscale.data.tokenizer import FILE, Tokenizer
from paperscale.errors import UserError

FIELD = "json"
_NAME_ONE = f"name the {FILE} of the pre-training, or a set that has one, for example data.tokenizer=data/wikipedia"


class RawTextStream(TaskStream):
    """What streams of text as it was written have in common.

    Args:
        path: a set whose samples are ``json``.
        global_batch_size: samples of one optimizer step over all ranks.
        length: tokens of a sequence at most.
        tokenizer: a ``tokenizer.json``, or a set (a folder or a URL) that has one: that of the pre-training.
        stream: the further arguments of :class:`~paperscale.data.tasks.TaskStream`.
    """

    name_of = ShardStream.name_of

    def __init__(
        self,
        path: str | list[str],
        global_batch_size: int,
        length: int,
        tokenizer: str | None,
        **stream: Any,
    ):
        super().__init__(path, global_batch_size, length, **stream)
        self.tokenizer_path = tokenizer

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            UserError: none is named, or what is named is none.
        """
        return self._opened[0]

    @cached_property
    def _opened(self) -> tuple[Tokenizer, str]:
        """Return the tokenizer, and the hash of its definition."""
        where = self.tokenizer_path
        if not where:
            raise UserError(f"data.tokenizer is not set, and {self.paths[0]} holds text as it was written; {_NAME_ONE}")
        definition = _definition(where)
        return Tokenizer(definition, where), hashlib.sha256(definition.encode()).hexdigest()[:16]

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "tokenizer": self._opened[1]}

    def whole_units(self, shards: ShardSet) -> Sequence[int]:
        """Return the samples of each shard of a set.

        Raises:
            UserError: they are not ``json``.
        """
        if FIELD not in shards.fields():
            raise UserError(
                f"{shards.path} holds {', '.join(shards.fields())} and no {FIELD}: {type(self).__name__} reads sets "
                f"such as {self.made_by}; set data.path to one, or choose another data.class_path"
            )
        return shards.sizes

    def row_of(self, shards: ShardSet, shard: int, sample: int) -> int:
        """Return the row of a shard that holds a sample: each has one."""
        return sample

    made_by: str
    """What makes such a set, for messages."""

    def content(self, shards: ShardSet, shard: int, row: int) -> dict[str, Any]:
        """Return what a sample holds.

        Raises:
            SampleFault: it cannot be read.
            ValueError: it is no JSON object.
        """
        found = json.loads(bytes(shards.read(shard, row, (FIELD,))[FIELD]))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return found

    def stand_in(self, path: str, split: str, channels: int) -> ShardSet:
        """Return what stands for a missing set."""
        return AbsentSet(path, split, (FIELD,))


def _definition(where: str) -> str:
    """Return the content of a tokenizer.json, given itself or by the set that it lies in."""
    folder, name = where, FILE
    if where.endswith(".json"):
        folder, _, name = where.rpartition("/") if "/" in where else (".", "", where)
    if "://" not in where and not (Path(folder) / name).is_file():
        raise UserError(f"data.tokenizer={where}: there is no {name} in {Path(folder).absolute()}; {_NAME_ONE}")
    try:
        return bytes(open_folder(folder).read_file(name)).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.tokenizer={where}: cannot be read ({reason}); {_NAME_ONE}") from error
