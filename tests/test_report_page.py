"""A paper's report: the paper's numbers beside those of real runs."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paperscale.cli import main
from paperscale.recipes import all_recipes
from paperscale.report import curves, spec, svg
from paperscale.report.runs import Curve
from tiny import write_recipe

DECLARED = """\
title: A paper
citation: Somebody. 2015.
link: https://example.org/paper
sections:
- title: Depth
  about: Deeper is worse.
  split: [data.path]
  groups:
    shallow: {recipe: tiny, where: {model.network.n: 1}}
    deep: {recipe: tiny, where: {model.network.n: 2, model.network.residual: false}}
  tables:
  - columns:
    - {title: test error, metric: test/accuracy, unit: error %}
    - {title: 10-crop, metric: test/accuracy, unit: error %, evaluation: ten}
    rows: {shallow: [8.75, 8.1], deep: [9.5 (9.61 ± 0.16), null]}
  checks:
  - {claim: deeper is worse, metric: test/accuracy, unit: error %, order: [shallow, deep]}
  - {claim: as in the paper, metric: test/accuracy, unit: error %, group: shallow, near: 8.75, tolerance: 0.5}
  figures:
  - {kind: curves, metric: train/loss, y: log, smooth: 0.1}
  - {kind: layers, metric: responses/}
  - {kind: dots, metric: test/accuracy, unit: error %}
  pictures: {keys: ["test/*"]}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A run that was really trained."""
    folder = tmp_path_factory.mktemp("trained")
    write_recipe(folder / "tiny.yaml", tiny_shards)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERSCALE_RUNS", str(folder / "runs"))
        assert main(["fit", str(folder / "tiny.yaml"), "tracking.enabled=false", "--name", "first"]) == 0
    return folder / "runs/first"


@pytest.fixture
def project(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a declared report, and no runs."""
    runs.mkdir()
    (tmp_path / "recipes/mine").mkdir(parents=True)
    (tmp_path / "recipes/mine/_report.yaml").write_text(DECLARED)
    write_recipe(tmp_path / "recipes/mine/tiny.yaml", Path("data/tiny"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def another(trained: Path, runs: Path, name: str, accuracy: float | None = None, **replaced: Any) -> Path:
    """A run like the trained one: with another seed, recipe or result."""
    run = Path(shutil.copytree(trained, runs / name, ignore=shutil.ignore_patterns("code", "checkpoints", "job")))
    (run / "checkpoints").mkdir()
    info = json.loads((run / "run.json").read_text())
    put(run / "run.json", {**info, "name": name, "recipe": replaced.pop("recipe", "tiny")})
    text = (run / "recipe.yaml").read_text()
    for key, value in replaced.items():
        text, count = re.subn(rf"^( *{key}): .*$", rf"\1: {value}", text, flags=re.MULTILINE)
        assert count == 1, key
    (run / "recipe.yaml").write_text(text)
    if accuracy is not None:
        put(run / "results.json", {**json.loads((run / "results.json").read_text()), "test/accuracy": accuracy})
    return run


def put(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def page(paper: str = "mine", *words: str) -> str:
    """The page as text without tags, blanks as one."""
    assert main(["report", paper, "-o", "page.html", *words]) == 0
    body = re.sub(r"<(style|script)>.*?</\1>", "", Path("page.html").read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_a_row_is_the_mean_and_spread_of_finished_runs_and_the_others_are_shown(project, runs, trained):
    for seed, accuracy in enumerate((0.90, 0.92, 0.94)):
        another(trained, runs, f"s{seed}", accuracy, seed_everything=seed)
    another(trained, runs, "again", 0.94, seed_everything=2)
    another(trained, runs, "diverged", float("nan"), seed_everything=3)
    (another(trained, runs, "half", seed_everything=4) / "results.json").unlink()
    text = page()
    assert "shallow 8.75 8.00 ± 2.00 3 seeds, 1 of 4 not finite" in text
    assert "half shallow stopped 4" in text
    assert "repeated by a newer run" in text
    assert "torch 2." not in text, "a copy without checkpoints names no versions"


def test_a_row_without_runs_says_so_and_names_the_command(project, runs, trained):
    text, test = page(), "paperscale test RUN data.eval_crop=ten"
    assert f"shallow paperscale fit tiny {test} 8.75 not run 8.10 not run" in text
    assert f"deep paperscale fit tiny model.network.n=2 model.network.residual=false {test} 9.5" in text
    run = another(trained, runs, "s1", 0.9)
    shutil.copytree(trained / "checkpoints", run / "checkpoints", dirs_exist_ok=True)
    text = page()
    path = re.search(r"^ +path: (.*)$", (run / "recipe.yaml").read_text(), re.MULTILINE)[1]
    assert "shallow 8.75 10.00 1 seed 8.10 not evaluated paperscale test s1 data.eval_crop=ten" in text
    assert f"deep paperscale fit tiny model.network.n=2 model.network.residual=false data.path={path}" in text
    assert re.search(r"torch 2\S+, paperscale \S+ .*cpu paperscale fit", text)


def test_numbers_of_another_protocol_come_from_stored_evaluations(project, runs, trained):
    run = another(trained, runs, "s1", 0.9)
    common = {"stage": "test", "date": "2026-11-20"}
    put(
        run / "evaluations/x.json",
        {**common, "metrics": {"test/accuracy": 0.5}, "overrides": ["data.eval_crop=center"]},
    )
    put(run / "evaluations/y.json", {**common, "metrics": {"test/accuracy": 0.91}, "overrides": ["data.eval_crop=ten"]})
    overrides = ["data.eval_crop=ten"]
    validated = {"stage": "validate", "date": "2026-11-21", "metrics": {"test/accuracy": 0.3}}
    put(run / "evaluations/v.json", {**validated, "overrides": overrides})
    several = [{"name": "other", "step": 24}]
    put(
        run / "evaluations/w.json",
        {**common, "metrics": {"test/accuracy": 1}, "overrides": overrides, "ensemble": several},
    )
    overrides = ["data.eval_crop=ten", "data.test=val"]
    put(run / "evaluations/z.json", {**common, "metrics": {"test/accuracy": 0.6}, "overrides": overrides})
    assert "10.00 1 seed 8.10 9.00 1 seed" in page()


def test_checks_say_what_holds_and_by_how_many_standard_errors(project, runs, trained, capsys):
    for seed, (shallow, deep) in enumerate([(0.91, 0.85), (0.92, 0.83)]):
        another(trained, runs, f"s{seed}", shallow, seed_everything=seed)
        another(trained, runs, f"d{seed}", deep, seed_everything=seed, n=2, residual="false")
    text = page()
    told = "shallow 8.50 ± 0.71 % (2), deep 16.00 ± 1.41 % (2); +7.50, 6.7 standard errors"
    assert f"holds deeper is worse {told}" in text
    assert "holds as in the paper shallow 8.50 ± 0.71 % (2); wanted 8.75 ± 0.5" in text
    another(trained, runs, "s2", 0.99, seed_everything=2)
    assert "does not hold as in the paper" in page()
    assert "5 finished runs of 5; 2 checks: 1 holds, 1 does not hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shallow", "deep", "word", "counted"),
    [
        ([0.90, 0.91], [0.89, 0.90], "not decided: within the spread", "1 does not hold, 1 is not decided"),
        ([0.91], [0.80], "not decided: one seed", "1 holds, 1 is not decided"),
        ([0.80, 0.81], [0.90, 0.91], "does not hold", "2 do not hold"),
    ],
)
def test_an_order_within_two_standard_errors_or_of_one_seed_is_not_decided(
    project, runs, trained, capsys, shallow, deep, word, counted
):
    for seed, (of_shallow, of_deep) in enumerate(zip(shallow, deep, strict=True)):
        another(trained, runs, f"s{seed}", of_shallow, seed_everything=seed)
        another(trained, runs, f"d{seed}", of_deep, seed_everything=seed, n=2, residual="false")
    assert page().count(f"{word} deeper is worse") == 2, "above, and in its section"
    assert capsys.readouterr().out.endswith(f"2 checks: {counted}\n")


def test_runs_that_no_row_is_of_are_left_out_and_named(project, runs, trained):
    another(trained, runs, "s0", 0.9)
    another(trained, runs, "wide", 0.8, n=5)
    text = page()
    assert "1 run left out, of the same recipes but as no row says: wide (model.network.n 5)" in text
    assert "10.00 1 seed" in text


def test_a_check_of_layers_takes_the_mean_over_them(project, runs, trained):
    check = "{claim: weaker, metric: responses/, order: [shallow, deep]}"
    path = project / "recipes/mine/_report.yaml"
    path.write_text(DECLARED.replace("  checks:", f"  checks:\n  - {check}"))
    for seed in range(2):
        for name, value, changed in (("s", 0.5, {}), ("d", 2.0, {"n": 2, "residual": "false"})):
            run = another(trained, runs, f"{name}{seed}", 0.9, seed_everything=seed, **changed)
            with (run / "metrics.jsonl").open("a") as file:
                for step, factor in ((1, 9), (3, 1)):
                    row = {"step": step, "attempt": 1, "responses/01_a": factor * value, "responses/02_b": factor}
                    file.write(json.dumps(row) + "\n")
    assert "holds weaker shallow 0.75 ± 0.00 (2), deep 1.50 ± 0.00 (2); +0.75" in page()


def test_a_run_of_a_sweep_is_listed_with_its_own_command(project, runs, trained):
    for seed in (10, 9):
        run = another(trained, runs, f"s{seed}", 0.9, seed_everything=seed)
        info = json.loads((run / "run.json").read_text())
        sweep = "--sweep seed_everything=[10,9] --sweep=model.network.n=1,2 --max-parallel 1 --name s"
        put(run / "run.json", {**info, "group": "s", "command": f"paperscale submit tiny {sweep} data.size=8"})
    listed = re.findall(r"paperscale submit tiny (data.size=8 \S+ \S+)", page())
    assert listed == [f"data.size=8 seed_everything={seed} model.network.n=1" for seed in (9, 10)]


def test_runs_on_other_data_stand_in_a_block_of_their_own(project, runs, trained):
    another(trained, runs, "a", 0.9, path="data/a")
    another(trained, runs, "b", 0.8, path="data/b")
    text = page()
    first, second = text.split("data.path data/a")[-1].split("data.path data/b")[-2:]
    assert "10.00 1 seed" in first
    assert "20.00 1 seed" in second
    assert "data.path=data/b" in second


def test_the_page_is_one_file_with_figures_and_bounded_pictures(project, runs, trained):
    for seed in range(2):
        run = another(trained, runs, f"s{seed}", 0.9, seed_everything=seed)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "attempt": 1, "train/loss": NaN, "responses/00_a": 1.0, "responses/01_b": 0.5}\n')
            file.write('{"step": 5, "atte')
        (run / "media").mkdir()
        Image.effect_noise((1200, 900), 90).save(run / "media/test-mistakes-24.png")
        put(run / "media/test-mistakes-24.json", {"key": "test/mistakes", "step": 24, "captions": []})
        (run / "media/test-broken-1.png").write_bytes(b"no picture")
    text = page()
    content = Path("page.html").read_text()
    assert not re.search(r'src="(?!data:)|<link|@import|url\(', content)
    figures = [
        ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", content.replace(" xmlns=", " x="), re.DOTALL)
    ]
    assert len(figures) == 3
    assert "left out because they are not finite" in text
    assert "smoothed: each point is the mean of 2 logged values" in text
    shapes = [shape for each in figures for kind in ("path", "circle") for shape in each.iter(kind)]
    assert len(shapes) > 20
    assert all(shape.get("fill") for shape in shapes), "or black, where no stylesheet is read"
    assert all({"stroke", "stroke-width"} <= set(shape.keys()) for shape in shapes if shape.get("fill") == "none")
    assert all(colour in content for colour in svg.PALETTE), "the stylesheet's too"
    layers = next(each for each in figures[1].iter("path") if each.get("data-names"))
    assert layers.get("data-names") == "a|b"
    (first, second) = re.findall(r'<img src="data:image/jpeg;base64,([^"]*)"', content)
    assert len(first) < 200_000
    assert max(Image.open(io.BytesIO(base64.b64decode(second))).size) <= 900


def test_a_curve_is_the_mean_over_seeds_and_thinning_keeps_its_extremes():
    steps = np.arange(10_000.0)
    runs = [Curve(steps, np.sin(steps) + shift) for shift in (-1.0, 1.0)]
    runs[0].values[777], runs[1].values[777] = 50, 52
    line = curves.mean_line(runs)
    assert len(line.x) <= 4 * curves.BUCKETS
    assert (line.x[0], line.x[-1]) == (0, 9999)
    assert line.y.max() == 51
    assert line.y[line.x == 777] == 51
    assert np.sqrt(2) == pytest.approx((line.high - np.sin(line.band_x)).min(), abs=1.1)
    flat = curves.smoothed(Curve(steps, np.arange(10_000.0)), 0.01)
    assert np.allclose(flat.values, steps), "a moving mean does not move a straight line"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "where: {model.network.n: 1}",
            "wher: {n: 1}",
            "sections[0].groups.shallow: unknown field 'wher'; did you mean 'where'?",
        ),
        ("kind: layers", "kind: layer", "sections[0].figures[1].kind: no 'layer'; did you mean 'layers'?"),
        ("order: [shallow, deep]", "order: [shalow, deep]", "checks[0].order: no 'shalow'; did you mean 'shallow'?"),
        (", tolerance: 0.5", "", "checks[1]: a check needs one thing to decide by; give either `order`"),
        ("[8.75, 8.1]", "[8.75]", "tables[0].rows.shallow: 1 numbers for 2 columns; write one for each"),
        ("title: A paper\n", "", "field 'title' is missing; add it"),
        ("smooth: 0.1", "smooth: much", "sections[0].figures[0].smooth is 'much'; write a number"),
        (
            "title: A paper",
            "title: [",
            "line 3, column 5: while parsing a flow sequence, expected ',' or ']', but got ':';",
        ),
        ("recipe: tiny", "recipe: tinny", "sections[0].groups.shallow.recipe: no recipe 'tinny'; did you mean 'tiny'?"),
        (
            "model.network.residual",
            "model.network.residul",
            "groups.deep.where: no run of 'tiny' has the key 'model.network.residul'; did you mean 'model.network.res",
        ),
    ],
)
def test_a_mistake_in_a_declaration_names_file_and_field(project, runs, trained, capsys, old, new, message):
    another(trained, runs, "a", 0.9)
    path = project / "recipes/mine/_report.yaml"
    path.write_text(DECLARED.replace(old, new, 1))
    assert main(["report", "mine"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: ")
    assert message in err
    assert err.count("\n") == 1


def test_what_is_probably_not_meant_is_said(project, runs, trained, capsys):
    another(trained, runs, "a", 0.9, seed_everything=1)
    another(trained, runs, "b", 0.9, seed_everything=2, lr=0.3)
    path = project / "recipes/mine/_report.yaml"
    path.write_text(DECLARED.replace("test/accuracy,", "test/acuracy,").replace("train/loss", "trin/loss"))
    page()
    err = capsys.readouterr().err
    assert "WARNING the runs of 'shallow' differ in model.lr" in err
    assert "WARNING 'Depth': no run has logged test/acuracy; did you mean 'test/accuracy'?" in err
    assert "WARNING 'Depth': no run has logged trin/loss; did you mean 'train/loss'?" in err


def test_a_module_of_ones_own_has_a_page_without_a_declaration(project, runs, trained, capsys):
    run = another(trained, runs, "a", 0.9, recipe="wide-digits")
    recipe = (run / "recipe.yaml").read_text().replace("paperscale.papers.resnet.ResNetC", "lab.wide.WideC")
    (run / "recipe.yaml").write_text(recipe)
    text = page("wide")
    assert re.search(r"test/accuracy, % .*wide-digits .*90\.00 1 seed", text)
    assert "val/accuracy, %" in text
    assert Path("page.html").read_text().count("<svg") > 2, "training loss and what is validated"
    assert main(["report", "wid"]) == 2
    assert "no paper 'wid'" in capsys.readouterr().err


def test_the_reports_that_ship_name_recipes_that_exist():
    known = all_recipes()
    files = spec.spec_files()
    assert "resnet" in files
    for path in files.values():
        for section in spec.read(path).sections:
            for group in section.groups.values():
                assert group.recipe in known, f"{path}: {section.title}"


def test_the_report_of_no_runs_is_whole_and_needs_no_torch(project, runs):
    code = "import sys; from paperscale.cli import main; main(['report', 'resnet']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")
    assert "paperscale fit resnet20-cifar10" in Path("resnet-report.html").read_text()


@pytest.mark.slow
def test_two_hundred_long_runs_make_a_small_page_in_seconds(project, runs, trained):
    rows = "".join(
        f'{{"step": {10 * at}, "attempt": 1, "train/loss": {1 + at % 7}, "epoch": 0}}\n' for at in range(10_000)
    )
    for number in range(200):
        run = another(trained, runs, f"r{number}", 0.9, seed_everything=number, n=1 + number % 2)
        (run / "metrics.jsonl").write_text(rows)
    started = time.process_time()
    page()
    assert time.process_time() - started < 20
    assert Path("page.html").stat().st_size < 5 << 20
