"""The job script: what a SLURM user would be content to have written, refused where it cannot be right."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from paperscale.errors import UserError
from paperscale.jobs import profile as profiles
from paperscale.jobs.engines import ENGINES, seconds
from paperscale.jobs.profile import Profile
from paperscale.jobs.run import RunInfo, check_name
from paperscale.jobs.submit import Shape, render


def info(profile: Profile, **changes: object) -> RunInfo:
    values = {"nodes": profile.nodes, "procs_per_node": profile.processes_per_node, "workdir": "/home/me/my work"}
    return RunInfo(
        "run-1",
        "resnet20-mnist",
        profile.name,
        profile.engine,
        wandb_id="abc",
        created=0.0,
        command="x",
        **{**values, **changes},
    )  # type: ignore[arg-type]


def script(**changes: object) -> str:
    profile = Profile("mine", **changes)  # type: ignore[arg-type]
    return render(info(profile), profile)


@pytest.mark.parametrize("name", sorted(profiles.all_profiles()))
def test_every_profile_gives_a_script_that_bash_accepts(name, runs):
    profile = Shape(name).profile()
    text = render(info(profile), profile)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert ("launch() { srun " in text) == (profile.engine == "slurm")


def test_what_the_profile_says_is_asked_of_slurm(runs):
    text = script(partition="gpu", account="lab", qos="high", time="2-00:00:00", nodes=4, procs_per_node=8,
                  gpus_per_node=8, cpus_per_proc=12, mem_per_node="500G", sbatch=["--exclusive"],
                  env={"NCCL_SOCKET_IFNAME": "ib0 ib1"}, setup=["module load cuda/12.4"])  # fmt: skip
    for option in ("job-name=run-1", "partition=gpu", "account=lab", "qos=high", "time=2-00:00:00", "nodes=4",
                   "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12", "mem=500G", "signal=USR1@120",
                   "requeue", "open-mode=append", "exclusive"):  # fmt: skip
        assert f"#SBATCH --{option}\n" in text
    assert "export NCCL_SOCKET_IFNAME='ib0 ib1'\n" in text
    assert "\nmodule load cuda/12.4\n" in text
    assert "cd '/home/me/my work' || exit\n" in text
    assert "None" not in text


def test_options_end_before_the_first_command(runs):
    """SLURM stops reading options at the first line that is not a comment."""
    lines = script().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])


@pytest.mark.parametrize("name", ["a b", "$(id)", "x\ny", "../up", "-rf", "", "a'b", 'q"', "ü"])
def test_names_that_would_do_harm_are_refused_with_a_better_one(name):
    with pytest.raises(UserError, match=r"for example --name [A-Za-z0-9]"):
        check_name(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("partiton: gpu", "unknown field 'partiton'; did you mean 'partition'"),
        ("engine: lsf", "'lsf' is neither slurm nor local"),
        ("nodes: 0", "nodes: must be a whole number of at least 1"),
        ("nodes: two", "nodes: must be a whole number"),
        ("time: 1:00:00", "3600 is a number; write the time limit in quotes"),
        ("env: [A=1]", "env: must be a mapping"),
        ("setup: module load", "setup: must be a list of lines"),
        ("time: tomorrow", "'tomorrow' is not a time limit"),
        ("nodes: [", "not valid YAML"),
    ],
)
def test_a_profile_with_an_error_names_file_and_field(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster/profiles").mkdir(parents=True)
    (tmp_path / "cluster/profiles/bad.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"bad\.yaml: .*{message}"):
        profiles.load("bad")


def test_there_is_a_process_for_each_gpu():
    assert Profile("mine", gpus_per_node=8).procs_per_node == 8
    assert Profile("mine", gpus_per_node=8, procs_per_node=2).procs_per_node == 2
    assert Profile("mine").procs_per_node == 1


def test_an_unknown_cluster_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'slurm-dev'"):
        profiles.load("slurm_dev")


def test_a_users_profile_wins_over_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster/profiles").mkdir(parents=True)
    (tmp_path / "cluster/profiles/slurm.yaml").write_text("partition: mine\n")
    assert profiles.load("slurm").partition == "mine"


def test_no_sbatch(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    profile = profiles.load("slurm")
    with pytest.raises(UserError, match=r"needs sbatch, which is not on PATH: .* use --cluster local"):
        ENGINES["slurm"].check(profile, info(profile))


def test_the_local_cluster_is_one_node():
    profile = profiles.load("local")
    with pytest.raises(UserError, match="use --nodes 1"):
        ENGINES["local"].check(profile, info(profile, nodes=2))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("1:00:00", 3600),
        ("2-03", 183600),
        ("1-00:30:00", 88200),
        ("infinite", float("inf")),
    ],
)
def test_time_limits(limit, expected):
    assert seconds(limit) == expected


def test_templates_can_be_overridden_from_the_working_directory(tmp_path, monkeypatch, runs):
    monkeypatch.chdir(tmp_path)
    folder = Path("cluster/templates")
    folder.mkdir(parents=True)
    (folder / "engine-local.sh.j2").write_text("launch() { mine; }\n")
    profile = profiles.load("local")
    assert "launch() { mine; }" in render(info(profile), profile)
