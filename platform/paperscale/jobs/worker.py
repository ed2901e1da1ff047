"""``python -m paperscale.jobs.worker RUN ATTEMPT``: one rank of one attempt of a run."""

from __future__ import annotations

from paperscale.training import signals

signals.install()  # before the seconds that the imports below take

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperscale.atomic import write_atomically
from paperscale.errors import (
    BAD_NODE,
    FAILED,
    FINISHED,
    LOST,
    OUT_OF_MEMORY,
    REQUEUE,
    ROLLBACK,
    SUPERSEDED,
    USER_ERROR,
    BadNode,
    Interrupted,
    LostRank,
    RolledBack,
    Superseded,
    UserError,
    describe,
    is_lost_rank,
    is_users_mistake,
)
from paperscale.jobs import amends, checkpoints, snapshot
from paperscale.jobs.run import Attempt, Run
from paperscale.training.checkpoint import clear_unfinished, newest_verified, read_manifest
from paperscale.training.pulse import Pulse
from paperscale.training.sharding import sharding

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.distributed import Store

    from paperscale.tracking.wandb import GuardedWandbLogger
    from paperscale.training.recipe import RecipeCLI

_RESUME_WAIT_S = 300
_BAD_NODE_WAIT_S = 2.0


def main(run_dir: str, attempt_number: int) -> int:
    """Run the attempt; return the exit code that tells the job script what to do next."""
    run = Run(Path(run_dir))
    attempt = Attempt(run.path / "attempts" / f"{attempt_number:04d}")
    try:
        return Worker(run, attempt).run_attempt()
    except Superseded as reason:
        print(reason, flush=True)
        attempt.fail(SUPERSEDED, str(reason))
        return SUPERSEDED
    except BaseException as error:
        return _failed(attempt, error)


def _failed(attempt: Attempt, error: BaseException) -> int:
    """Record an error and print it, with its traceback unless the user can mend it; return the exit code."""
    code = FAILED
    if isinstance(error, BadNode):
        code = BAD_NODE
    elif is_users_mistake(error):
        code = USER_ERROR
    elif is_lost_rank(error):
        code = LOST
    host = socket.gethostname()
    if code == BAD_NODE:
        attempt.suspect(host, describe(error))
    what = describe(error) if code in (USER_ERROR, BAD_NODE) else f"{type(error).__name__}: {describe(error)}"
    attempt.fail(code, f"rank {os.environ.get('RANK', 0)} on {host}: {what[:500]}")
    with contextlib.suppress(OSError):
        if code in (FAILED, LOST):
            traceback.print_exc()
        else:
            print(f"error: {describe(error)}", file=sys.stderr, flush=True)
    return code


def keep_stacks(attempt: Attempt, rank: int) -> None:
    """Write every thread's stack when the agent asks for it; works where Python itself stands still."""
    file = (attempt.path / f"stacks-rank-{rank}.txt").open("a")
    faulthandler.register(signal.SIGQUIT, file=file, all_threads=True)


