"""The copy of the code: what is in it, what is not, in the projects that users have."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from paperscale.errors import UserError
from paperscale.jobs import snapshot


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def repository(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    git(folder, "init", "-q")
    for name, content in files.items():
        (folder / f"{name}.py").write_text(content)
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def copy(project: Path, tmp_path: Path) -> Path:
    """Take a snapshot; return the folder of code."""
    run = tmp_path / "copied"
    run.mkdir()
    assert snapshot.take(run / "code", project) == ""
    assert (run / "code/paperscale/jobs/worker.py").exists()
    assert (run / "code/paperscale/_assets/cluster/templates/job.sbatch.j2").exists()
    return run / "code"


def own(code: Path) -> set[str]:
    """The files of the user's in a copy."""
    found = (path.relative_to(code) for path in code.rglob("*") if not path.is_dir() or path.is_symlink())
    return {str(path) for path in found if path.parts[0] != "paperscale"} - {snapshot.IMPORT_PATH}


def test_what_git_tracks_and_does_not_ignore_as_it_is_now(tmp_path, runs):
    project = repository(tmp_path / "p", kept="1", changed="1", deleted="1")
    (project / ".gitignore").write_text("*.log\n")
    (project / "changed.py").write_text("2")
    (project / "deleted.py").unlink()
    (project / "new.py").write_text("2")
    (project / "big.log").write_text("no")
    (project / "odd\nname.py").write_text("3")
    code = copy(project, tmp_path)
    assert own(code) == {".gitignore", "kept.py", "changed.py", "new.py", "odd\nname.py"}
    assert (code / "changed.py").read_text() == "2"
    facts = json.loads((code.parent / "code.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True).stdout.strip()
    assert (facts["commit"], facts["dirty"], facts["files"], facts["project"]) == (head, True, 5, str(project))
    patch = (code.parent / "code.patch").read_text()
    assert "-1\n\\ No newline at end of file\n+2" in patch
    assert "deleted file mode" in patch


def test_a_clean_repository_has_no_patch(tmp_path, runs):
    code = copy(repository(tmp_path / "p", a="1"), tmp_path)
    assert json.loads((code.parent / "code.json").read_text())["dirty"] is False
    assert not (code.parent / "code.patch").exists()


def test_submodules_and_repositories_inside(tmp_path, runs):
    library = repository(tmp_path / "library", lib="1")
    project = repository(tmp_path / "p", a="1")
    git(project, "submodule", "add", "-q", str(library), "third_party/lib")
    repository(project / "clone", b="1")
    assert own(copy(project, tmp_path)) == {"a.py", ".gitmodules", "third_party/lib/lib.py", "clone/b.py"}


def test_links(tmp_path, runs):
    """A link inside leads to the copy; of a file outside the content is kept; a folder outside stays where it is."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "shared.py").write_text("1")
    project = repository(tmp_path / "p", a="1")
    (project / ".gitignore").write_text("ignored\n")
    (project / "ignored").mkdir()
    (project / "sub").mkdir()
    (project / "sub/relative.py").symlink_to("../a.py")
    (project / "absolute.py").symlink_to(project / "a.py")
    (project / "folder").symlink_to("sub")
    (project / "shared.py").symlink_to(outside / "shared.py")
    (project / "data").symlink_to(outside)
    (project / "results").symlink_to("ignored")
    (project / "dangling").symlink_to("/nowhere/at/all")
    code = copy(project, tmp_path)
    for name in ("a.py", "ignored/x"):
        (project / name).write_text("2")
    (outside / "shared.py").write_text("2")
    for name in ("sub/relative.py", "absolute.py", "folder/relative.py", "shared.py"):
        assert (code / name).read_text() == "1", name
    assert (code / "data").resolve() == outside
    assert (code / "results").resolve() == project / "ignored"
    assert (code / "dangling").readlink() == Path("/nowhere/at/all")


def test_a_project_without_git(tmp_path, runs):
    """Modules and small texts, without environments, runs, shards and what is hidden."""
    project = tmp_path / "p"
    for name in ("mine.py", "pkg/part.py", "conf.yaml", "env/pyvenv.cfg", "env/lib.py", "runs/x/run.json",
                 "runs/x/code/a.py", "data/manifest.json", "data/a.json", ".hidden/a.py", "model.ckpt"):  # fmt: skip
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("1")
    (project / "huge.json").write_bytes(bytes(2 << 20))
    code = copy(project, tmp_path)
    assert own(code) == {"mine.py", "pkg/part.py", "conf.yaml"}
    assert (code / snapshot.IMPORT_PATH).read_text() == ".\n"


def test_a_folder_that_is_no_project_is_not_copied_and_that_is_said(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(snapshot, "_LOOSE_ENTRIES", 10)
    home = tmp_path / "home"
    home.mkdir()
    for number in range(11):
        (home / f"{number}.py").write_text("")
    (tmp_path / "run").mkdir()
    warning = snapshot.take(tmp_path / "run/code", home)
    assert "no git repository and holds too much" in warning
    assert "`git init`" in warning
    assert own(tmp_path / "run/code") == set()


def test_what_is_too_large_is_named(tmp_path, runs):
    project = repository(tmp_path / "p", a="1")
    for name, size in (("weights.bin", 60), ("table.csv", 10), ("small.txt", 1)):
        with (project / name).open("wb") as file:
            file.truncate(size << 20)
    with pytest.raises(UserError) as error:
        snapshot.take(tmp_path / "run/code", project)
    assert "71 MB would be copied as the run's code, at most 64" in str(error.value)
    assert "'weights.bin' (60.0 MB), 'table.csv' (10.0 MB), 'small.txt' (1.0 MB)" in str(error.value)
    assert str(error.value).endswith("name data and results in .gitignore")


def test_runs_inside_the_project_are_not_copied(tmp_path, monkeypatch):
    project = repository(tmp_path / "p", a="1")
    monkeypatch.setenv("PAPERSCALE_RUNS", str(project / "runs"))
    (project / "runs/old/code").mkdir(parents=True)
    (project / "runs/old/code/a.py").write_text("1")
    assert own(copy(project, tmp_path)) == {"a.py"}


def test_an_environment_inside_the_project_is_no_reason_not_to_copy_it(tmp_path, runs, monkeypatch):
    """Paperscale itself is often installed in ./.venv."""
    project = repository(tmp_path / "p", a="1")
    (project / ".gitignore").write_text(".venv\n")
    site = project / ".venv/lib/paperscale"
    site.parent.mkdir(parents=True)
    site.symlink_to(Path(snapshot.__file__).parents[1])
    monkeypatch.setattr("paperscale.assets.PACKAGE", site)
    assert own(copy(project, tmp_path)) == {"a.py", ".gitignore"}


def test_another_run_shares_the_copy(tmp_path, runs):
    code = copy(repository(tmp_path / "p", a="1"), tmp_path)
    (tmp_path / "other").mkdir()
    snapshot.share(code, tmp_path / "other/code")
    assert (tmp_path / "other/code/a.py").samefile(code / "a.py")
    assert (tmp_path / "other/code.json").samefile(code.parent / "code.json")
    assert own(tmp_path / "other/code") == own(code)
