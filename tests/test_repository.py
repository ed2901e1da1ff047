"""What the repository says is what it does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from paperscale.cli import build_parser, main
from paperscale.data.shards import ShardSet

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_in(path: Path) -> list[str]:
    """The shell lines of a document's code blocks."""
    blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", path.read_text(), re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_the_documents_exists(document):
    choices = next(a.choices for a in build_parser()._actions if a.dest not in ("help", "version"))
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands_in(document):
        words = line.split()
        if words[:1] == ["paperscale"]:
            assert words[1] in choices, line
            if words[1] in ("data", "bench", "checkpoint") and "..." not in line:
                build_parser().parse_args(shlex.split(line)[1:])
        if words[:1] == ["make"]:
            assert next(word for word in words[1:] if "=" not in word) in targets, line


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_the_documents_link_to_exists(document):
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_papers_know_nothing_of_jobs_and_data_nothing_of_papers():
    """Imports run one way: cli -> jobs, tracking -> training -> papers -> nn, data."""
    allowed = {
        "data": {"data"},
        "nn": {"nn"},
        "papers": {"papers", "nn", "data"},
        "training": {"training", "papers", "nn", "data"},
        "tracking": {"tracking", "training", "papers", "nn", "data"},
    }
    package = ROOT / "platform/paperscale"
    parts = {path.name for path in package.iterdir() if path.is_dir()}
    for part, may_import in allowed.items():
        for path in (package / part).rglob("*.py"):
            found = set(re.findall(r"(?:from|import) paperscale\.(\w+)", path.read_text())) & parts
            assert found <= may_import, f"{path} imports {found - may_import}"


def test_the_dev_cluster_script_explains_itself():
    result = subprocess.run([ROOT / "cluster/dev/devcluster"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "devcluster up [N]" in result.stdout


def test_the_readme_shows_the_recipes_as_they_are(capsys):
    assert main(["recipes", "--markdown"]) == 0
    for row in capsys.readouterr().out.splitlines():
        assert row in (ROOT / "README.md").read_text(), "paste the table of `paperscale recipes --markdown`"


def test_the_writer_of_the_data_guide_works_as_it_is_printed(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    for number in range(2100):
        path = tmp_path / "photos" / ("dog" if number % 3 else "cat") / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"photo %d" % number)
    (tmp_path / "write.py").write_text(code)
    subprocess.run([sys.executable, "write.py"], cwd=tmp_path, check=True)
    shards = ShardSet(tmp_path / "data/pets", "train")
    assert sum(shards.sizes) == 1100
    assert bytes(shards.read(0, 0)["cls"]) == b"1"


def test_the_paper_of_contributing_works_as_it_is_printed(tmp_path, tiny_shards, runs, monkeypatch):
    """Both files are copied from the document into a project of one's own."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mypaper.py").write_text(code.replace("784", "64"))  # the test's images are of 8 x 8
    (tmp_path / "recipes").mkdir()
    recipe = recipe.replace("paperscale.papers.mypaper", "mypaper").replace("data/mnist", str(tiny_shards))
    (tmp_path / "recipes/my-model-mnist.yaml").write_text(recipe)
    script = Path(sys.executable).with_name("paperscale")
    words = [script, "fit", "my-model-mnist", "tracking.enabled=false"]
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert "test/accuracy" in result.stdout
    listed = subprocess.run([script, "recipes"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "my-model-mnist" in listed.stdout
