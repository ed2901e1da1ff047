"""What `paperscale cluster` makes of a large GPU cluster.

There is none here: stand-ins for SLURM's commands answer what such a cluster's would, in the words of SLURM 23.02.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from paperscale.cli import main
from paperscale.doctor import Asked, scheduler
from paperscale.errors import UserError
from paperscale.findings import Finding
from paperscale.jobs import profile as profiles
from paperscale.jobs.cluster import check, problems
from paperscale.jobs.facts import Association, Cluster

PARTITIONS = """
PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES DefaultTime=NONE GraceTime=0 \
MaxTime=7-00:00:00 Nodes=c[1-2] PreemptMode=OFF State=UP
PartitionName=gpu AllowGroups=ALL AllowAccounts=lab,theirs AllowQos=normal,long Default=NO DefaultTime=01:00:00 \
GraceTime=60 MaxTime=2-00:00:00 Nodes=g[1-4] PreemptMode=REQUEUE State=UP
"""
NODE = (
    "NodeName={name} Arch=x86_64 CPUAlloc=0 CPUEfctv={cpus} CPUTot={cpus} Gres={gres} OS=Linux 5.14 #1 SMP "
    "RealMemory={memory} MemSpecLimit=24576 State={state} ThreadsPerCore=2 Partitions={partition} Reason=fan = loud"
)
NODES = [
    *(NODE.format(name=f"c{i}", cpus=64, gres="(null)", memory=280576, state="IDLE", partition="cpu") for i in (1, 2)),
    *(NODE.format(name=f"g{i}", cpus=128, gres="gpu:a100:8(S:0-1)", memory=1048576, state=state, partition="gpu")
      for i, state in enumerate(["MIXED", "IDLE", "IDLE+DRAIN"], 1)),
    NODE.format(name="g4", cpus=64, gres="gpu:v100:4", memory=524288, state="ALLOCATED", partition="gpu"),
]  # fmt: skip
CONFIG = "Configuration data as of today\nClusterName             = big\nKillWait                = 30 sec\n"
ASSOCIATIONS = "lab|normal,long\nother|normal\n"


@pytest.fixture
def big_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for scontrol, sacctmgr and sbatch on PATH."""
    answers = {"partition": PARTITIONS.strip(), "node": "\n".join(NODES), "config": CONFIG, "accounts": ASSOCIATIONS}
    for name, text in answers.items():
        (tmp_path / name).write_text(text + "\n")
    commands = {
        "scontrol": f'cat {tmp_path}/"${{@: -1}}"',
        "sacctmgr": f"cat {tmp_path}/accounts",
        "sbatch": 'cat >/dev/null; echo "sbatch: Job 1 to start" >&2',
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_proposal_for_a_gpu_partition_asks_for_whole_nodes_of_the_commonest_kind(big_cluster, capsys, shared_python):
    assert main(["cluster", "init", "big-gpu", "--partition", "gpu"]) == 0
    text = (big_cluster / "home/paperscale/profiles/big-gpu.yaml").read_text()
    assert "3 of the 4 nodes are like this one" in text
    assert "gpu: 3 x 8 a100 GPUs, 128 CPUs, 1000G; 1 x 4 v100 GPUs, 64 CPUs, 488G; at most 2-00:00:00" in text
    assert "(PreemptMode=REQUEUE): ended after 60 s" in text
    profile = profiles.load("big-gpu")
    assert (profile.partition, profile.account, profile.qos) == ("gpu", "lab", None)
    assert (profile.time, profile.max_time, profile.gpus_per_node) == ("1-00:00:00", "2-00:00:00", 8)
    assert (profile.node.gpus, profile.node.cpus, profile.node.memory, profile.node.gpu_type) == (
        8,
        128,
        "1000G",
        "a100",
    )
    assert {finding.level for finding in check(profile)} == {"OK"}


def test_the_default_partition_is_proposed_by_default(big_cluster, capsys):
    assert main(["cluster", "init"]) == 0
    profile = profiles.load("big")
    assert (profile.partition, profile.share.cpus, profile.share.memory) == ("cpu", 64, "0")
    text = (big_cluster / "home/paperscale/profiles/big.yaml").read_text()
    assert "# account: ...   # one of lab, other" in text


def finding(fields: str, nodes: int = 1) -> Finding:
    folder = Path("cluster/profiles")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.yaml").write_text(f"extends: gpu\nnode: {{cpus: 128, gpu_type: a100}}\n{fields}\n")
    (found,) = problems(profiles.load("mine"), nodes=nodes)
    return found


def test_the_partitions_own_rules_are_checked(big_cluster):
    assert finding("account: other").found == "partition 'gpu' of cluster 'mine' does not admit account 'other'"
    assert finding("qos: fast").fix == "set `qos:` in the profile to one of normal long"


def test_nodes_that_have_all_that_is_asked_for_are_counted(big_cluster):
    assert "4 nodes of 8 a100 GPUs, 128 CPUs, all memory asked for" in finding("", nodes=4).found
    assert "has 3 such nodes of 4 (types of GPU: a100, v100)" in finding("", nodes=4).found
    waiting = finding("", nodes=3)
    assert (waiting.level, waiting.found) == (
        "WARN",
        "2 of 3 fitting nodes of partition 'gpu' of cluster 'mine' are up",
    )


def test_accounts_are_those_of_the_user(big_cluster):
    assert Cluster().associations == [Association("lab", ("normal", "long")), Association("other", ("normal",))]
    folder = Path("cluster/profiles")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.yaml").write_text("partition: cpu\naccount: labb\n")
    found = {finding.name: finding for finding in check(profiles.load("mine"))}
    assert found["account"].fix == "set `account:` in the profile to one of lab other"


def test_a_controller_that_does_not_answer_is_said_to(big_cluster, capsys):
    (big_cluster / "bin/scontrol").write_text(
        "#!/bin/bash\necho 'slurm_load_partitions: connect failure' >&2; exit 1\n"
    )
    with pytest.raises(
        UserError, match=r"scontrol -o show: slurm_load_partitions: connect failure; `paperscale doctor`"
    ):
        problems(profiles.load("slurm"))
    assert main(["cluster", "check", "slurm"]) == 2
    assert "the controller does not answer (scontrol -o show: slurm_load_partitions: " in capsys.readouterr().out
    found = list(scheduler.profile(Asked("slurm", quick=True)))
    assert [(one.level, one.name) for one in found] == [("FAIL", "profile: SLURM")]
    assert "`scontrol ping`" in found[0].fix


def test_a_python_under_tmp_will_do_for_this_machine(monkeypatch):
    monkeypatch.setattr("sys.executable", "/tmp/venv/bin/python")
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert {finding.level for finding in check(profiles.load("local"))} == {"OK"}
