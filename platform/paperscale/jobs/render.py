"""From a run and a cluster's profile to the job script."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from paperscale import __version__, assets, errors
from paperscale.errors import UserError
from paperscale.jobs.profile import Profile, Share, config_dir
from paperscale.jobs.run import EXCLUDED_S, RunInfo, runs_dir

MAIN = "job.sbatch.j2"


def render(
    info: RunInfo, profile: Profile, extra: Mapping[str, str | int] | None = None, mounts: Sequence[str] = ()
) -> str:
    """Return the job script.

    Args:
        info: the run.
        profile: its cluster, with what was asked for in place of the profile's defaults.
        extra: further ``#SBATCH`` options by name, which win over ours; an empty text is an option without value.
        mounts: folders of data that a container needs, at the same path inside.

    Raises:
        UserError: a path cannot be written into the script, or a template of the user's is wrong.
    """
    run_dir = runs_dir() / info.name
    folders = (Path("cluster/templates").absolute(), config_dir() / "templates", assets.cluster_dir() / "templates")
    templates = _templates(folders)
    try:
        text = templates.get_template(MAIN).render(
            run=info,
            profile=profile,
            share=profile.share,
            run_dir=str(run_dir),
            options=options(info, profile, run_dir, extra),
            mounts=_mounts(info, profile, run_dir, mounts),
            environment=_environment_names(profile),
            python=profile.python or ("python" if profile.container else sys.executable),
            threads=_threads(info, profile),
            codes=errors,
            excluded_s=EXCLUDED_S,
            version=__version__,
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{error.filename}: line {error.lineno}: {error.message}; mend the template") from error
    except jinja2.TemplateError as error:
        if not (theirs := _users_templates(templates)):
            raise
        raise UserError(f"{', '.join(theirs)}: {error}; mend the template") from error
    first, newline, rest = text.partition("\n")
    theirs = _users_templates(templates)
    text = first + newline + "".join(f"# from your template {path}\n" for path in theirs) + rest
    if theirs:
        _check_syntax(text, theirs)
    return text


def _check_syntax(text: str, theirs: Sequence[str]) -> None:
    """Let bash read the script, where there is one.

    Raises:
        UserError: it is no script; names bash's line and the user's templates.
    """
    if (bash := shutil.which("bash")) is None:
        return
    read = subprocess.run([bash, "-n"], input=text, capture_output=True, text=True)
    if read.returncode:
        said = " ".join(line.removeprefix("bash: ") for line in read.stderr.replace(f"{bash}: ", "").splitlines())
        raise UserError(f"{', '.join(theirs)}: bash cannot read the script, {said}; mend the template")


@functools.cache  # a sweep renders many scripts from the same templates
def _templates(folders: tuple[Path, ...]) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  a shell script, quoted by the filters
    )
    environment.filters |= {"q": shlex.quote, "expand": expand, "line": _line}
    return environment


def _users_templates(templates: jinja2.Environment) -> list[str]:
    """Return the templates that stand in for ours."""
    ours = (assets.cluster_dir() / "templates").resolve()
    found = [templates.get_template(path.name).filename for path in sorted(ours.glob("*.j2"))]
    return [path for path in found if path and Path(path).resolve().parent != ours]


def _line(text: str) -> str:
    """Return a text as one line, for a comment."""
    return " ".join(text.split())


def expand(text: str) -> str:
    """Quote a text for the shell, in which only ``$NAME`` and ``${NAME}`` stand for what the job has."""
    parts = re.split(r"(\$[A-Za-z_]\w*|\$\{[A-Za-z_]\w*\})", text, flags=re.ASCII)
    if len(parts) == 1:
        return shlex.quote(text)
    literal = [re.sub(r'([\\"`$])', r"\\\1", part) for part in parts[::2]]
    return '"' + "".join(a + b for a, b in zip(literal, [*parts[1::2], ""], strict=True)) + '"'


def _mounts(info: RunInfo, profile: Profile, run_dir: Path, data: Sequence[str]) -> list[str]:
    """Return what a container sees of the node, each once; the folders inside another come with it."""
    if profile.container is None:
        return []
    own = list(dict.fromkeys([info.workdir, str(run_dir), *data]))
    for path in own:
        if re.search(r"[,:]", path):
            raise UserError(f"{path}: a container cannot mount a path with ',' or ':'; use a folder without")
    mounts = [path for path in own if not any(path != other and Path(path).is_relative_to(other) for other in own)]
    mounts += ["$scratch"] if profile.scratch else []
    return [mount if ":" in mount else f"{mount}:{mount}" for mount in [*mounts, *profile.container.mounts]]


def _environment_names(profile: Profile) -> list[str]:
    """Return the variables that must reach the processes, whatever a container's image sets."""
    ours = ["PYTHONPATH", "PYTHONUNBUFFERED", "OMP_NUM_THREADS"]
    return list(dict.fromkeys([*ours, *profile.variables]))


