"""``python -m paperscale.jobs.worker RUN ATTEMPT``: one rank of one attempt of a run."""

from __future__ import annotations

from paperscale.training import signals

signals.install()  # before the seconds that the imports below take

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperscale.data.writer import write_atomically
from paperscale.errors import (
    FAILED,
    FINISHED,
    REQUEUE,
    USER_ERROR,
    Interrupted,
    Superseded,
    UserError,
    describe,
    is_users_mistake,
)
from paperscale.jobs import snapshot
from paperscale.jobs.run import Attempt, Run
from paperscale.training.checkpoint import newest_verified, read_manifest

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from paperscale.tracking.wandb import GuardedWandbLogger
    from paperscale.training.callbacks import StateIO
    from paperscale.training.recipe import RecipeCLI

_RESUME_WAIT_S = 300


def main(run_dir: str, attempt_number: int) -> int:
    """Run the attempt; return the exit code that tells the job script what to do next."""
    adopt_slurm_ranks()
    run = Run(Path(run_dir))
    attempt = Attempt(run.path / "attempts" / f"{attempt_number:04d}")
    try:
        code = Worker(run, attempt).run_attempt()
    except Superseded as reason:
        print(reason, flush=True)
        code = FAILED
    except BaseException as error:
        code = USER_ERROR if is_users_mistake(error) else FAILED
        what = describe(error) if code == USER_ERROR else f"{type(error).__name__}: {describe(error)}"
        attempt.record_error(int(os.environ.get("RANK", 0)), what[:500])
        with contextlib.suppress(OSError):
            if code == USER_ERROR:
                print(f"error: {describe(error)}", file=sys.stderr, flush=True)
            else:
                traceback.print_exc()
    return code


def adopt_slurm_ranks() -> None:
    """Give SLURM's task numbers the names that torch uses; only inside a step, where srun has set them."""
    if "SLURM_STEP_ID" not in os.environ or "RANK" in os.environ:
        return
    names = {"RANK": "PROCID", "LOCAL_RANK": "LOCALID", "NODE_RANK": "NODEID", "WORLD_SIZE": "NTASKS"}
    for name, slurm in names.items():
        os.environ[name] = os.environ[f"SLURM_{slurm}"]


