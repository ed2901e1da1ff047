"""DeepSpeed's operators: compiled once for a kind of machine, under a lock that cannot go stale.

DeepSpeed compiles its C++ and CUDA code where it is first used, through torch, whose lock is the mere existence of a
file: a build that is killed leaves it behind, and every later job waits for it without a word. Here one process
compiles, in a folder of its own, under a lock of the kernel's that ends with the process; it says so; and the library
appears under its name at once and complete. Jobs load that library directly: they need neither a compiler nor torch's
lock.

ZeRO itself needs no operator. On the CPU, DeepSpeed would compile one for all-reduces in shared memory at every first
start; training never calls it (gloo reduces), so it is switched off. For offload to the CPU, torch's fused AdamW is as
fast as DeepSpeed's CPUAdam. What remains are DeepSpeed's own optimizers, and offload to NVMe (``async_io``).

Standard library only, until :func:`prepare` is called.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from paperscale.errors import UserError

Say = Callable[[str], None]

USEFUL = {
    "cpu": ("cpu_adam", "cpu_adagrad", "cpu_lion", "async_io"),
    "cuda": ("cpu_adam", "cpu_adagrad", "cpu_lion", "async_io", "fused_adam", "fused_lamb", "fused_lion"),
}
"""The operators that training can use, by accelerator: DeepSpeed's optimizers, and offload to NVMe."""

_FIND = """
import json, logging, sys
logging.disable()
from deepspeed.ops.op_builder import cpu
from deepspeed.ops.op_builder.all_ops import ALL_OPS
host = [cpu.CPUAdamBuilder(), cpu.CPUAdagradBuilder(), cpu.CPULionBuilder()]
builders = {builder.name: builder for builder in (*host, *ALL_OPS.values())}
"""
_ACCELERATOR = "import os, torch; os.environ['DS_ACCELERATOR'] = 'cuda' if torch.cuda.is_available() else 'cpu'"
_COMPATIBLE = "print(json.dumps({name: bool(op.is_compatible(verbose=False)) for name, op in builders.items()}))"
_COMPILE = """
import os, signal, threading
def end_with_parent():  # the pipe is closed when the process that writes to it dies; ninja ends its compilers
    sys.stdin.read()
    os.killpg(0, signal.SIGTERM)
threading.Thread(target=end_with_parent, daemon=True).start()
builders[sys.argv[1]].load(verbose=False)
"""
_COMPILER_BYTES = 2300 << 20
"""Memory of one run of the compiler over DeepSpeed's sources: 2.1 GiB were measured."""
_BEAT_S = 15.0
_NEEDS = {"async_io": "install libaio with its headers (Debian: libaio-dev, Red Hat: libaio-devel)"}
_NEEDS_CUDA = "install the CUDA toolkit (nvcc) of the version that torch is built for"


def root() -> Path:
    """Return where operators are kept: ``$PAPERSCALE_OPERATORS``, else a folder of the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PAPERSCALE_OPERATORS") or cache / "paperscale" / "operators").expanduser()


def folder(accelerator: str) -> Path:
    """Return where the operators for machines like this one are kept: they are compiled for its very processor.

    Args:
        accelerator: ``cpu`` or ``cuda``; some operators have the same name for both.
    """
    versions = [f"{name}{importlib.metadata.version(name)}" for name in ("torch", "deepspeed")]
    kind = hashlib.sha256("\n".join([platform.machine(), *_processor(), *_gpus(accelerator)]).encode())
    return root() / "-".join([*versions, str(sys.implementation.cache_tag), accelerator, kind.hexdigest()[:12]])


def _processor() -> list[str]:
    """Return the instruction sets of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return sorted(found.split())


def _gpus(accelerator: str) -> list[str]:
    """Return the kinds of GPU that the driver knows; code is compiled for those that are there."""
    paths = Path("/proc/driver/nvidia/gpus").glob("*/information") if accelerator == "cuda" else []
    lines = [line for path in paths for line in path.read_text().splitlines()]
    return sorted({line for line in lines if line.startswith("Model")})


def library(name: str, accelerator: str) -> Path:
    """Return the file of an operator, there or not."""
    return folder(accelerator) / f"{name}.so"


def built(accelerator: str) -> list[str]:
    """Return the operators that need not be compiled any more."""
    return sorted(_installed(accelerator) | {path.stem for path in folder(accelerator).glob("*.so")})


def _installed(accelerator: str) -> set[str]:
    """Return what was compiled when DeepSpeed was installed (``DS_BUILD_OPS``); reads a file of it, imports nothing."""
    spec = importlib.util.find_spec("deepspeed")
    path = Path(spec.origin if spec and spec.origin else "nowhere").with_name("git_version_info_installed.py")
    values: dict[str, Any] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, value = line.partition("=")
        with contextlib.suppress(ValueError, SyntaxError):
            values[name.strip()] = ast.literal_eval(value.strip())
    mine = values.get("accelerator_name") == accelerator
    return {name for name, done in values.get("installed_ops", {}).items() if done and mine}


