"""Profiles and rendered scripts against a real SLURM: what sbatch reads of them, and what runs on the nodes."""

from __future__ import annotations

import dataclasses
import getpass
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from helpers import wait_for
from paperscale.cli import main
from paperscale.errors import UserError
from paperscale.jobs import profile as profiles
from paperscale.jobs.cluster import check, example, problems, refuse
from paperscale.jobs.facts import Cluster
from paperscale.jobs.profile import Container, Node, Profile
from paperscale.jobs.render import render
from paperscale.jobs.run import runs_dir

pytestmark = pytest.mark.slurm

DEV = Profile("dev", partition="debug", time="10:00", signal_before_end_s=30)


def sbatch(script: str, *options: str) -> str:
    result = subprocess.run(["sbatch", "--parsable", *options], input=script, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def over(job: str) -> bool:
    return not subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout.strip()


def script(profile: Profile, body: str, name: str = "probe", nodes: int = 2) -> str:
    """Return a rendered script that does ``body`` in place of training."""
    folder = runs_dir() / name
    folder.mkdir(parents=True, exist_ok=True)
    info = dataclasses.replace(example(profile, name), nodes=nodes)
    return render(info, profile).partition("# -- one attempt")[0] + body


@pytest.mark.parametrize("name", ["slurm-dev", "slurm", "gpu", "pyxis", "apptainer"])
def test_sbatch_accepts_the_script_of_every_profile(name, runs):
    """With what this cluster has in place of what it has not: partition, limits, GPUs and whole large nodes."""
    asked = profiles.load(name)
    has = dataclasses.replace(
        asked, partition="debug", time="30:00", max_time=None, node=Node(), gpus_per_node=None, procs_per_node=2
    )
    text = render(dataclasses.replace(example(has), nodes=2), has)
    result = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_log_of_a_job_is_where_it_should_be_whatever_the_folder_is_called(tmp_path, monkeypatch):
    """sbatch does not read a line as a shell does: a bare '#' ends a value without a word."""
    folders = ["a b", "it's", 'q"q', "100%", "%j", "$(id)", "x#y", "a,b;c&d", " lead", "ü"]
    jobs = []
    for folder in folders:
        monkeypatch.setenv("PAPERSCALE_RUNS", str(tmp_path / folder))
        jobs.append(sbatch(script(DEV, f"printf %s {shlex.quote(folder)}\n", nodes=1)))
    wait_for(lambda: over(",".join(jobs)), 60, "the end of the jobs")
    written = {log.read_text() for folder in folders for log in (tmp_path / folder / "probe").glob("job.log")}
    assert written == set(folders)


def test_a_task_on_each_node_has_its_log_its_cpus_and_its_scratch(runs, tmp_path):
    """The scratch folder is on every node while the task runs, and gone after it; no GPU library is needed."""
    profile = dataclasses.replace(
        DEV, procs_per_node=2, cpus_per_proc=1, scratch=f"{tmp_path}/$USER/scratch", env={"ODD": "a b'$(id)\n"}
    )
    body = """
logs="$run/50%"; mkdir "$logs"
launch bash -c 'echo "$SLURM_NODEID $(hostname) $SLURM_NTASKS $SLURM_CPUS_ON_NODE"; ls -d "$TMPDIR"
    printf %s "$ODD" | wc -c'
echo "code $?, address $MASTER_ADDR"
"""
    job = sbatch(script(profile, body))
    wait_for(lambda: over(job), 30, "the end of the job")
    log = (runs / "probe/job.log").read_text()
    address = subprocess.run(["scontrol", "-o", "show", "node", "n1"], capture_output=True, text=True).stdout
    assert f"code 0, address {address.split('NodeAddr=')[1].split()[0]}" in log
    for node in (0, 1):
        first, folder, odd = (runs / f"probe/50%/node-{node}.log").read_text().splitlines()[:3]
        assert first == f"{node} n{node + 1} 2 2"
        assert folder.startswith(f"{tmp_path}/{getpass.getuser()}/scratch/paperscale-")
        assert odd == "10", "bytes: the value as it is, its line break too"
        assert not Path(folder).exists()


def test_a_signal_reaches_the_command_and_scratch_is_removed_after_it(runs, tmp_path):
    """The shell that makes and removes the folder outlives the signal."""
    profile = dataclasses.replace(DEV, scratch=f"{tmp_path}/scratch")
    command = (
        "trap : TERM; trap 'echo told; sleep 0.5; exit 75' USR1; echo ready; for i in {1..300}; do sleep 0.1; done"
    )
    job = sbatch(script(profile, f"logs=$run; trap : USR1\nlaunch bash -c {shlex.quote(command)}\necho code $?\n"))
    logs = [runs / f"probe/node-{node}.log" for node in (0, 1)]
    wait_for(lambda: all(log.exists() and "ready" in log.read_text() for log in logs), 30, "the tasks")
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    wait_for(lambda: over(job), 30, "the end of the job")
    assert "code 75" in (runs / "probe/job.log").read_text()
    assert all("told" in log.read_text() for log in logs)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_job_that_exports_nothing_has_its_environment_in_its_tasks(runs):
    """SBATCH_EXPORT or --export=NONE, which some sites set, would otherwise reach srun."""
    profile = dataclasses.replace(DEV, env={"WANTED": "here"}, sbatch=["--export=NONE"])
    job = sbatch(script(profile, "logs=$run\nlaunch bash -c 'echo $WANTED'\n", nodes=1))
    wait_for(lambda: over(job), 30, "the end of the job")
    assert (runs / "probe/node-0.log").read_text() == "here\n"


def test_where_requeue_is_forbidden_the_next_attempt_is_a_job_of_its_own(runs):
    """It starts after this one has ended, and is the run's job from then on."""
    body = """
job=$SLURM_JOB_ID
echo "job $job" >>"$run/jobs"
if (($(wc -l <"$run/jobs") < 2)); then again; sleep 1; echo "next $job" >>"$run/jobs"; fi
"""
    text = script(dataclasses.replace(DEV, preempt="chain"), body, nodes=1)
    (runs / "probe/job.sh").write_text(text)
    first = sbatch(text)
    wait_for(lambda: (runs / "probe/jobs").exists() and (runs / "probe/jobs").read_text().count("job") == 2, 60)
    second = (runs / "probe/job").read_text().strip()
    assert (runs / "probe/jobs").read_text().split("\n")[:3] == [f"job {first}", f"next {second}", f"job {second}"]
    wait_for(lambda: over(second), 30, "the end of the job")


# -- check and init ---------------------------------------------------------------------------------------------------


def level(profile: Profile) -> dict[str, str]:
    return {finding.name: f"{finding.level} {finding.found}; {finding.fix}" for finding in check(profile)}


def test_a_right_profile_is_all_ok(capsys, shared_python):
    assert main(["cluster", "check", "slurm-dev", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {finding["level"] for finding in found} == {"OK"}
    assert {"profile", "partition", "script", "python"} <= {finding["name"] for finding in found}


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"partition": "debgu"}, "partition", "FAIL .*no partition 'debgu'; this cluster has debug urgent; did"),
        ({"time": "9-00:00:00"}, "time", "FAIL time 9-00:00:00 asked for, .* allows 0?1:00:00; use --time 0?1:00:00"),
        ({"nodes": 99}, "nodes", r"FAIL 99 nodes asked for, .* has \d+; use --nodes \d+ or fewer"),
        ({"cpus_per_proc": 999}, "CPUs", "FAIL 1 processes of 999 CPUs .*; lower --procs-per-node or"),
        ({"mem_per_node": "99T"}, "memory", "FAIL 99T of memory .*; lower the profile's mem_per_node"),
        ({"gpus_per_node": 99}, "GPUs", "FAIL 99 GPUs on a node asked for, .*; (use --gpus|leave gpus)"),
        ({"constraint": "nonsense"}, "script", "FAIL sbatch refuses it: .*eature.*; mend what it names in the profile"),
        ({"account": "lab"}, "account", "(WARN no accounting answers|FAIL 'lab' is not an account of yours)"),
        ({"python": "/no/python"}, "python", "FAIL /no/python is not there; set `python:`"),
        ({"modules": ["cuda"]}, "modules", "(WARN no `module` here|FAIL `module load cuda` fails)"),
        ({"container": Container("pyxis", "x.sqsh")}, "container", "FAIL .*no --container-image; ask"),
        ({"container": Container("apptainer", "/no.sif")}, "container", "FAIL no image at /no.sif; mend"),
        ({"scratch": "/nowhere/$USER"}, "scratch", "WARN no /nowhere on this machine; make sure"),
        ({"scratch": "/tmp/$USER"}, "scratch", "OK /tmp.* is there and can be written to"),
    ],
)
def test_what_is_wrong_is_found_before_a_job_is_submitted(changes, name, message):
    found = level(dataclasses.replace(DEV, **{"time": "30:00", **changes}))
    assert re.match(message, found.get(name, "")), found