class Worker:
    """One rank: builds what the recipe says, trains, and reports.

    Args:
        run: the run's directory.
        attempt: this attempt's directory.
    """

    def __init__(self, run: Run, attempt: Attempt):
        self.run, self.attempt, self.info = run, attempt, run.info
        self.rank = int(os.environ.get("RANK", 0))
        self.wandb: GuardedWandbLogger | None = None

    def say(self, line: str) -> None:
        """Print a line on rank 0; a log on a full disk must not end the training."""
        if self.rank == 0:
            with contextlib.suppress(OSError):
                print(line, flush=True)

    def run_attempt(self) -> int:
        """Train to the end, or to where the ranks were told to stop; return the exit code."""
        from paperscale.training.recipe import RecipeCLI

        snapshot.use(self.run.path / "code", Path(self.info.workdir))
        self.record(
            attempt=self.attempt.number,
            started=time.time(),
            host=socket.gethostname(),
            job=os.environ.get("SLURM_JOB_ID", self.run.job),
        )
        resume = self.choose_checkpoint()
        cli = RecipeCLI([f"--config={self.run.recipe}"])
        trainer = self.build_trainer(cli, resume)
        self.recover_tracking(resume)
        code, reason = FAILED, ""
        try:
            trainer.fit(
                cli.model,
                datamodule=cli.datamodule,
                ckpt_path=resume and resume / "state.pt",
                weights_only=True,
            )
            self.finish(cli, trainer)
            code = FINISHED
        except Interrupted as interrupted:
            code, reason = REQUEUE, str(interrupted)
            self.say(f"interrupted by {reason} after step {trainer.global_step}: checkpoint written")
        finally:
            self.record(ended=time.time(), outcome=code, reason=reason, samples_per_s=self.progress.samples_per_s)
            if self.wandb:
                self.wandb.finish(code)
        if trainer.world_size > 1:
            trainer.strategy.barrier("attempt ends")  # all ranks leave together: srun ends the rest at the first exit
        return code

    def build_trainer(self, cli: RecipeCLI, resume: Path | None) -> Trainer:
        """Return the recipe's Trainer as this job runs it."""
        from paperscale.jobs.environment import JobEnvironment
        from paperscale.training.callbacks import StateIO
        from paperscale.training.interruption import take_over_signals
        from paperscale.training.strategies import ExactDDPStrategy

        world_size = self.info.nodes * self.info.procs_per_node
        io = StateIO()
        settings: dict[str, Any] = {
            "devices": self.info.procs_per_node,
            "num_nodes": self.info.nodes,
            "plugins": [JobEnvironment(), io],
            "logger": self.loggers(cli),
            "callbacks": self.callbacks(cli, io, resume),
            "accumulate_grad_batches": cli.datamodule.accumulate(world_size),
            # a folder of this attempt alone: on SLURM, Lightning resumes from any hpc_ckpt_* that it finds in it
            "default_root_dir": str(self.attempt.path),
            "enable_checkpointing": True,
            "enable_progress_bar": self.on_terminal,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
        }
        if world_size > 1 and cli.config_init.trainer.strategy in ("auto", "ddp"):
            settings["strategy"] = ExactDDPStrategy(timeout=timedelta(minutes=10))
        trainer = cli.trainer_for(**settings)
        take_over_signals(trainer)
        return trainer

    @property
    def on_terminal(self) -> bool:
        """Return whether a person watches: `paperscale fit` in a terminal."""
        return self.info.engine == "here" and sys.stdout.isatty()

    def loggers(self, cli: RecipeCLI) -> list[Any]:
        """Return where metrics go: ``metrics.jsonl``, and W&B unless the recipe says otherwise."""
        from paperscale.tracking.wandb import GuardedWandbLogger, JsonlLogger

        loggers: list[Any] = [JsonlLogger(self.run.metrics, self.attempt.number)]
        tracking = cli.config_init.tracking
        if tracking.enabled:
            self.wandb = GuardedWandbLogger(
                self.run.path,
                self.info.name,
                self.info.wandb_id,
                self.say,
                project=tracking.project,
                entity=tracking.entity,
                tags=list(tracking.tags),
                config=cli.config.as_dict(),
            )
            loggers.append(self.wandb)
        return loggers

    def callbacks(self, cli: RecipeCLI, io: StateIO, resume: Path | None) -> list[Any]:
        """Return what happens at each step boundary, in this order."""
        from lightning.pytorch.callbacks import RichProgressBar

        from paperscale.training import callbacks as own

        every_s = float("inf") if self.on_terminal else 5.0
        self.progress = own.ProgressReport(self.run.path / "progress.json", self.attempt.number, self.say, every_s)
        options = cli.config_init.checkpoint
        return [
            *([RichProgressBar()] if self.on_terminal else []),
            own.FirstBatch(lambda position, samples: self.record(position=position, first_samples=samples)),
            own.StreamPosition(),
            own.GlobalMetrics(),
            self.progress,
            own.Checkpointing(self.run.checkpoints, options, io, resume, self.is_current, self.say),
        ]

    def choose_checkpoint(self) -> Path | None:
        """Return the checkpoint to continue from: rank 0 verifies and chooses, the others read its choice.

        Raises:
            UserError: there are checkpoints and none verifies, or rank 0's choice cannot be seen from here.
        """
        choice = self.attempt.path / "resume.json"
        if self.rank == 0:
            write_atomically(choice, json.dumps(self._newest_checkpoint()).encode())
        deadline = time.monotonic() + _RESUME_WAIT_S
        while not choice.exists():
            if time.monotonic() > deadline:
                raise UserError(f"{choice} has not appeared: is {self.run.path} on a file system that all nodes share?")
            time.sleep(0.1)
        content = json.loads(choice.read_text())
        if content["error"]:
            raise UserError(content["error"])
        return content["checkpoint"] and Path(content["checkpoint"])

    def _newest_checkpoint(self) -> dict[str, str | None]:
        """Return the newest checkpoint that verifies, or the error that ends the attempt on every rank."""
        checkpoint, passed_over = newest_verified(self.run.checkpoints)
        for reason in passed_over:
            self.say(f"WARNING passed over {reason}")
        self.record(resumed_from=checkpoint and checkpoint.name, passed_over=passed_over)
        if passed_over and checkpoint is None:
            error = (
                f"none of the {len(passed_over)} checkpoints in {self.run.checkpoints} verifies; restore one from a "
                "copy, or remove the folder's content to begin anew"
            )
            return {"checkpoint": None, "error": error}
        self.say(f"continues from {checkpoint.name}" if checkpoint else "begins at the start")
        return {"checkpoint": str(checkpoint) if checkpoint else None, "error": None}

    def recover_tracking(self, resume: Path | None) -> None:
        """Let W&B have the rows up to the checkpoint that the previous attempt's W&B lost."""
        from paperscale.tracking.wandb import is_online, read_metrics

        if self.wandb and resume and self.rank == 0 and not is_online():
            step, previous = read_manifest(resume).step, self.attempt.number - 1
            rows = [r for r in read_metrics(self.run.metrics) if r["attempt"] == previous and r["step"] < step]
            self.wandb.recover(rows)

    def finish(self, cli: RecipeCLI, trainer: Trainer) -> None:
        """Score the test split and write the results; their presence says that the run is finished."""
        from lightning.pytorch.utilities.model_helpers import is_overridden

        results = {key: float(value) for key, value in trainer.callback_metrics.items()}
        if cli.config_init.test_after_fit and is_overridden("test_step", cli.model):
            results.update(trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)[0])
        results["samples_per_s"] = round(self.progress.samples_per_s, 1)
        if self.rank == 0:
            write_atomically(self.run.path / "results.json", json.dumps(results, indent=1).encode())
        for name, value in results.items():
            self.say(f"{name:20} {value:.4f}")

    def is_current(self) -> bool:
        """Return whether no newer attempt has started: a rank that was cut off and replaced must not write."""
        return self.run.attempts()[-1].number == self.attempt.number

    def record(self, **facts: Any) -> None:
        """Add facts to the attempt's record (rank 0)."""
        if self.rank == 0:
            try:
                self.attempt.record(**facts)
            except OSError as error:
                self.say(f"WARNING cannot write {self.attempt.path}: {error.strerror}")


if __name__ == "__main__":
    from paperscale.training.callbacks import exit_now

    code = main(sys.argv[1], int(sys.argv[2]))
    signals.ignore()
    exit_now(code)
