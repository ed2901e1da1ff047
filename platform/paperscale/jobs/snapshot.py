"""The code of a run, as it was when the run was submitted: later edits do not reach a queued job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from paperscale import __version__, assets
from paperscale.errors import UserError
from paperscale.jobs.run import Run, runs_dir

IMPORT_PATH = "import-path"
_MAX_BYTES = 64 << 20
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "_assets")

_LOOSE = (".py", ".pyi", ".so", ".yaml", ".yml", ".json", ".toml", ".cfg", ".ini", ".txt")
_LOOSE_BYTES = 1 << 20
_LOOSE_ENTRIES = 20_000
_NOT_CODE = ("pyvenv.cfg", "run.json", "manifest.json")  # in a virtual environment, a run, a set of shards


@dataclass(frozen=True)
class Code:
    """What ``code.json`` of a run says of its code.

    Attributes:
        project: folder that was copied beside Paperscale itself, empty for none.
        commit: that git had checked out there, empty for none.
        dirty: whether there were changes since; those of tracked files are in ``code.patch``.
        files: number of files copied from there.
        bytes: size of those files.
        paperscale: version.
    """

    project: str = ""
    commit: str = ""
    dirty: bool = False
    files: int = 0
    bytes: int = 0
    paperscale: str = __version__


def take(code: Path, workdir: Path) -> str:
    """Copy the Paperscale package and the user's project around ``workdir``; describe them in ``code.json`` beside.

    In a git repository a project's files are those that git tracks and those it does not ignore, uncommitted changes
    and submodules included; elsewhere the modules and small texts below ``workdir``. A link to a file outside is
    copied as that file, one to a folder outside stays a link. A user's modules are found in the copy as they were from
    ``workdir``: there, at the project's top, and in ``src`` of either.

    Returns:
        A warning, empty for none.

    Raises:
        UserError: the project is too large to be code.
    """
    workdir = workdir.resolve()
    top = _git(workdir, "rev-parse", "--show-toplevel").rstrip("\n")
    project = Path(top) if top else workdir
    files = list(dict.fromkeys(_tracked(project))) if top else _loose(workdir)
    if files:
        files = [file for file in files if not (project / file).is_relative_to(runs_dir())]
    facts, warning = Code(), ""
    code.mkdir(parents=True)
    if files is None:
        warning = (
            f"{workdir} is no git repository and holds too much to be a project: your own modules are read from there "
            "when the job runs; `git init` in your project's folder keeps them as they are now"
        )
    elif files:
        size = _check_size(project, files)
        _copy(project, files, code)
        _note_import_path(project, workdir, code)
        commit = _git(project, "rev-parse", "--verify", "-q", "HEAD").strip() if top else ""
        patch = _git(project, "diff", "--no-ext-diff", "HEAD") if commit else ""
        if patch:
            (code.parent / "code.patch").write_text(patch, errors="surrogateescape")
        dirty = bool(_git(project, "status", "--porcelain")) if top else False
        facts = Code(str(project), commit, dirty, len(files), size)
    _copy_package(code)
    (code.parent / "code.json").write_text(json.dumps(asdict(facts), indent=1))
    return warning


def share(code: Path, other: Path) -> None:
    """Give another run the same code, by hard links where the file system has them."""
    shutil.copytree(code, other, symlinks=True, copy_function=_link)
    for name in ("code.json", "code.patch"):
        if (code.parent / name).exists():
            _link(code.parent / name, other.parent / name)


def use(run: Run) -> None:
    """Let imports find a run's copy of the user's code, and what was not copied where it is now; no run has none."""
    if not run.exists:
        return
    code, workdir = run.path / "code", Path(run.info.workdir)
    listed = code / IMPORT_PATH
    roots = listed.read_text().splitlines() if listed.exists() else []
    rest = [path for path in sys.path if path not in ("", str(workdir), str(Path.cwd()))]
    sys.path[:] = [*(str(code / root) for root in roots), *rest, *([] if roots else [str(workdir)])]


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _copy_package(code: Path) -> None:
    """Copy Paperscale; over a folder of that name in the project, whose place it takes."""
    shutil.copytree(assets.PACKAGE, code / "paperscale", ignore=_IGNORED, dirs_exist_ok=True)
    for name in ("cluster/templates", "cluster/profiles", "recipes"):
        shutil.copytree(assets.root() / name, code / "paperscale/_assets" / name, dirs_exist_ok=True)


def _note_import_path(project: Path, workdir: Path, code: Path) -> None:
    inside = workdir.relative_to(project)
    roots = dict.fromkeys([inside, inside / "src", Path(), Path("src")])
    found = [root for root in roots if (code / root).is_dir()]
    found += [] if inside in found else [workdir]  # git ignores it
    (code / IMPORT_PATH).write_text("".join(f"{root}\n" for root in found))


def _tracked(project: Path) -> Iterator[Path]:
    """Yield the files of a repository and of the repositories inside, relative to its top; links count as files."""
    for name in _git(project, "ls-files", "-z", "-co", "--exclude-standard").split("\0"):
        path = project / name
        if name and (path.is_symlink() or path.is_file()):
            yield Path(name)
        elif name and (path / ".git").exists():
            yield from (Path(name) / inner for inner in _tracked(path))


def _loose(workdir: Path) -> list[Path] | None:
    """Return the modules and small texts below a folder without git; ``None`` if it holds too much to be a project."""
    found, entries = [], 0
    for folder, folders, names in os.walk(workdir):
        here = Path(folder)
        entries += len(folders) + len(names)
        if entries > _LOOSE_ENTRIES:
            return None
        if here != workdir and any(name in names for name in _NOT_CODE):
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in ("__pycache__", "node_modules"))
        files = (here / name for name in sorted(names) if name.endswith(_LOOSE))
        found += [file.relative_to(workdir) for file in files if file.is_file() and file.stat().st_size <= _LOOSE_BYTES]
    return found


def _check_size(project: Path, files: list[Path]) -> int:
    """Return the bytes of a project.

    Raises:
        UserError: they are too many; names the largest files.
    """
    sizes = {file: (project / file).stat().st_size for file in files if (project / file).is_file()}
    total = sum(sizes.values())
    if total > _MAX_BYTES:
        largest = sorted(sizes, key=lambda file: -sizes[file])[:3]
        names = ", ".join(f"{str(file)!r} ({sizes[file] / 2**20:.1f} MB)" for file in largest)
        raise UserError(
            f"{project}: {total >> 20} MB would be copied as the run's code, at most {_MAX_BYTES >> 20} may be, the "
            f"largest files are {names}; name data and results in .gitignore"
        )
    return total


def _copy(project: Path, files: list[Path], code: Path) -> None:
    project = project.resolve()
    copied = {part for file in files for part in (file, *file.parents)}
    for file in files:
        source, target = project / file, code / file
        target.parent.mkdir(parents=True, exist_ok=True)
        end = source.resolve()
        inside = end.is_relative_to(project) and end.relative_to(project) in copied
        if not source.is_symlink():
            shutil.copy2(source, target)
        elif inside:
            target.symlink_to(os.path.relpath(code / end.relative_to(project), target.parent))
        elif end.is_file():
            shutil.copy2(end, target)
        else:
            target.symlink_to(end)


def _git(folder: Path, *command: str) -> str:
    """Return git's output; empty outside a repository or without git."""
    if shutil.which("git") is None:
        return ""
    result = subprocess.run(["git", *command], cwd=folder, capture_output=True, stdin=subprocess.DEVNULL)
    return os.fsdecode(result.stdout) if result.returncode == 0 else ""
