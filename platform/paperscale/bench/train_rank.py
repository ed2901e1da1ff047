"""The process of ``paperscale bench train``: one network at one batch size, trained in every way, in turns.

    RANK=0 WORLD_SIZE=1 python -m paperscale.bench.train_rank FOLDER WORK ROUNDS

The folder holds a run for each of our ways; the lines are those of :mod:`paperscale.bench.trainings_rank`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from paperscale.bench import trainings_rank
from paperscale.bench.ranks import emit
from paperscale.bench.train_works import SGD, Work, images_on, reference
from paperscale.bench.trainings_rank import Train, begin, name_of, take_turns


class Ways(trainings_rank.Ways):
    """The ways to train a work."""

    work: Work

    def all(self) -> dict[str, Train]:
        """Return each way's training: the hand-written loop, and those that have a run."""
        return {"bare": self.bare, **super().all()}

    def bare(self, warm_up: int, steps: int) -> dict[str, float]:
        """A hand-written loop over one batch on the device."""
        network = reference(self.work.depth)[0].to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(network.parameters(), **SGD, fused=True)
        batch = images_on(self.device, self.work.batch_size, self.work.side)
        mixed = self.work.precision == "bf16-mixed"
        for step in range(warm_up + steps):
            if step == warm_up:
                self.clock.begin()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
                loss = F.cross_entropy(network(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
        return self.clock.read(steps)


def main(folder: Path, work: Work, rounds: int) -> None:
    """Train in every way, in turns."""
    device = begin()
    torch.backends.cudnn.benchmark = True  # in all ways
    facts = {"device": name_of(device), "amount": work.batch_size, "reference": reference(work.depth)[1]}
    emit(folder, facts)
    take_turns(folder, Ways(folder, work, device).all(), work.warm_up, work.steps, rounds, device)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Work(**json.loads(sys.argv[2])), int(sys.argv[3]))