def test_a_submission_is_refused_with_the_first_problem():
    with pytest.raises(UserError, match=r"99 nodes asked for, partition 'debug' of cluster 'dev' has \d+; use --nodes"):
        refuse(DEV, nodes=99)
    assert problems(DEV) == []


def test_nodes_must_have_all_that_is_asked_for_together():
    """The partition has nodes with enough CPUs, but none of them has the type of GPU."""
    cluster = Cluster()
    with_gpus = [dataclasses.replace(cluster.machines[0], gpus=8, gpu_type="h100"), *cluster.machines[1:]]
    cluster.machines = with_gpus
    asked = dataclasses.replace(DEV, gpus_per_node=1, procs_per_node=1, node=Node(gpus=8, gpu_type="a100"))
    (finding,) = problems(asked, cluster=cluster)
    assert finding.level == "FAIL"
    assert "has 0 such nodes" in finding.found
    assert "types of GPU: h100" in finding.found
    assert problems(dataclasses.replace(asked, node=Node(gpus=8, gpu_type="h100")), cluster=cluster) == []


def test_init_proposes_a_profile_that_its_own_check_accepts(tmp_path, monkeypatch, capsys, shared_python):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["cluster", "init", "here"]) == 0
    path = tmp_path / "paperscale/profiles/here.yaml"
    assert f"written to {path}" in capsys.readouterr().out
    profile, machine = profiles.load("here"), Cluster().of_partition("debug")[0]
    assert (profile.partition, profile.node.cpus, profile.node.gpus or 0) == ("debug", machine.cpus, machine.gpus)
    assert main(["cluster", "check", "here"]) == 0
    assert main(["cluster", "init", "here"]) == 2
    assert "exists; choose another name or --out, or replace it with --force" in capsys.readouterr().err
    assert main(["cluster", "init", "here", "--force", "--partition", "urgent"]) == 0
    assert profiles.load("here").partition == "urgent"
    assert main(["cluster", "init", "--partition", "urgnt"]) == 2
    assert "no partition 'urgnt'; did you mean 'urgent'" in capsys.readouterr().err