class Worker:
    """One rank: builds what the recipe says, trains, and reports.

    Args:
        run: the run's directory.
        attempt: this attempt's directory.
    """

    def __init__(self, run: Run, attempt: Attempt):
        self.run, self.attempt, self.info = run, attempt, run.info
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = self.info.nodes * self.info.procs_per_node
        self.pulse = Pulse.from_environment()
        self.store: Store | None = None
        self.wandb: GuardedWandbLogger | None = None

    def say(self, line: str) -> None:
        """Print a line on rank 0; a log on a full disk must not end the training."""
        if self.rank == 0:
            with contextlib.suppress(OSError):
                print(line, flush=True)

    def run_attempt(self) -> int:
        """Train to the end, or to where the ranks were told to stop; return the exit code."""
        from paperscale.training import speed
        from paperscale.training.recipe import RecipeCLI

        snapshot.use(self.run)
        self.record(
            attempt=self.attempt.number,
            started=time.time(),
            host=socket.gethostname(),
            job=os.environ.get("SLURM_JOB_ID", self.run.job),
        )
        resume = self.choose_checkpoint()
        cli = RecipeCLI([f"--config={self.run.recipe}"], defer=True)
        speed.apply(cli.config_init.speed, cli.model)
        if cli.initialisation is not None and cli.initialisation.failure:
            self.say(f"WARNING every process makes the whole model first: {cli.initialisation.failure}")
        self.sharding = sharding(cli.config.trainer.strategy, self.world_size)
        self.record(
            strategy=self.sharding.name,
            nodes=self.info.nodes,
            procs_per_node=self.info.procs_per_node,
        )
        self.preflight(cli)
        self.make_amends(cli)
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
        except RolledBack as back:
            code, reason = ROLLBACK, str(back)
            self.settle(trainer)
            amends.note(self.attempt, {"passed_over": [(back.start, back.stop)], "data": {}})
            self.attempt.fail(code, reason)
            self.say(reason)
        except Exception as error:
            code, reason = OUT_OF_MEMORY, self.halve(cli, trainer, error)
        finally:
            self.record(ended=time.time(), outcome=code, reason=reason, samples_per_s=self.progress.samples_per_s)
            if self.wandb:
                self.wandb.finish(REQUEUE if code in (ROLLBACK, OUT_OF_MEMORY) else code)
        if trainer.world_size > 1 and code != OUT_OF_MEMORY:
            trainer.strategy.barrier("attempt ends")  # all ranks leave together: srun ends the rest at the first exit
        return code

    def make_amends(self, cli: RecipeCLI) -> None:
        """Heed what earlier attempts have found out."""
        for name, value in self.amends["data"].items():
            setattr(cli.datamodule, name, value)
            self.say(f"data.{name}={value}, for want of memory")
        cli.datamodule.pass_over(self.amends["passed_over"])
        for start, stop in self.amends["passed_over"]:
            self.say(f"passes over samples {start:,} to {stop:,}, where training went wrong")

    def halve(self, cli: RecipeCLI, trainer: Trainer, error: Exception) -> str:
        """Let the next attempt divide the batch further; return what has happened.

        Raises:
            Exception: the error, which was not want of memory in a training step.
            UserError: a forward pass is of one sample already.
        """
        from paperscale.training.guard import is_out_of_memory

        no_memory = self.guard.in_step and is_out_of_memory(error)
        if no_memory or isinstance(error, UserError):
            self.settle(trainer)
        if not (no_memory and cli.config_init.guard.halve_on_oom):
            raise error
        what = f"rank {self.rank} on {socket.gethostname()}: out of memory in step {trainer.global_step + 1}"
        smaller = cli.datamodule.halved(self.world_size)
        if smaller is None:
            raise UserError(
                f"{what} with one sample a forward pass ({describe(error)[:200]}); use "
                "speed.activation_checkpointing=blocks, divide the model (--strategy fsdp or deepspeed_zero3_offload), "
                "or use devices with more memory"
            ) from error
        (name, value), *_ = smaller.items()
        reason = f"{what}; goes on with data.{name}={value} and the same global batches"
        amends.note(self.attempt, {"passed_over": [], "data": smaller})
        self.attempt.fail(OUT_OF_MEMORY, reason)
        with contextlib.suppress(OSError):
            print(reason, flush=True)
        return reason

    @staticmethod
    def settle(trainer: Trainer) -> None:
        """Let the checkpoint that is being written be finished: the run goes on from there."""
        trainer.checkpoint_callback.saver.wait()  # type: ignore[union-attr]

    def preflight(self, cli: RecipeCLI) -> None:
        """Bring the ranks together and see whether they can work together, and whether each node has the shards.

        Raises:
            LostRank: ranks have not appeared.
            BadNode: this node cannot reach the shards, others can; or its GPUs cannot be used or compute wrongly.
            UserError: no node can.
        """
        from paperscale.training import rendezvous

        on_gpu = cli.on_gpu()
        self.check_gpu(cli)
        start = time.monotonic()
        if self.world_size > 1:
            self.store = rendezvous.join(self.rank, self.world_size, on_gpu)
        elif self.sharding.divided:
            rendezvous.alone(on_gpu)
        found = rendezvous.preflight(self.world_size, on_gpu, time.monotonic() - start)
        self.say(str(found))
        for warning in found.warnings:
            self.say(f"WARNING {warning}")
        self.check_shards(cli)
        if self.rank == 0:
            with contextlib.suppress(OSError):
                write_atomically(self.attempt.path / "preflight.json", json.dumps(found.facts(), indent=1).encode())

    def check_gpu(self, cli: RecipeCLI) -> None:
        """Refuse to train on the CPU of a node whose GPUs were asked for."""
        import torch

        gpus, seen = self.info.gpus_per_node, torch.cuda.device_count()
        if gpus and cli.accelerator != "cpu" and seen <= int(os.environ.get("LOCAL_RANK", 0)):
            seen_of = f"torch sees {seen} of {gpus} GPUs"
            raise BadNode(f"{seen_of}; `paperscale doctor` on the node compares the driver with torch's CUDA")

    def check_shards(self, cli: RecipeCLI) -> None:
        """Tell a set that this node alone cannot reach from one that is gone."""
        import torch.distributed as dist

        problem = ""
        try:
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                cli.datamodule.check()
        except UserError as error:
            problem = str(error)
        problems = [problem]
        if self.store is not None:
            problems = [""] * self.world_size
            dist.all_gather_object(problems, problem)
        nodes = problems[:: self.info.procs_per_node]
        if all(nodes):
            raise UserError(nodes[0])
        if problem:
            raise BadNode(f"{problem} (other nodes reach it)")
        if any(nodes):
            time.sleep(_BAD_NODE_WAIT_S)  # the rank that has found it says so first
            raise LostRank("another node cannot reach the shards")

    def build_trainer(self, cli: RecipeCLI, resume: Path | None) -> Trainer:
        """Return the recipe's Trainer as this job runs it."""
        from paperscale.jobs.environment import JobEnvironment
        from paperscale.training import strategies
        from paperscale.training.heartbeat import Heartbeat
        from paperscale.training.interruption import take_over_signals
        from paperscale.training.lean import NoProfiler, make_lean
        from paperscale.training.logbook import Logbook, all_callbacks

        strategy = strategies.make(
            cli.config_init.trainer.strategy, self.world_size, cli.device, not cli.model.automatic_optimization
        )
        if cli.initialisation is not None:
            strategy.initial = cli.initialisation.value
        settings: dict[str, Any] = {
            "devices": self.info.procs_per_node,
            "num_nodes": self.info.nodes,
            "strategy": strategy,
            "plugins": [JobEnvironment()],
            "logger": self.loggers(cli),
            "profiler": cli.config_init.trainer.profiler or NoProfiler(),
            "callbacks": self.callbacks(cli, resume),
            "accumulate_grad_batches": cli.datamodule.accumulate(self.world_size),
            # a folder of this attempt alone: on SLURM, Lightning resumes from any hpc_ckpt_* that it finds in it
            "default_root_dir": str(self.attempt.path),
            "enable_checkpointing": True,
            "enable_progress_bar": self.on_terminal,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
        }
        if cli.datamodule.epochs_differ:
            settings["reload_dataloaders_every_n_epochs"] = 1  # Lightning asks for their number with the loader
        trainer = cli.trainer_for([Heartbeat(self.pulse), Logbook()], **settings)
        take_over_signals(trainer)
        make_lean(all_callbacks(trainer), cli.model)
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
                group=self.info.group or None,
                tags=list(tracking.tags),
                config=cli.config.as_dict(),
            )
            loggers.append(self.wandb)
        return loggers

    def callbacks(self, cli: RecipeCLI, resume: Path | None) -> list[Any]:
        """Return what happens at each step boundary, in this order."""
        from lightning.pytorch.callbacks import RichProgressBar

        from paperscale.training import callbacks as own
        from paperscale.training.checkpointing import Checkpointing
        from paperscale.training.ema import EMA, EMAEnd
        from paperscale.training.guard import Guard

        recipe = f"{self.run.recipe}, then `paperscale resume {self.run.name}`"
        self.guard = Guard(cli.config_init.guard, len(self.amends["passed_over"]), self.say, recipe)
        every_s = float("inf") if self.on_terminal else 5.0
        self.progress = own.ProgressReport(self.run.path / "progress.json", self.attempt.number, self.say, every_s)
        options = cli.config_init.checkpoint
        ema = [] if cli.config_init.ema.decay is None else [EMA(cli.config_init.ema, resume)]
        return [
            *([RichProgressBar()] if self.on_terminal else []),
            own.FirstBatch(self.record_first_batch),
            own.StreamPosition(),
            self.guard,
            *self.initial_weights(cli, resume),
            *ema,
            self.progress,
            Checkpointing(
                self.run.checkpoints,
                options,
                resume,
                attempt=self.attempt.number,
                pulse=self.pulse,
                store=self.store,
                is_current=self.is_current,
                is_healthy=self.guard.is_healthy,
                say=self.say,
                facts={
                    "run": self.info.name,
                    "wandb_id": self.info.wandb_id,
                    "strategy": self.sharding.name,
                },
                recipe=self.run.recipe.read_text(),
            ),
            *map(EMAEnd, ema),
        ]

    def initial_weights(self, cli: RecipeCLI, resume: Path | None) -> list[Any]:
        """Return what gives the model its first weights, until there is a checkpoint to continue from."""
        source, prefix = cli.config_init.init_from, cli.config_init.init_prefix
        if resume or not source:
            return []
        from paperscale.training.initial import InitialWeights

        return [InitialWeights(checkpoints.initial(self.run, source), prefix, self.say)]

    def record_first_batch(self, position: int, samples: list[int]) -> None:
        """Record with which samples the attempt begins, and when."""
        self.record(position=position, first_samples=samples, first_batch=time.time())

    def choose_checkpoint(self) -> Path | None:
        """Return the checkpoint to continue from: rank 0 verifies and chooses, the others read its choice.

        Raises:
            UserError: there are checkpoints and none verifies, or rank 0's choice cannot be seen from here.
        """
        choice = self.attempt.path / "resume.json"
        if self.rank == 0:
            chosen = {**self._newest_checkpoint(), "amends": amends.collect(self.run)}
            write_atomically(choice, json.dumps(chosen).encode())
        deadline = time.monotonic() + _RESUME_WAIT_S
        while not choice.exists():
            if time.monotonic() > deadline:
                raise UserError(f"{choice} has not appeared: is {self.run.path} on a file system that all nodes share?")
            time.sleep(0.1)
        content = json.loads(choice.read_text())
        if content["error"]:
            raise UserError(content["error"])
        self.amends: amends.Amends = content["amends"]
        return content["checkpoint"] and Path(content["checkpoint"])

    def _newest_checkpoint(self) -> dict[str, str | None]:
        """Return the newest checkpoint that verifies, or the error that ends the attempt on every rank."""
        clear_unfinished(self.run.checkpoints)
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
        attempts = self.run.attempts()
        return bool(attempts) and attempts[-1].number == self.attempt.number

    def record(self, **facts: Any) -> None:
        """Add facts to the attempt's record (rank 0)."""
        if self.rank == 0:
            try:
                self.attempt.record(**facts)
            except OSError as error:
                self.say(f"WARNING cannot write {self.attempt.path}: {error.strerror}")


if __name__ == "__main__":
    from paperscale.training.callbacks import exit_now
    from paperscale.training.memory import keep_freed_memory

    keep_freed_memory()
    signals.end_with_parent(signal.SIGKILL)  # a rank without its agent is watched by nobody
    keep_stacks(Attempt(Path(sys.argv[1]) / "attempts" / f"{int(sys.argv[2]):04d}"), int(os.environ.get("RANK", 0)))
    code = main(sys.argv[1], int(sys.argv[2]))
    signals.ignore()
    exit_now(code)