def compatible() -> tuple[str, dict[str, bool]]:
    """Ask DeepSpeed, in a process of its own, which operators this machine can compile and use.

    Returns:
        The accelerator, and for each useful operator whether it can be had here.

    Raises:
        UserError: DeepSpeed cannot be imported.
    """
    program = "\n".join([_ACCELERATOR, _FIND, _COMPATIBLE, "print(os.environ['DS_ACCELERATOR'])"])
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=55, env=_environment())
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"deepspeed cannot be imported: {reason}; pip install 'paperscale[deepspeed]'")
    *_, answer, accelerator = result.stdout.splitlines()
    fits = json.loads(answer)
    return accelerator, {name: fits.get(name, False) for name in USEFUL[accelerator]}


def prepare(needed: Iterable[str] = (), on_gpu: bool = False, say: Say = print) -> None:
    """Import DeepSpeed so that it compiles nothing behind our back; every rank calls this before its first use.

    Operators that are needed are compiled by the rank that comes first, while the others of the node wait. One that
    turns out to be needed later is compiled in the same way.

    Args:
        needed: operators, such as ``cpu_adam``.
        on_gpu: whether the job computes on GPUs.
        say: prints a line; called in the first process of a node alone, which builds or waits for who does.

    Raises:
        UserError: DeepSpeed is not installed, or an operator cannot be compiled.
    """
    accelerator = "cuda" if on_gpu else "cpu"
    os.environ["DS_ACCELERATOR"] = accelerator
    if int(os.environ.get("LOCAL_RANK", 0)):
        say = _silent
    warnings.filterwarnings("ignore", "`torch.distributed.[a-z_]+_tensor` is deprecated", FutureWarning)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"deepspeed cannot be imported ({error}); pip install 'paperscale[deepspeed]'") from error
    from deepspeed.ops.op_builder.builder import OpBuilder

    if not on_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    build(needed, accelerator, say)

    def jit_load(builder: Any, verbose: bool = True) -> ModuleType:
        build([builder.name], accelerator, say)
        return _imported(builder.name, library(builder.name, accelerator))

    OpBuilder.jit_load = jit_load  # what OpBuilder.load() calls for all that was not compiled at installation


def _silent(line: str) -> None:
    """Say nothing."""


