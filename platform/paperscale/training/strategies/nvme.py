"""What ZeRO-3 keeps on a local disk: DeepSpeed holds it in files between steps, and brings in what it works on.

Masters and optimizer state lie there by sub-groups of a group's parameters, each process's share of a weight by
itself. What is too small for a file of its own stays in memory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperscale.errors import UserError

_PREFIX = "paperscale-swap-"
_AHEAD = 4  # weights
_SMALLEST = 1 << 20  # bytes of a file; DeepSpeed keeps what is smaller in memory
_MORE_ROOM = "free some, use more nodes, or name a larger disk in PAPERSCALE_NVME, or in nvme_path of ZeroStrategy"


class SwapFolder:
    """A process's own folder on a local disk, for files that live as long as the process.

    Two processes that shared one would write into each other's weights. What a killed process has left behind is
    removed by the next one that comes: the kernel drops a lock with its holder.

    Args:
        parent: a folder of the disk; variables of the environment are filled in.

    Raises:
        UserError: there is no such folder, or it cannot be written into past the cache, as DeepSpeed does.
    """

    def __init__(self, parent: str):
        place = Path(os.path.expandvars(parent)).expanduser()
        fix = "name a folder of a local disk in PAPERSCALE_NVME, or in nvme_path of ZeroStrategy"
        try:
            with _locked(place):  # else who comes at this moment takes the new folder for one left behind
                for left in place.glob(f"{_PREFIX}*"):
                    _remove_left(left)
                self._folder = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=place, ignore_cleanup_errors=True)
                self._lock = os.open(self._folder.name, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            probe = Path(self._folder.name, "probe")
            os.close(os.open(probe, os.O_CREAT | os.O_RDWR | getattr(os, "O_DIRECT", 0)))
            probe.unlink()
        except OSError as error:
            raise UserError(f"nvme_path={parent} cannot hold what is offloaded: {error.strerror}; {fix}") from error

    @property
    def path(self) -> str:
        """Return the folder."""
        return self._folder.name

    def require(self, size: int) -> None:
        """Check the room, before any process of this machine uses it.

        Args:
            size: bytes that they will write at least.

        Raises:
            UserError: there is less.
        """
        free = shutil.disk_usage(self.path).free
        if free < size:
            raise UserError(
                f"nvme_path: {Path(self.path).parent} has {free / 1e9:.2f} GB free, and {size / 1e9:.2f} or more are "
                f"offloaded to it; {_MORE_ROOM}"
            )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_left(folder: Path) -> None:
    """Remove a folder whose process has ended; another user's stays."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def buffers_for(module: nn.Module, world_size: int) -> dict[str, int]:
    """Return DeepSpeed's options for the memory that weights are read into: numbers of elements and of buffers.

    A module needs all of its weights at once, and a few are read ahead.
    """
    together = max(len(part._parameters) for part in module.modules())
    sizes = (_share(p, world_size) for p in module.parameters())
    return {"buffer_size": max(sizes, default=1), "buffer_count": together + _AHEAD}


def offloaded(parameters: Iterable[Any], world_size: int, element_bytes: int) -> int:
    """Return the bytes of a process's shares that are large enough for a file, at so many bytes for an element."""
    sizes = (_share(p, world_size) * element_bytes for p in parameters)
    return sum(size for size in sizes if size >= _SMALLEST)


def _share(parameter: Any, world_size: int) -> int:
    return -(-getattr(parameter, "ds_numel", parameter.numel()) // world_size)


def check_files(zero: Any, parameters: Iterable[Any]) -> None:
    """Check that files hold what was written into them; DeepSpeed's writer does not notice a full disk.

    Args:
        zero: DeepSpeed's optimizer, if there is one.
        parameters: of the model.

    Raises:
        UserError: one of them does not.
    """
    sizes: dict[str, int] = {}
    for parameter in filter(lies_in_file, parameters):
        path = parameter.nvme_swapper.get_path(parameter, must_exist=True)
        sizes[path] = parameter.ds_tensor.ds_numel * parameter.element_size()
    if zero is not None and zero.swap_optimizer:
        for info in zero.optimizer_swapper.swap_params_info.values():
            sizes.update(dict.fromkeys(info.get_swap_paths(), info.numel() * info.dtype().itemsize))
    for name, size in sizes.items():
        found = path.stat().st_size if (path := Path(name)).exists() else 0
        if found < size:
            raise UserError(f"nvme_path: {path} has {found:,} of {size:,} bytes, the disk is full; {_MORE_ROOM}")


def read_gradients_rightly(swapper: Any) -> None:
    """Let DeepSpeed read gradients also to where no block of the disk can be put: the kernel refuses, it does not look.

    A gradient's place among those of its sub-group follows from the sizes of those before it.

    Args:
        swapper: of DeepSpeed's optimizer.
    """

    def read(aio_handle: Any, parameter: Any, gradient_tensor: Tensor) -> None:
        parts = swapper.swap_params_info[parameter.ds_id].swapped_gradients.values()
        read = [torch.empty(part.length, dtype=gradient_tensor.dtype) for part in parts]  # DeepSpeed aligns these
        for part, tensor in zip(parts, read, strict=True):
            aio_handle.async_pread(tensor, part.path, 0)
        if aio_handle.wait() != len(read):
            raise OSError(f"gradients cannot be read from {swapper.swap_folder}")
        for part, tensor in zip(parts, read, strict=True):
            gradient_tensor.narrow(0, part.offset, part.length).copy_(tensor)

    swapper._swap_in_pinned_gradients = read


def is_swapped(zero: Any, number: int) -> bool:
    """Return whether DeepSpeed's optimizer keeps a sub-group in files."""
    return getattr(zero, "swap_optimizer", False) and zero._swappable_optimizer_subgroup(number)


@contextmanager
def group_in_memory(zero: Any, number: int, write: bool = False) -> Iterator[None]:
    """Have a sub-group's master, and its optimizer state, in memory.

    Args:
        zero: DeepSpeed's optimizer.
        number: of the sub-group.
        write: keep what is changed, and optimizer state that is added.
    """
    if not is_swapped(zero, number):
        yield
        return
    zero._optimizer_states_and_gradient_swap_in(number)
    try:
        yield
    finally:
        if write:
            zero._writeback_swap_state(number, write_opt_state=True, write_gradients=False)
        else:
            zero._release_swap_buffers(number)


def lies_in_file(parameter: Any) -> bool:
    """Return whether this process's share of a weight is kept in a file."""
    return getattr(getattr(parameter, "ds_tensor", None), "final_location", None) == "nvme"


@contextmanager
def weight_in_memory(parameter: Any, write: bool = False) -> Iterator[Tensor]:
    """Yield this process's share of a weight that lies in a file; what is changed is kept if ``write`` is set."""
    swapper = parameter.nvme_swapper
    release_weights([parameter])
    swapper.swap_in([parameter], async_op=False)
    try:
        yield parameter.ds_tensor
    finally:
        if write:
            swapper.swap_out_and_release([parameter])
        else:
            swapper.remove_partition_and_release_buffers([parameter])


def release_weights(parameters: Iterable[Any]) -> None:
    """Forget shares that were read ahead: what is written into the files now is what comes next."""
    for parameter in filter(lies_in_file, parameters):
        if parameter.ds_tensor.status.name == "INFLIGHT":
            parameter.nvme_swapper.synchronize_reads()
        if parameter.ds_tensor.status.name == "AVAILABLE":
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
