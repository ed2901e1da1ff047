"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from paperscale.cli import main
from paperscale.jobs.run import Run


def paperscale(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paperscale", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, check=False)


def start_fit(recipe: Path, name: str, seconds: float) -> subprocess.Popen[str]:
    """Train in a process of its own that waits after each step."""
    slow = f"trainer.callbacks=[{{class_path: helpers.Slowly, init_args: {{seconds: {seconds}}}}}]"
    command = [sys.executable, "-m", "paperscale", "fit", str(recipe), slow, "--name", name, "tracking.enabled=false"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "words", [["--help"], ["recipes"], ["runs"], ["fit", "--help"], ["data", "prepare", "--help"], ["status", "x"]]
)
def test_commands_that_need_no_torch_answer_in_half_a_second(words, runs):
    best = 9.0
    for _ in range(4):
        started = time.monotonic()
        paperscale(*words)
        best = min(best, time.monotonic() - started)
    assert best < 0.5


def test_light_commands_do_not_import_torch():
    code = "import sys; from paperscale.cli import main; main(['recipes']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sumbit"], "invalid choice: 'sumbit'; did you mean 'submit'?"),
        (["fit"], "the following arguments are required: RECIPE"),
        (["fit", "resnet20-mnits"], "no recipe 'resnet20-mnits'; did you mean 'resnet20-mnist'?"),
        (["fit", "nowhere/mine.yaml"], "no recipe file nowhere/mine.yaml"),
        (["submit", "resnet20-mnist", "--cluser", "local"], "unknown option --cluser; did you mean '--cluster'?"),
        (["submit", "resnet20-mnist", "--nodes", "0"], "'0' is not a whole number of at least 1"),
        (["submit", "resnet20-mnist", "--cluster", "locale"], "no cluster profile 'locale'; did you mean 'local'?"),
        (["status", "nothing"], "no run 'nothing'"),
        (["runs", "--jsn"], "unrecognized arguments: --jsn; did you mean '--json'?"),
        (["data", "prepare", "minst"], "`paperscale data prepare --list` shows what there is; did you mean 'mnist'?"),
        (["data", "info", "/nowhere"], "no shards at /nowhere: the folder does not exist"),
        (["drill", "x", "earthquake"], "invalid choice: 'earthquake'"),
        (["checkpoint", "export", "x", "--format", "hf"], "'hf'; choose safetensors, torchvision, huggingface; see"),
    ],
)
def test_a_mistake_is_one_line_with_the_fix_and_exit_code_2(words, message, runs, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not runs.exists(), "nothing was left behind"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.max_epoch=2"], "unknown key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        (["--trainer.max_epoch", "2"], "unknown key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        (["model.lrr=1"], "unknown key 'lrr' of ResNetClassifier, which takes"),
        (["data.crop_pading=1"], "did you mean 'crop_padding'?"),
        (["model.network.init_args.m=1"], "unknown key 'm' of CifarResNet, which takes channels"),
        (["trainer.max_epochs=two"], "trainer.max_epochs: expected int or NoneType, got 'two'"),
        (["checkpoint.keep_last=1"], "checkpoint.keep_last must be at least 2"),
        (["trainer.devices=2"], "use --nodes and --procs-per-node of `paperscale submit`"),
        (["data.path=/nowhere"], "no shards at /nowhere"),
        (["data.train=trian"], "has no split 'trian'"),
        (["data.global_batch_size=1"], "use at most 1 processes"),
        (["--name", "taken"], "run 'taken' exists at"),
        (["--name", "a b"], "for example --name a-b"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_queued(words, message, runs, tiny_recipe, capsys):
    (runs / "taken").mkdir(parents=True)
    (runs / "taken" / "run.json").touch()
    assert main(["submit", str(tiny_recipe), "--procs-per-node", "2", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in runs.iterdir()] == ["taken"]


def test_a_typo_inside_a_recipe_names_the_file(tmp_path, tiny_recipe, capsys, runs):
    typo = tmp_path / "typo.yaml"
    typo.write_text(tiny_recipe.read_text().replace("crop_padding", "crop_pading"))
    assert main(["fit", str(typo)]) == 2
    assert f"error: {typo}: unknown key 'crop_pading' of ImageShards" in capsys.readouterr().err
    typo.write_text(tiny_recipe.read_text().replace("CifarResNet", "CifarResNett"))
    assert main(["fit", str(typo)]) == 2
    assert "no class 'CifarResNett' in paperscale.papers.resnet; did you mean 'CifarResNet'?" in capsys.readouterr().err
    typo.write_text("model: [")
    assert main(["fit", str(typo)]) == 2
    assert f"{typo}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nosuchpackage.Model", "No module named 'nosuchpackage'"),
        ("os.path.join", "does not correspond to a subclass of LightningModule"),
        ("broken.Model", "invalid syntax (broken.py, line 1)"),
        ("needy.Model", "needy.Model: the following arguments are required: network"),
        ("thrower.Model", "the recipe's values do not fit: ValueError: no lr like this ("),
    ],
)
def test_a_class_of_the_users_own_that_does_not_work(tmp_path, tiny_recipe, runs, name, message):
    """Classes are found where the command is typed, and the reason is given, not its consequence."""
    (tmp_path / "broken.py").write_text("def (\n")
    head = "from lightning.pytorch import LightningModule\nclass Model(LightningModule):\n"
    (tmp_path / "needy.py").write_text(f"{head}    def __init__(self, network: str): super().__init__()\n")
    (tmp_path / "thrower.py").write_text(f"{head}    def __init__(self): raise ValueError('no lr like this')\n")
    text = tiny_recipe.read_text().replace("paperscale.papers.resnet.ResNetClassifier", name)
    start, end = text.index("  init_args:\n    network"), text.index("data:")
    (tmp_path / "mine.yaml").write_text(text[:start] + text[end:])
    script = Path(sys.executable).with_name("paperscale")
    result = subprocess.run([script, "fit", "mine.yaml"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_cancel_stops_a_run_in_the_foreground(runs, tiny_recipe):
    process = start_fit(tiny_recipe, "here", seconds=0.2)
    run = Run(runs / "here")
    while run.read_json("progress.json").get("step", 0) < 2:
        time.sleep(0.05)
    assert main(["cancel", "here"]) == 0
    assert process.wait(10) == 75
    assert run.read_json("progress.json")["step"] < 24


def test_print_config_is_the_whole_resolved_recipe(tmp_path, tiny_recipe, capsys):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {max_epochs: 7}\n")
    words = ["fit", str(tiny_recipe), str(overlay), "model.lr=0.5", "--data.flip", "true", "--print_config"]
    assert main(words) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["max_epochs"] == 7
    assert config["model"]["init_args"]["lr"] == 0.5
    assert config["model"]["init_args"]["momentum"] == 0.9, "defaults are in it"
    assert config["data"]["init_args"]["flip"] is True
    kept = config["checkpoint"]
    assert (kept["every_n_epochs"], kept["every_n_steps"], kept["keep_last"]) == (1, 5, 2)


def test_fit_then_look_then_test_the_checkpoint(runs, tiny_recipe, capsys, monkeypatch):
    result = paperscale("fit", str(tiny_recipe), "--name", "one", "tracking.enabled=false")
    assert result.returncode == 0, result.stderr
    assert "test/accuracy" in result.stdout
    run = Run(runs / "one")
    accuracy = run.read_json("results.json")["test/accuracy"]
    assert main(["status", "one", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["step"], facts["checkpoint"]) == ("finished", "24/24", "step-00000024")
    assert main(["runs"]) == 0
    assert f"test/accuracy {accuracy:.4f}" in " ".join(capsys.readouterr().out.split())
    assert main(["logs", "one"]) == 0
    log = capsys.readouterr().out
    assert "begins at the start" in log
    first, *_, last = [line for line in log.splitlines() if line.startswith("step ")]
    assert "left" not in first, "one step tells nothing of the others"
    assert last.endswith("  0 s left")
    assert main(["test", "one"]) == 0
    assert f"{accuracy:.4f}" in capsys.readouterr().out
    assert main(["validate", "one", "data.val=train+val"]) == 0
    assert "val/accuracy" in capsys.readouterr().out
    assert main(["predict", "one"]) == 0
    assert len(json.loads((run.path / "predictions.json").read_text())) == 60
    damaged = run.checkpoints / "step-00000024/state.pt"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert main(["test", str(tiny_recipe), "--checkpoint", str(damaged.parent)]) == 2
    assert "state.pt has" in capsys.readouterr().err


def test_fit_stopped_by_ctrl_c_resumes_here(runs, tiny_recipe):
    process = start_fit(tiny_recipe, "stopped", seconds=0.1)
    run = Run(runs / "stopped")
    while run.read_json("progress.json").get("step", 0) < 3:
        time.sleep(0.05)
    process.send_signal(2)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "interrupted by SIGINT" in out
    assert "paperscale resume stopped" in out
    result = paperscale("resume", "stopped", PYTHONPATH=str(Path(__file__).parent))
    assert result.returncode == 0, result.stderr
    assert "continues from step-" in result.stdout
    assert run.read_json("results.json")


def test_recipes_as_a_table_and_as_json(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    for column in ("recipe", "paper", "dataset", "hardware", "command", "paper's number", "our number"):
        assert column in out
    assert main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert "resnet20-mnist" in [row["name"] for row in rows]


def test_doctor_says_ok_warn_or_fail_with_the_fix(capsys, monkeypatch, tmp_path, tiny_shards):
    code = main(["doctor", "--data", str(tiny_shards), "--json"])
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert found["torch"]["level"] == found["shards"]["level"] == "OK"
    assert code in (0, 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor", "--cluster", "slurm"]) == 2
    assert "FAIL  SLURM" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_shell_completion_completes_commands_recipes_and_clusters(tmp_path):
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "paperscale").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m paperscale "$@"\n')
    (bin_dir / "paperscale").chmod(0o755)

    def complete(line: str) -> list[str]:
        script = f"""
            eval "$(paperscale completion bash)"
            COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=($COMP_LINE ''); COMP_TYPE=9
            COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _python_argcomplete paperscale
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        env = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}"}
        result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, check=True)
        return [word.strip() for word in result.stdout.splitlines()]

    assert "submit" in complete("paperscale su")
    assert "resnet20-mnist" in complete("paperscale fit resnet20-m")
    assert "slurm-dev" in complete("paperscale submit resnet20-mnist --cluster slurm")
