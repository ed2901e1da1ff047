"""ZeRO: DeepSpeed divides optimizer state (stage 1), gradients (2) and weights (3) over the processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils import swap_tensors

from paperscale.errors import UserError
from paperscale.training.memory import freed_at_once
from paperscale.training.operators import prepare
from paperscale.training.pieces import Piece, piece_of
from paperscale.training.precision import MIXED, TRUE
from paperscale.training.strategies.batchnorm import normalise_in_32_bits
from paperscale.training.strategies.nvme import (
    SwapFolder,
    buffers_for,
    check_files,
    group_in_memory,
    is_swapped,
    lies_in_file,
    offloaded,
    read_gradients_rightly,
    release_weights,
    weight_in_memory,
)
from paperscale.training.strategies.portable import (
    PortableStrategy,
    check_count,
    is_piece,
    merged_groups,
    numbers_of,
    settings_of,
)
from paperscale.training.tensorfile import TensorReader

Place = Literal["cpu", "nvme"]
_MB = 1 << 20
_WHOLE = 10**12  # elements of a sub-group: all of a parameter group
_DTYPES = {name: dtype for name, dtype in {**MIXED, **TRUE}.items() if dtype.itemsize == 2}
"""Types of the model's own weights; the optimizer works on 32-bit masters."""


@dataclass(frozen=True)
class _Fragment:
    """What a flat partition of this rank holds of one parameter: ``size`` elements from ``start`` on, at ``at``."""

    name: str
    shape: tuple[int, ...]
    start: int
    at: int
    size: int

    def piece(self, name: str, flat: Tensor) -> Piece:
        return Piece(name, self.shape, self.start, flat.detach().narrow(0, self.at, self.size))