def _threads(info: RunInfo, profile: Profile) -> int:
    """Return the threads of a process: its CPUs, which on this machine are its part of all."""
    if profile.engine == "slurm":
        return profile.share.cpus_per_proc
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // info.procs_per_node)


def options(info: RunInfo, profile: Profile, run_dir: Path, extra: Mapping[str, str | int] | None = None) -> list[str]:
    """Return the ``#SBATCH`` options of a job: one task per node, whose agent starts the node's processes.

    Raises:
        UserError: the path of the log is one that sbatch does not take.
    """
    share = profile.share
    chosen: dict[str, str | int | None] = {
        "job-name": info.name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "nodes": info.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": share.cpus,
        **_gpus(profile, share),
        "mem": share.memory,
        "exclusive": "" if share.whole and "--exclusive" not in profile.sbatch else None,
        "time": profile.time,
        "signal": f"{profile.signal}@{profile.signal_before_end_s}",
        "open-mode": "append",
        "output": log_pattern(run_dir / "job.log"),
        "requeue": "",
        **(extra or {}),
    }
    lines = [_option(name, value) for name, value in chosen.items() if value is not None]
    return [*lines, *map(_passed_on, profile.sbatch)]


def _gpus(profile: Profile, share: Share) -> dict[str, str | int | None]:
    if not share.gpus or profile.gpu_request == "none":
        return {}
    kind = f"{profile.node.gpu_type}:" if profile.node.gpu_type else ""
    if profile.gpu_request == "gres":
        return {"gres": f"gpu:{kind}{share.gpus}"}
    return {"gpus-per-node": f"{kind}{share.gpus}"}


def _option(name: str, value: Any) -> str:
    """Return an option as sbatch reads it: quotes and a backslash before a quote, but nothing of the shell."""
    text = str(value)
    if "\n" in text:
        raise UserError(f"--{name}={text!r}: sbatch reads an option from one line; remove the line break")
    return f"--{name}={_quoted(text)}" if text else f"--{name}"


def _quoted(text: str) -> str:
    if re.fullmatch(r"[\w@%+=:,./-]*", text, re.ASCII):
        return text
    return '"' + re.sub(r'([\\"])', r"\\\1", text) + '"'  # a bare '#' would end the value without a word


def _passed_on(line: str) -> str:
    """Return an option of the profile's ``sbatch`` with its value quoted, unless the user has done so."""
    match = re.fullmatch(r"(--[a-z][a-z0-9-]*[= ]|-[A-Za-z][= ]?)(.+)", line)
    if not match or re.fullmatch(r"""'[^']*'|"(?:[^"\\]|\\.)*\"""", match[2]):
        return line
    return match[1] + _quoted(match[2])


def log_pattern(path: Path) -> str:
    """Return the path of a log as a file name pattern of sbatch, in which '%' stands for itself.

    Raises:
        UserError: the path holds a newline, which would end the option, or a backslash, which SLURM removes.
    """
    if re.search(r"[\\\n\r]", str(path)):
        raise UserError(
            f"{str(path.parent)!r}: SLURM cannot write a log where the path holds a backslash or a line break; "
            "set PAPERSCALE_RUNS to another folder"
        )
    return str(path).replace("%", "%%")
