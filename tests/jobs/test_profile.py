"""Profiles: typed, found where a user puts them, refused with the file, the field and the fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paperscale.cli import main
from paperscale.errors import UserError
from paperscale.jobs import profile as profiles
from paperscale.jobs.cluster import problems, refuse
from paperscale.jobs.facts import gpus_of
from paperscale.jobs.profile import Container, Node, Profile
from paperscale.jobs.units import seconds, size_bytes, size_text


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a profile into the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cluster/profiles"
    folder.mkdir(parents=True)

    def write_it(name: str, content: str) -> Path:
        (folder / f"{name}.yaml").write_text(content)
        return folder / f"{name}.yaml"

    return write_it


WHOLE = """
engine: slurm
partition: gpu
account: lab
qos: high
constraint: a100&ib
nodes: 2
gpus_per_node: 4
procs_per_node: 8
cpus_per_gpu: 6
node: {gpus: 8, cpus: 96, memory: 1000G, gpu_memory: 80G, gpu_type: a100}
gpu_request: gres
time: 1:00:00
max_time: 1-00:00:00
signal: USR2
signal_before_end_s: 300
preempt: chain
max_requeues: 0
max_stalled: 5
watchdog: {hang_s: 120, start_s: 900}
modules: [cuda/12.4]
setup: ["source env.sh"]
env: {SPEED: 010, FLAG: yes, EMPTY: "", WHEN: 2026-01-01, RATE: 1e-3}
network: {interface: ib0, nccl_ib_hca: mlx5_0, nccl_ib_gid_index: 3, nccl_ib_disable: false}
scratch: /scratch/$USER
container: {runtime: pyxis, image: a.sqsh, mounts: [/data, "/a:/b:ro"], workdir: /w, options: [--x]}
python: python3
sbatch: [--reservation=mine, -x n1, --gres=nvme:1]
"""


def test_every_field_is_read_as_it_is_written(write):
    """YAML would make 1:00:00 a number of seconds, 010 the number 8, and yes a truth value."""
    write("mine", WHOLE)
    profile = profiles.load("mine")
    assert profile.time == "1:00:00"
    assert profile.env == {"SPEED": "010", "FLAG": "yes", "EMPTY": "", "WHEN": "2026-01-01", "RATE": "1e-3"}
    assert profile.node == Node(8, 96, "1000G", "80G", "a100")
    assert profile.container == Container("pyxis", "a.sqsh", ["/data", "/a:/b:ro"], "/w", ["--x"])
    assert (profile.nodes, profile.max_requeues, profile.watchdog.hang_s, profile.preempt) == (2, 0, 120, "chain")
    assert profile.share.cpus_per_proc == 3
    assert profile.share.memory == "500G"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("partiton: gpu", "unknown field 'partiton'; did you mean 'partition'"),
        ("node: {gpu: 8}", "unknown field 'node.gpu'; did you mean 'gpus'"),
        ("cpus_per_task: 4", "unknown field 'cpus_per_task'; use the field `cpus_per_proc`"),
        ("mem: 4G", "unknown field 'mem'; use the field `mem_per_node`"),
        ("colour: red", "unknown field 'colour'; the fields are engine, partition"),
        ("engine: lsf", "engine: 'lsf' is none of slurm, local; use one"),
        ("signal: KILL", "signal: 'KILL' is none of USR1, USR2, TERM; use one"),
        ("nodes: 0", "nodes: must be a whole number of at least 1, not 0; raise it"),
        ("nodes: two", "nodes: must be a whole number, not 'two'; write digits only"),
        ("nodes: [1]", r"nodes: must be one value, not \['1'\]; write `nodes: VALUE`"),
        ("env: [A=1]", "env: must be a mapping of names to values"),
        ("env: {A-B: 1}", "env.A-B: not a name of a variable; use letters, digits and '_'"),
        ("setup: module load", "setup: must be a list of lines"),
        ("modules: ['a; rm -rf b']", "modules: 'a; rm -rf b' is not a module's name; write one per entry"),
        ("time: tomorrow", "time: 'tomorrow' is not a time limit; write '1-00:00:00' or '02:30:00'"),
        (
            "time: 2-00:00\nmax_time: 1-00:00:00",
            r"time: 2-00:00 is longer than the cluster allows; use 1-00:00:00 or less",
        ),
        ("time: 0:01:00", "time: a job of 0:01:00 would be told to stop as it starts; make it longer than"),
        ("mem_per_node: 64", "mem_per_node: '64' is not a size; write a whole number with a unit, such as 64G"),
        ("node: {memory: 1.5T}", "node.memory: '1.5T' is not a size; write a whole number with a unit"),
        ("gpus_per_node: 9\nnode: {gpus: 8}", r"gpus_per_node: 9 asked for, a node of 'bad' has 8 .*; use 8 or fewer"),
        (
            "procs_per_node: 9\nnode: {cpus: 8}",
            "procs_per_node: 9 processes of 1 CPUs asked for, a node of 'bad' has 8",
        ),
        ("network: {nccl_ib_disable: maybe}", "network.nccl_ib_disable: 'maybe' is neither true nor false"),
        ("container: {runtime: pyxis}", "container: has no `image`; add one"),
        ("container: {image: x}", "container: has no `runtime`; add one"),
        ("container: docker", "container: must be a mapping of fields to values"),
        ("container: {runtime: docker, image: x}", "container.runtime: 'docker' is none of pyxis, apptainer"),
        (
            "container: {runtime: pyxis, image: x, mounts: [data]}",
            "container.mounts: 'data' is not a mount; write /source",
        ),
        ("extends: [gpu]", r"extends: must be the name of one profile, not \['gpu'\]; write `extends: NAME`"),
        ("network: {interface: ib 0}", "network.interface: 'ib 0' holds a space; write names as"),
        ("scratch: tmp/$USER", "scratch: .* is not an absolute path; start it with / or"),
        ("partition: 'a b'", "partition: 'a b' holds a space, a quote or a '#'"),
        ("engine: local\npartition: x", "partition: the local engine has no use for it; leave it out"),
        ("nodes: [", "not valid YAML"),
        ("nodes: 1\nnodes: 2", "'nodes' is there twice; join the two"),
        ("[1, 2]", "not a mapping; write lines of `field: value`"),
    ],
)
def test_a_profile_with_an_error_names_file_and_field_and_ends_in_the_fix(write, content, message):
    write("bad", content)
    with pytest.raises(UserError, match=rf"^cluster/profiles/bad\.yaml: .*{message}"):
        profiles.load("bad")


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("--nodes=4", "use the field `nodes`"),
        ("-N 4", "use the field `nodes`"),
        ("-N4", "use the field `nodes`"),
        ("--part=gpu", "use the field `partition`"),
        ("--ntasks=4", "use the field `procs_per_node`"),
        ("--output /tmp/x", "use nothing: what a job says is in its run's job.log"),
        ("--array=1-4", "use --sweep or --repeat"),
        ("--no-requeue", "use the fields `preempt` and `max_requeues`"),
        ("--gres=gpu:4", "use gpus_per_node with `gpu_request: gres`"),
        ("--exclusive\n--nodes=4", "is not an option; write one per entry"),
        ("exclusive", "is not an option; write one per entry"),
    ],
)
def test_options_that_the_script_depends_on_are_refused_with_the_right_field(line, fix):
    with pytest.raises(UserError, match=f"sbatch: .*{fix}"):
        Profile("mine", sbatch=[line])


@pytest.mark.parametrize(
    "line", ["--reservation=x", "--exclude=n1", "-x n1", "--gres=nvme:1", "--exclusive", "--hint=x"]
)
def test_other_options_are_passed_through(line):
    assert Profile("mine", sbatch=[line]).sbatch == [line]


def test_there_is_a_process_for_each_gpu():
    assert Profile("mine", gpus_per_node=8).procs_per_node == 8
    assert Profile("mine", gpus_per_node=8, procs_per_node=2).procs_per_node == 2
    assert Profile("mine").procs_per_node == 1


def test_an_unknown_cluster_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'slurm-dev'"):
        profiles.load("slurm_dev")


def test_the_working_directory_wins_over_the_users_folder_and_that_over_ours(write, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config/paperscale/profiles"
    folder.mkdir(parents=True)
    (folder / "slurm.yaml").write_text("partition: users\n")
    assert profiles.load("slurm").partition == "users"
    write("slurm", "partition: here\n")
    assert profiles.load("slurm").partition == "here"


def test_a_profile_extends_another(write):
    write("big", "extends: gpu\npartition: big\nnode: {gpu_memory: 96G}\nenv: {A: 1}\n")
    write("bigger", "extends: big\ngpus_per_node: 4\nenv: {B: 2}\nscratch: null\n")
    profile = profiles.load("bigger")
    assert (profile.partition, profile.gpus_per_node, profile.procs_per_node) == ("big", 4, 4)
    assert (profile.node.gpus, profile.node.gpu_memory) == (8, "96G")
    assert profile.env == {"A": "1", "B": "2"}
    assert profile.scratch is None


def test_a_mistake_below_names_the_file_that_has_it(write):
    write("base", "partiton: x\n")
    write("top", "extends: base\n")
    with pytest.raises(UserError, match=r"^cluster/profiles/base\.yaml: unknown field 'partiton'"):
        profiles.load("top")


def test_profiles_that_extend_each_other_are_refused(write):
    write("a", "extends: b\n")
    write("b", "extends: a\n")
    with pytest.raises(UserError, match=r"b\.yaml: extends: 'a' leads back to this profile"):
        profiles.load("a")


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


def test_sizes():
    assert size_bytes("64G") == 64 << 30
    assert size_text(250 * 1024) == "250G"
    assert size_text(21695) == "21695M"


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("gpu:a100:8(S:0-1)", [("a100", 8)]),
        ("gpu:2", [("", 2)]),
        ("gpu", [("", 1)]),
        ("nvme:1,gpu:h100:4(IDX:0,2-3),gpu:a100:2", [("h100", 4), ("a100", 2)]),
        ("(null)", []),
    ],
)
def test_the_gpus_of_a_gres(gres, expected):
    assert list(gpus_of(gres)) == expected


def test_no_sbatch(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"sbatch is not on PATH; .* use --cluster local"):
        refuse(profiles.load("slurm"))
    assert main(["cluster", "init"]) == 2
    assert "sbatch is not on PATH" in capsys.readouterr().err
    assert main(["cluster", "check", "slurm"]) == 2
    assert "FAIL  SLURM" in capsys.readouterr().out


def test_the_local_cluster_is_one_node(capsys):
    with pytest.raises(UserError, match="use --nodes 1"):
        refuse(profiles.load("local"), nodes=2)
    assert problems(profiles.load("local")) == []
    assert main(["cluster", "check", "local"]) == 0


def test_the_list_names_where_each_profile_comes_from_and_what_is_wrong(write, capsys):
    write("mine", "partition: x\n")
    write("bad", "nodes: two\n")
    assert main(["cluster", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["mine"]["file"] == "cluster/profiles/mine.yaml"
    assert rows["gpu"]["procs_per_node"] == 8
    assert "must be a whole number" in rows["bad"]["error"]
    assert main(["cluster", "list"]) == 0
    assert capsys.readouterr().out.startswith("profile\tengine\tshape\tfile\n"), "plain where there is no terminal"
