"""The code of a run, as it was when the run was submitted: later edits do not reach a queued job."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from paperscale import assets
from paperscale.errors import UserError

_MAX_BYTES = 64 << 20
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "_assets")


IMPORT_PATH = "import-path"


def take(code: Path, workdir: Path) -> None:
    """Copy the Paperscale package, and the user's project where ``workdir`` is in one of their own.

    A project's files are those that git tracks and those it does not ignore, uncommitted changes included. A user's
    modules are found in the copy as they were from ``workdir``: there, at the project's top, and in ``src`` of either.

    Raises:
        UserError: the project is too large to be code.
    """
    shutil.copytree(assets.PACKAGE, code / "paperscale", ignore=_IGNORED)
    for name in ("templates", "profiles"):
        shutil.copytree(assets.cluster_dir() / name, code / "paperscale/_assets/cluster" / name)
    shutil.copytree(assets.recipes_dir(), code / "paperscale/_assets/recipes")
    workdir = workdir.resolve()
    top = _git(workdir, "rev-parse", "--show-toplevel")
    if not top or assets.PACKAGE.is_relative_to(top[0]):
        return
    project = Path(top[0])
    files = [project / name for name in _git(project, "ls-files", "-z", "-co", "--exclude-standard")]
    files = [file for file in files if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    if size > _MAX_BYTES:
        raise UserError(
            f"{project}: {size >> 20} MB would be copied as code (at most {_MAX_BYTES >> 20}); "
            "name data and results in .gitignore"
        )
    inside = workdir.relative_to(project)
    roots = dict.fromkeys([inside, inside / "src", Path(), Path("src")])
    (code / IMPORT_PATH).write_text("".join(f"{root}\n" for root in roots if (project / root).is_dir()))
    for file in files:
        target = code / file.relative_to(project)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)


def use(code: Path, workdir: Path) -> None:
    """Let imports find the run's copy of the user's code, and what was not copied where it is now."""
    listed = code / IMPORT_PATH
    roots = listed.read_text().splitlines() if listed.exists() else []
    rest = [path for path in sys.path if path not in ("", str(workdir), str(Path.cwd()))]
    sys.path[:] = [*(str(code / root) for root in roots), *rest, *([] if roots else [str(workdir)])]


def _git(folder: Path, *command: str) -> list[str]:
    """Return git's output, split at line ends or NULs; empty outside a repository or without git."""
    if shutil.which("git") is None:
        return []
    result = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
    return [part for part in result.stdout.replace("\0", "\n").splitlines() if part] if result.returncode == 0 else []