@functools.cache
def _imported(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(names: Iterable[str], accelerator: str, say: Say = print) -> None:
    """Compile the operators that are not compiled yet; waits for another process that is at it.

    Args:
        names: operators, such as ``cpu_adam``.
        accelerator: ``cpu`` or ``cuda``.
        say: prints a line.

    Raises:
        UserError: there is no compiler, memory is short, the folder cannot be written or locked, or the compiler fails.
    """
    names = list(names)
    todo = [name for name in names if name not in built(accelerator)] if names else []
    if not todo:
        return
    place = folder(accelerator)
    with _locked(place, say):
        for name in todo:
            if not library(name, accelerator).exists():  # nobody has built it while this process waited
                _build(name, accelerator, place, say)


@contextlib.contextmanager
def _locked(place: Path, say: Say) -> Iterator[None]:
    """Hold the lock of a folder: the kernel drops it when the process ends, however it ends.

    Linux passes ``flock`` on to NFS servers, so it holds between nodes too, unless mounted with ``-o nolock``. There
    two nodes would both compile, each in a folder that bears its name, and the second would replace an equal file.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = (place / ".lock").open("a+")
    except OSError as error:
        fix = "set PAPERSCALE_OPERATORS to a folder that you may write to"
        raise UserError(f"{place} cannot hold DeepSpeed's operators: {error.strerror}; {fix}") from error
    with file:
        _acquire(file, say)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _acquire(file: IO[str], say: Say) -> None:
    beat = _Beat(say)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            beat(f"waiting for {file.read() or 'another process'}, which builds DeepSpeed's operators")
            time.sleep(0.2)
        except OSError as error:
            fix = "set PAPERSCALE_OPERATORS to a folder on a local disk"
            raise UserError(f"{file.name} cannot be locked: {error.strerror}; {fix}") from error
        else:
            return


class _Beat:
    """Says a line at once, and again every :data:`_BEAT_S` seconds with the time that has passed."""

    def __init__(self, say: Say):
        self.say, self.began, self.last = say, time.monotonic(), -_BEAT_S

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if now - self.last >= _BEAT_S:
            passed = now - self.began
            self.say(line if passed < 1 else f"{line} ({passed:.0f} s)")
            self.last = now


def _build(name: str, accelerator: str, place: Path, say: Say) -> None:
    """Compile one operator; called by the process that holds the lock."""
    prefix = f".build-{socket.gethostname()}-"
    for left in place.glob(f"{prefix}*"):  # by a build that was killed
        shutil.rmtree(left, ignore_errors=True)
    processes = _processes(name)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=place, prefix=prefix, ignore_cleanup_errors=True) as folder_of_build:
        work = Path(folder_of_build)
        environment = _environment(TORCH_EXTENSIONS_DIR=str(work), DS_ACCELERATOR=accelerator, MAX_JOBS=str(processes))
        code = _compile(name, work, environment, say)
        if code:
            raise UserError(_reason(name, code, (work / "log").read_text(errors="replace"), place))
        for made in work.glob("*/*.so"):  # async_io comes with pin_memory, which it is loaded upon
            with made.open("rb") as file:
                os.fsync(file.fileno())
            made.replace(place / made.name)
    say(f"built DeepSpeed's {name} in {time.monotonic() - began:.0f} s: {library(name, accelerator)}")


def compiler() -> str | None:
    """Return the C++ compiler that torch calls (``$CXX``, else ``c++``), or ``None`` where there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def _processes(name: str) -> int:
    """Return how many compilers may run beside each other.

    Raises:
        UserError: there is no compiler, or not enough memory for one.
    """
    if compiler() is None:
        fix = "install g++, or name a compiler in CXX, and run `paperscale doctor --build`"
        raise UserError(f"DeepSpeed's {name} must be compiled, and there is no C++ compiler; {fix}")
    free = free_memory()
    if free < _COMPILER_BYTES:
        fix = "run `paperscale doctor --build` once where there is more, on a machine of the same kind"
        need = f"{_COMPILER_BYTES / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free"
        raise UserError(f"DeepSpeed's {name} must be compiled, which needs {need}; {fix}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, free // _COMPILER_BYTES)


def free_memory() -> int:
    """Return the bytes that processes here may still take: of the machine, its control groups and the SLURM job."""
    if not Path("/proc/meminfo").exists():  # not Linux, which alone has control groups
        return sys.maxsize
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    found = [int(meminfo["MemAvailable"].split()[0]) << 10]
    job = {key: int(os.environ.get(f"SLURM_{key}") or 0) for key in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE")}
    megabytes = job["MEM_PER_NODE"] or job["MEM_PER_CPU"] * job["CPUS_ON_NODE"]
    found += [megabytes << 20] if megabytes else []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers:
            top, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        path = top / name.lstrip("/")
        for group in (path, *path.parents):
            with contextlib.suppress(OSError, ValueError):  # "max", or no limit at this level
                found.append(int((group / limit).read_text()) - int((group / usage).read_text()) + _cached(group))
    return max(0, min(found))


def _cached(group: Path) -> int:
    """Return the bytes of files that a control group would give back."""
    lines = (group / "memory.stat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "total_inactive_file"))


def _environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that compiles: ninja lies beside Python, where a shell may not look."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, **more}


def _compile(name: str, work: Path, environment: dict[str, str], say: Say) -> int:
    """Let DeepSpeed compile an operator below ``work``, its output in ``work/log``; return the exit code."""
    beat = _Beat(say)
    command = [sys.executable, "-c", _FIND + _COMPILE, name]
    pipe = subprocess.PIPE
    with (work / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=pipe, stdout=log, stderr=log, env=environment, start_new_session=True)
    with process:  # closes the pipe at an exception of ours, and waits
        while True:
            beat(f"building DeepSpeed's {name}: some minutes, once for machines of this kind")
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(1.0)


def build_useful(say: Say = print) -> None:
    """Compile all that training can use on this machine and that is not compiled yet.

    Raises:
        UserError: DeepSpeed is not installed, or an operator cannot be compiled.
    """
    accelerator, fits = compatible()
    build([name for name, fit in fits.items() if fit], accelerator, say)


def _reason(name: str, code: int, output: str, place: Path) -> str:
    """Return why an operator could not be compiled, ending in the fix."""
    kept = place / f"{name}.log"
    kept.write_text(output)
    what = f"DeepSpeed's {name} cannot be compiled"
    if "Killed" in output or code == -signal.SIGKILL:
        return f"{what}: the compiler was killed, for want of memory as a rule; ask for more and run it again ({kept})"
    if "not being compatible" in output:
        fix = _NEEDS.get(name, _NEEDS_CUDA)
        return f"{what} on this machine; {fix}"
    lines = [line.strip() for line in output.splitlines() if "error: " in line] or output.splitlines()[-1:]
    return f"{what}: {(lines or ['no reason given'])[0][:200]}; see {kept}, mend what it names and run it again"


def torch_folders() -> list[Path]:
    """Return where torch keeps the extensions that others let it compile, a folder each with ``<name>.so`` in it."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return [path for path in Path(chosen).glob("*") if path.is_dir()]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return [path for path in (cache / "torch_extensions").glob("*/*") if path.is_dir()]  # <Python and CUDA>/<name>


def torch_locks() -> list[Path]:
    """Return torch's locks of extensions that are being compiled, or were when their process died."""
    return [path / "lock" for path in torch_folders() if (path / "lock").exists()]
