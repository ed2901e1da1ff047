"""The process of ``paperscale bench bert``: one work, trained in every way, in turns.

    RANK=0 WORLD_SIZE=1 python -m paperscale.bench.bert_rank FOLDER WORK ROUNDS

The folder holds a run for each of our ways; the lines are those of :mod:`paperscale.bench.trainings_rank`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperscale.bench import bert_works as works
from paperscale.bench import trainings_rank
from paperscale.bench.bert_works import Work
from paperscale.bench.ranks import emit
from paperscale.bench.trainings_rank import Train, begin, name_of, take_turns
from paperscale.jobs.run import Run
from paperscale.training.meter import peak_rate
from paperscale.training.recipe import RecipeCLI

_OF_STREAM = ("cursor", "sample")  # where it stands, which no loop in memory needs


class Ways(trainings_rank.Ways):
    """The ways to train a work."""

    work: Work

    @cached_property
    def packed(self) -> list[dict[str, Any]]:
        """Return the batches that a run trains on, on the device."""
        data = RecipeCLI([f"--config={Run(self.folder / 'ours').recipe}"]).datamodule
        found = islice(data.train_dataloader(), self.work.warm_up + self.work.steps)
        kept = ({name: value for name, value in batch.items() if name not in _OF_STREAM} for batch in found)
        return [works.moved(works.weighed_as_theirs(batch), self.device) for batch in kept]

    def all(self) -> dict[str, Train]:
        """Return each way's training: the hand-written loops, and those that have a run."""
        ways: dict[str, Train] = {"huggingface": self.huggingface, "bare": self.bare, **super().all()}
        if "ours-compile" in ways:
            ways["huggingface-compile"] = partial(self.huggingface, compiled=True)
            ways["ours-compile"] = self._afresh(ways["ours-compile"])
        return ways

    @staticmethod
    def _afresh(train: Train) -> Train:
        """Return a training that does not count the graphs of those before it among its own."""

        def trained(warm_up: int, steps: int) -> dict[str, float]:
            torch._dynamo.reset()
            return train(warm_up, steps)

        return trained

    def bare(self, warm_up: int, steps: int) -> dict[str, float]:
        """A hand-written loop over our network and packed batches in memory."""
        network = works.pretraining(self.work).network.to(self.device)
        return self._loop(network, partial(works.loss_of, network), self.packed, warm_up, steps)

    def huggingface(self, warm_up: int, steps: int, compiled: bool = False) -> dict[str, float]:
        """A hand-written loop over transformers' network and the same batches in memory, padded to their longest."""
        network = works.huggingface(works.pretraining(self.work)).to(self.device)
        padded = [works.padded(batch) for batch in self.packed]
        if compiled:
            torch._dynamo.reset()
            network.compile()
        return self._loop(network, lambda batch: network(**batch).loss, padded, warm_up, steps)

    def _loop(
        self,
        network: nn.Module,
        loss_of: Callable[[Any], Tensor],
        batches: Iterable[dict[str, Any]],
        warm_up: int,
        steps: int,
    ) -> dict[str, float]:
        """Train, as anyone would who writes it by hand."""
        optimizer = works.adamw(network.train())
        mixed = self.work.precision == "bf16-mixed"
        for step, batch in enumerate(islice(cycle(batches), warm_up + steps)):
            if step == warm_up:
                self.clock.begin()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
                loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), works.CLIP)
            optimizer.step()
        return self.clock.read(steps)


def facts(work: Work, batches: Sequence[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Return what a step of the work has and needs, the mean of those that count, and what the GPU could compute."""
    counted = [batches[number % len(batches)] for number in range(work.warm_up, work.warm_up + work.steps)]
    lengths = [batch["lengths"] for batch in counted]
    places = sum(len(of) * max(of) for of in lengths)  # of the padded batches
    with torch.device("meta"):
        module = works.pretraining(work)
    return {
        "device": name_of(device),
        "amount": sum(map(sum, lengths)) / work.steps,
        "padding": 1 - sum(map(sum, lengths)) / places,
        "flops": sum(map(module.training_flops, counted)) / work.steps,
        "peak": peak_rate(device, work.precision),
    }


def main(folder: Path, work: Work, rounds: int) -> None:
    """Train in every way, in turns."""
    device = begin()
    ways = Ways(folder, work, device)
    emit(folder, facts(work, ways.packed, device))
    take_turns(folder, ways.all(), work.warm_up, work.steps, rounds, device)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Work(**json.loads(sys.argv[2])), int(sys.argv[3]))