class ZeroStrategy(PortableStrategy, DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, on CPUs as well.

    Args:
        stage: of ZeRO.
        offload_optimizer: where the optimizer's state lies and is computed on, if not on the device.
        offload_parameters: where the weights lie while they are not needed (stage 3).
        nvme_path: folder of a local disk for ``nvme`` (stage 3), by default ``$PAPERSCALE_NVME``, else
            ``/local_nvme``; variables of the environment are filled in.
        bucket_mb: MiB of gradients that are reduced, of weights that are gathered, and of masters that are brought in
            from NVMe, at once.
        overlap: reduce gradients while the backward pass goes on.
        on_gpu: whether the job computes on GPUs; by default where there are any.

    Raises:
        UserError: ``nvme`` is asked for at another stage than 3.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload_optimizer: Place | None = None,
        offload_parameters: Place | None = None,
        nvme_path: str | None = None,
        bucket_mb: int = 200,
        overlap: bool = True,
        on_gpu: bool | None = None,
    ):
        self.nvme_path = nvme_path or os.environ.get("PAPERSCALE_NVME", "/local_nvme")
        self.on_nvme = "nvme" in (offload_optimizer, offload_parameters)
        if self.on_nvme and stage < 3:  # DeepSpeed would use the CPU without a word
            raise UserError(f"ZeroStrategy: stage {stage} offloads to the CPU alone; use stage: 3 or cpu for nvme")
        if bucket_mb < 1:
            raise UserError(f"ZeroStrategy: bucket_mb={bucket_mb}: give 1 MiB or more, such as 200")
        if offload_parameters is not None and stage < 3:
            raise UserError(
                f"ZeroStrategy: stage {stage} does not divide weights; leave offload_parameters out, or use stage: 3"
            )
        prepare(on_gpu=torch.cuda.is_available() if on_gpu is None else on_gpu)
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer is not None,
            offload_optimizer_device=offload_optimizer or "cpu",
            offload_parameters=offload_parameters is not None,
            offload_params_device=offload_parameters or "cpu",
            remote_device=offload_parameters,
            nvme_path=self.nvme_path,
            overlap_comm=overlap,
            reduce_bucket_size=bucket_mb * _MB // 4,
            allgather_bucket_size=bucket_mb * _MB // 4,
            max_in_cpu=0,
            sub_group_size=bucket_mb * _MB // 4 if offload_optimizer == "nvme" else _WHOLE,
        )
        assert isinstance(self.config, dict)  # noqa: S101  made by Lightning from these
        self.config["zero_force_ds_cpu_optimizer"] = False  # torch's own fused optimizers are as fast on CPUs
        self.stage = stage
        self.keeps_pieces = not self.on_nvme
        self._copies: dict[Tensor, Tensor] = {}  # of what lies in files, for pieces
        self._dropping = False
        self._configured: Any = None
        self._folder: Any = None

    # -- DeepSpeed on CPUs: what Lightning admits on CUDA alone ------------------------------------------------

    def setup_environment(self) -> None:
        """Join the other processes."""
        if self.on_nvme:
            prepare(["async_io"], self.root_device.type == "cuda")
            self._folder = self._folder or SwapFolder(self.nvme_path)  # a test after the training reads its weights
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Let DeepSpeed use the process group."""
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """Return this process's device, with a number also on CPUs: DeepSpeed compares it."""
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device

    # -- construction ------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Divide the model; see to what DeepSpeed does not."""
        assert self.lightning_module is not None  # noqa: S101
        if self.on_nvme:
            self._offload_into_folder(self.lightning_module, trainer.state.fn == TrainerFn.FITTING)
            if not any(hasattr(p, "ds_id") for p in self.lightning_module.parameters()):
                self.initial = self.initial or _itself  # on CPUs, DeepSpeed would divide a whole model as bfloat16
        if self.initial is not None:
            if trainer.state.fn == TrainerFn.FITTING:  # now, while parameters have their shapes: groups go by them
                self._configured = super()._init_optimizers()
            with freed_at_once():
                self._materialise(self.lightning_module)
        if str(self.precision_plugin.precision) in _DTYPES:
            normalise_in_32_bits(self.lightning_module)
        if trainer.state.fn != TrainerFn.FITTING:
            self.optimizers = []  # of the training before, which an evaluation does not set up again
        super().setup(trainer)
        self.initial = None
        if self.optimizers:
            self._share_norms()
            if self.on_nvme and self.zero.swap_optimizer:
                read_gradients_rightly(self.zero.optimizer_swapper)
            if self.zero.cpu_offload if self.stage < 3 else self.zero.offload_optimizer:
                _fuse(self.zero.optimizer)
            self.zero.step = self._step(self.zero.step)
        self._check_files()

    def _offload_into_folder(self, module: LightningModule, trains: bool) -> None:
        """Tell DeepSpeed where to, see whether there is room, and let its buffers hold the model's weights."""
        assert isinstance(self.config, dict)  # noqa: S101
        options = self.config["zero_optimization"]
        for part in ("offload_optimizer", "offload_param"):
            options.get(part, {}).update(nvme_path=self._folder.path)
        options.get("offload_param", {}).update(buffers_for(module, self.world_size))
        trained = [p for p in module.parameters() if p.requires_grad and trains]
        size = 0
        if options.get("offload_param", {}).get("device") == "nvme":
            size += offloaded(module.parameters(), self.world_size, self._dtype.itemsize)
        if options.get("offload_optimizer", {}).get("device") == "nvme":
            size += 2 * offloaded(trained, self.world_size, 4)  # masters and gradients, whatever the optimizer
        self._folder.require(size * self.num_processes)
        self.barrier()

    def _check_files(self) -> None:
        """See whether all that was offloaded is in its files: DeepSpeed does not look."""
        if self.on_nvme:
            assert self.lightning_module is not None  # noqa: S101
            check_files(self.zero if self.optimizers else None, self.lightning_module.parameters())

    def teardown(self) -> None:
        """Give the device back; a failed setup may have left weights without values, which cannot be moved."""
        module = self.lightning_module
        if module is not None and any(p.is_meta for p in module.parameters()):
            self._lightning_module = None
        super().teardown()
        self._lightning_module = module

    def _init_optimizers(self) -> Any:
        configured, self._configured = self._configured, None
        return configured or super()._init_optimizers()

    @property
    def _dtype(self) -> torch.dtype:
        """Return the type of the model's own weights."""
        return _DTYPES.get(str(self.precision_plugin.precision), torch.float32)

    def _materialise(self, module: LightningModule) -> None:
        """Give weights their values, one module at a time, and divide them at once."""
        import deepspeed

        assert self.initial is not None  # noqa: S101  who builds on the meta device knows the values
        self._init_config_if_needed()
        swapper = None  # one for all weights: making another empties the folder
        for part in module.modules():
            for parameter in part.parameters(recurse=False):
                value = self.initial(parameter).detach().to(self._dtype)
                if parameter.is_meta:  # the optimizer holds this very object
                    swap_tensors(parameter, nn.Parameter(value, parameter.requires_grad))
                else:
                    parameter.data = value
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self.initial(buffer)
            if not list(part.children()):
                swapper = deepspeed.zero.Init(
                    module=part,
                    config_dict_or_path=self.config,
                    remote_device=self.remote_device,
                    param_swapper=swapper,
                ).param_swapper

    def _share_norms(self) -> None:
        """Let optimizers that look at whole parameters (LAMB, LARS) know what their flat partitions hold."""
        divide = getattr(self.zero.optimizer, "divide", None)
        if divide is None:
            return
        from paperscale.nn.optimizers import Segment

        numbers = {name: number for number, name in enumerate(self.parameter_names().values())}
        segments: dict[Tensor, list[Segment]] = {flat: [] for flat in self._flats()}
        for number, flat in enumerate(self._flats()):
            for part in self._fragments(number):
                segments[flat].append(Segment(part.at, part.at + part.size, numbers[part.name]))

        def reduce(values: Tensor) -> Tensor:
            total = values.to(self.root_device)
            dist.all_reduce(total)
            return total.to(values.device)

        divide(segments, len(numbers), reduce)

    # -- what lies where ---------------------------------------------------------------------------------------

    @property
    def zero(self) -> Any:
        """Return DeepSpeed's optimizer, which holds the flat partitions."""
        return self.deepspeed_engine.optimizer

    def _flats(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _groups_of_flats(self) -> list[int]:
        """Return the parameter group of each flat partition."""
        flats = range(len(self._flats()))
        return [self.zero.sub_group_to_group_id[i] for i in flats] if self.stage == 3 else list(flats)

    def _parameters_of_flats(self) -> list[list[nn.Parameter]]:
        """Return the parameters that each flat partition holds something of, on this rank or another."""
        return self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups

    def _fragments(self, number: int) -> Iterator[_Fragment]:
        """Yield what a flat partition is made of."""
        names = self.parameter_names()
        parameter: Any
        for parameter in self._parameters_of_flats()[number]:
            place = self._place_3(parameter) if self.stage == 3 else self._place(parameter)
            if place is not None:
                shape = tuple(parameter.ds_shape if self.stage == 3 else parameter.shape)
                yield _Fragment(names[id(parameter)], shape, *place)

    def _master(self, number: int) -> Tensor:
        """Return a flat partition, or a copy of one that lies in a file, for :meth:`weights_changed` to write back."""
        flat = self._flats()[number]
        if not is_swapped(self.zero, number):
            return flat
        if flat not in self._copies:
            with group_in_memory(self.zero, number):
                self._copies[flat] = flat.detach().clone()
        return self._copies[flat]

    def _place(self, parameter: Any) -> tuple[int, int, int] | None:
        """Return which elements this rank holds (first, position in the flat partition, number), stages 1 and 2."""
        if (held := parameter._hp_mapping) is None:
            return None
        return held.lp_fragment_address.start, held.hp_fragment_address.start, held.hp_fragment_address.numel

    def _place_3(self, parameter: Any) -> tuple[int, int, int] | None:
        """Return the same for stage 3, where each parameter is divided evenly and padded at its end."""
        _, at, padded = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = padded * self.global_rank
        size = min(padded, parameter.ds_numel - start)
        return (start, at, size) if size > 0 else None

    def parameter_pieces(self) -> list[Piece]:
        """Return this rank's fp32 masters; weights that are not trained as the model holds them."""
        assert self.lightning_module is not None  # noqa: S101
        if not self.optimizers:
            return [self._untrained(f"model/{name}", p) for name, p in self.lightning_module.named_parameters()]
        masters = [
            fragment.piece(f"model/{fragment.name}", self._master(number))
            for number in range(len(self._flats()))
            for fragment in self._fragments(number)
        ]
        trained = {id(p) for p in self._trained()}
        frozen = [(name, p) for name, p in self.lightning_module.named_parameters() if id(p) not in trained]
        return [*masters, *(self._untrained(f"model/{name}", p) for name, p in frozen)]

    def _trained(self) -> Iterator[nn.Parameter]:
        return chain.from_iterable(self._parameters_of_flats())

    def _untrained(self, name: str, parameter: Any) -> Piece:
        if not hasattr(parameter, "ds_tensor"):
            return piece_of(name, parameter)
        padded = parameter.ds_tensor.ds_numel
        start = min(padded * self.global_rank, parameter.ds_numel)
        size = min(padded, parameter.ds_numel - start)
        share = self._share(parameter).data.view(-1).narrow(0, 0, size)
        return Piece(name, tuple(parameter.ds_shape), start, share)

    def _share(self, parameter: Any) -> Tensor:
        """Return what this rank holds of a weight that is not trained, or a copy of it if it lies in a file."""
        if not lies_in_file(parameter):
            return parameter.ds_tensor
        if parameter not in self._copies:
            with weight_in_memory(parameter) as share:
                self._copies[parameter] = share.detach().clone()
        return self._copies[parameter]

    def weights_changed(self) -> None:
        """Copy the masters into the model's weights, and gather these."""
        if self.stage == 3:
            self._write_shares()
        if not self.optimizers:
            return
        zero = self.zero
        if self.stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        release_weights(self._trained())
        for number, flat in enumerate(self._flats()):
            copy = self._copies.pop(flat, None)
            with group_in_memory(zero, number, write=copy is not None):
                if copy is not None:
                    flat.data.copy_(copy)
                zero._reassign_or_swap_out_partitioned_parameters(number)
        self._check_files()
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _write_shares(self) -> None:
        """Write copies of weights that are not trained back."""
        assert self.lightning_module is not None  # noqa: S101
        for parameter in self.lightning_module.parameters():
            copy = self._copies.pop(parameter, None)
            if copy is not None:
                with weight_in_memory(parameter, write=True) as share:
                    share.copy_(copy)

    # -- accumulation ------------------------------------------------------------------------------------------

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass on a loss that Lightning has divided by the number of micro-batches: once is enough."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step after the last micro-batch; the others are only counted, and no hook takes them for a step."""
        if self.deepspeed_engine.is_gradient_accumulation_boundary():
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        result = closure()
        self.deepspeed_engine.step()
        return result

    # -- gradients ---------------------------------------------------------------------------------------------

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of all gradients before clipping, infinite if one of them is not finite."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero = self.zero
        scaled = combine_grad_norm_groups(zero._get_norm_groups()) if self.stage == 3 else zero.scaled_global_norm()
        norm = torch.as_tensor(scaled, dtype=torch.float32, device=self.root_device) / zero.loss_scale
        return torch.where(norm < 0, torch.full_like(norm, float("inf")), norm)  # DeepSpeed says -1 for not finite

    def drop_gradients(self) -> None:
        """Let this optimizer step change nothing."""
        self._dropping = True

    def _step(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return DeepSpeed's step, which drops gradients as it does itself when they overflow."""

        def stepped() -> None:
            self._copies.clear()
            if not self._dropping:
                step()
                self._check_files()
                return
            self._dropping = False
            zero = self.zero
            zero.overflow = True
            if self.stage == 3:
                if zero.swap_optimizer:
                    zero.optimizer_swapper.flush_gradients()
                zero._pre_step()
                zero._partition_all_parameters()
                zero._overflow_clean_up(zero.loss_scale)
                zero._post_step(set())
                return
            zero.zero_grad(set_to_none=True)
            zero._release_preflattened_grad_buffers()
            if zero.cpu_offload:
                zero.reset_cpu_buffers()
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None

        return stepped

    def loss_scaling(self) -> dict[str, float] | None:
        """Return DeepSpeed's scale of the loss under fp16."""
        scaler = getattr(self.zero, "loss_scaler", None) if self.optimizers else None
        if scaler is None or not hasattr(scaler, "cur_iter"):
            return None
        return {"scale": float(scaler.cur_scale), "good_steps": scaler.cur_iter - scaler.last_overflow_iter - 1}

    def restore_loss_scaling(self, saved: dict[str, float] | None) -> None:
        """Continue with a scale of the loss that any strategy has found."""
        scaler = getattr(self.zero, "loss_scaler", None)
        if scaler is not None and hasattr(scaler, "cur_iter") and saved:
            scaler.cur_scale = saved["scale"]
            scaler.cur_iter = scaler.last_overflow_iter + 1 + int(saved["good_steps"])

    # -- optimizer ---------------------------------------------------------------------------------------------

    def optimizer_pieces(self) -> list[Piece]:
        """Return what this rank holds of the optimizer's state."""
        found = []
        for number, flat in enumerate(self._flats()):
            with group_in_memory(self.zero, number):
                state = {
                    key: value for key, value in self.zero.optimizer.state.get(flat, {}).items() if is_piece(value)
                }
                if is_swapped(self.zero, number):
                    state = {key: value.clone() for key, value in state.items()}
            found += [
                fragment.piece(f"optimizer0/{fragment.name}/{key}", value)
                for fragment in self._fragments(number)
                for key, value in state.items()
            ]
        return found

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Keep what Lightning wants to save; the pieces are copied by now."""
        self._copies.clear()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def optimizer_settings(self) -> list[dict[str, Any]]:
        """Return the optimizer's class, groups and numbers, as if it worked on the model's parameters."""
        if not self.optimizers:
            return []
        names, base = self.parameter_names(), self.zero.optimizer
        numbers = {
            names[id(p)]: numbers_of(base.state.get(flat, {}))
            for flat, parameters in zip(self._flats(), self._parameters_of_flats(), strict=True)
            for p in parameters
        }
        groups = [
            settings_of(group, held) for group, held in zip(base.param_groups, self._names_of_groups(), strict=True)
        ]
        return [{"class": type(base).__name__, "groups": groups, "numbers": numbers}]

    def _names_of_groups(self) -> list[list[str]]:
        """Return the names of each group's parameters, in the model's order."""
        names = self.parameter_names()
        order = {name: number for number, name in enumerate(names.values())}
        held: list[list[str]] = [[] for _ in self.zero.optimizer.param_groups]
        for group, parameters in zip(self._groups_of_flats(), self._parameters_of_flats(), strict=True):
            held[group] += [names[id(p)] for p in parameters]
        return [sorted(group, key=order.__getitem__) for group in held]

    def restore_optimizers(self, reader: TensorReader, saved: list[dict[str, Any]]) -> None:
        """Read the optimizer's state into the flat partitions.

        Raises:
            UserError: the optimizer is not that of the checkpoint.
        """
        check_count(reader, saved, 1)
        settings, base = saved[0], self.zero.optimizer
        names = self.parameter_names()
        for group, merged in zip(
            base.param_groups, merged_groups(reader, base, settings, self._names_of_groups()), strict=True
        ):
            group.update({key: value for key, value in merged.items() if key != "params"})
        if self.stage == 3 and self.zero.swap_optimizer:
            self.zero.optimizer_swapper.purge_state()  # files of a state that is replaced
        for number, (flat, parameters) in enumerate(zip(self._flats(), self._parameters_of_flats(), strict=True)):
            held = [names[id(p)] for p in parameters]
            with group_in_memory(self.zero, number, write=True):
                base.state[flat] = self._read_state(reader, number, held)
                for numbers in (settings["numbers"].get(name) for name in held[:1]):
                    base.state[flat].update(_as_kept_by(base, numbers or {}))
        self._check_files()

    def _read_state(self, reader: TensorReader, number: int, held: list[str]) -> dict[str, Any]:
        """Return the state of a flat partition, which holds something of these parameters."""
        flat = self._flats()[number]
        keys = {key.rpartition("/")[2] for name in held for key in reader.names_of(f"optimizer0/{name}/")}
        state = {key: torch.zeros_like(flat) for key in sorted(keys)}
        for fragment in self._fragments(number):
            for key, value in state.items():
                reader.fill(fragment.piece(f"optimizer0/{fragment.name}/{key}", value))
        return state


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer on the CPU use its fused kernel, where torch has one: a tenth of the time."""
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)):
        for group in optimizer.param_groups:
            group.update(fused=True, foreach=False)


def _as_kept_by(optimizer: Any, numbers: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's numbers as its class keeps them: DeepSpeed's own count steps in integers."""
    if not type(optimizer).__module__.startswith("deepspeed"):
        return numbers
    return {key: int(value) if isinstance(value, Tensor) else value for key, value in numbers.items()}
