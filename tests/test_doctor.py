"""The doctor: what is wrong is found, said with its fix, and never a traceback or a wait without end."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from paperscale.cli import main
from paperscale.doctor import Asked, checks, findings, machine, scheduler, software, storage, tracking
from paperscale.doctor import names as host_names
from paperscale.errors import UserError
from paperscale.findings import Finding, exit_code

HEALTHY = {
    "torch": "2.13.0+cu130",
    "cuda": "13.0",
    "hip": None,
    "cudnn": "9.10.2",
    "nccl": "2.27.5",
    "devices": [{"name": "NVIDIA H100", "memory": 80 << 30, "capability": [9, 0]}] * 8,
    "architectures": ["sm_80", "sm_90", "compute_90"],
    "error": None,
    "visible": None,
    "driver_gpus": ["NVIDIA H100"] * 8,
    "driver_cuda": "13.0",
}
PARTITION = "PartitionName={} TotalNodes=2 MaxTime=01:00:00 GraceTime=0 PreemptMode={} State=UP\n"


@pytest.fixture
def laptop(monkeypatch, tmp_path):
    """A machine without SLURM, GPU or W&B key."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "OMP_NUM_THREADS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))


def doctor(capsys, *words: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and the findings by name."""
    code = main(["doctor", *words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert len({check["name"] for check in found}) == len(found), "each finding has a name of its own"
    return code, {check["name"]: check for check in found}


def levels(found) -> dict[str, str]:
    """The levels of findings; every warning and failure ends in a fix, and nothing else has one."""
    found = list(found)
    assert all(bool(check.fix) == (check.level != "OK") for check in found), found
    return {check.name: check.level for check in found}


# -- the whole --------------------------------------------------------------------------------------------------------


def test_a_laptop_without_slurm_gpu_and_key_is_well(laptop, capsys):
    _, found = doctor(capsys, "--cluster", "local")
    for name in ("Python", "torch", "GPUs", "deepspeed", "compiled operators", "host name", "W&B", "SLURM", "profile"):
        assert found[name]["level"] == "OK", found[name]
    assert {"runs: type", "runs: room", "runs: writes", "runs: locks", "runs: clock", "runs: speed"} <= set(found)
    assert found["GPUs"]["found"] == "none: trains on the CPU"


def test_the_exit_code_is_that_of_the_worst_finding(laptop, capsys):
    assert [exit_code([Finding(level, "x", "y")]) for level in ("OK", "WARN", "FAIL")] == [0, 1, 2]
    assert exit_code([Finding("FAIL", "x", "y"), Finding("WARN", "x", "y")]) == 2
    assert main(["doctor", "--quick", "--cluster", "slurm"]) == 2
    out = capsys.readouterr().out
    assert "FAIL  SLURM              no sbatch on PATH: --cluster local works\n      -> run this on a login node" in out


def test_a_quick_look_imports_nothing_heavy(laptop):
    code = (
        "import sys; from paperscale.cli import main; main(['doctor', '--quick']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'wandb', 'deepspeed')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "runs: speed" not in result.stdout


def test_a_check_that_crashes_or_hangs_is_a_finding(monkeypatch):
    def crash(asked):
        yield Finding("OK", "first", "it began well")
        raise RuntimeError("boom")

    def hang(asked):
        time.sleep(60)
        yield Finding("OK", "never", "")

    def refuse(asked):
        raise UserError("scontrol: no answer; wait")
        yield

    work = [
        findings.Work("crash", crash),
        findings.Work("refuse", refuse),
        findings.Work("hang", hang, 0.2),
        findings.Work("last", software.python),
    ]
    monkeypatch.setattr(findings, "all_work", lambda asked: work)
    began, found = time.monotonic(), list(checks(Asked()))
    assert time.monotonic() - began < 5
    assert levels(found) == {"first": "OK", "crash": "FAIL", "refuse": "FAIL", "hang": "FAIL", "Python": "OK"}
    assert found[1].found == "this check failed: RuntimeError: boom"
    assert (found[2].found, found[2].fix) == ("scontrol: no answer", "wait")
    assert found[3].found == "no answer within 0.2 s"


# -- software ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "specifier", "level", "found"),
    [
        ("lightning", ">=2.5.2", "OK", ""),
        ("lightning", ">=99", "FAIL", "Paperscale works with >=99"),
        ("no-such-package", ">=1", "FAIL", "not installed"),
    ],
)
def test_packages_are_compared_with_what_paperscale_needs(name, specifier, level, found):
    check = software.package(name, specifier)
    assert check.level == level
    assert found in check.found
    assert check.fix == ("" if level == "OK" else f"pip install '{name}{specifier}'")


@pytest.mark.parametrize("version", software.COMPROMISED_LIGHTNING)
def test_compromised_releases_of_lightning_are_a_failure(monkeypatch, version):
    monkeypatch.setattr(software, "_version", lambda name: version)
    check = software.package("lightning", ">=2.5.2")
    assert check.level == "FAIL"
    assert check.found == f"{version} is a compromised release"


@pytest.mark.parametrize(
    ("changes", "name", "level", "words"),
    [
        ({}, "GPUs", "OK", "8 of NVIDIA H100, 80 GiB"),
        ({}, "driver", "OK", "runs torch's CUDA 13.0"),
        ({"cuda": None, "devices": [], "nccl": None}, "GPUs", "FAIL", "this torch is built for the CPU"),
        ({"devices": [], "error": "driver too old", "driver_cuda": "12.4"}, "GPUs", "FAIL", "driver too old"),
        ({"driver_cuda": "12.4"}, "driver", "FAIL", "of CUDA 12.4, torch is built for 13.0"),
        ({"cuda": "12.8", "driver_cuda": "12.4"}, "driver", "OK", "runs torch's CUDA 12.8"),
        ({"devices": HEALTHY["devices"][:3]}, "GPUs", "FAIL", "torch sees 3 of 8"),
        ({"devices": HEALTHY["devices"][:3], "visible": "0,1,2"}, "GPUs", "OK", "3 of NVIDIA H100"),
        ({"architectures": ["sm_70", "sm_80"]}, "GPUs", "FAIL", "sm_90; torch has code for sm_70, sm_80"),
        ({"architectures": ["sm_80", "compute_80"]}, "GPUs", "OK", "8 of NVIDIA H100"),
        ({"nccl": None}, "NCCL", "FAIL", "cannot train together"),
    ],
)
def test_torch_is_compared_with_the_driver_and_the_gpus(changes, name, level, words):
    found = {check.name: check for check in software.judge_torch({**HEALTHY, **changes})}
    levels(found.values())
    assert found[name].level == level
    assert words in found[name].found


def test_what_torch_finds_on_this_machine_is_read_from_a_process_of_its_own(laptop):
    found = {check.name: check for check in software.torch(Asked())}
    assert levels(found.values())["torch"] == "OK"
    assert "torch.cuda" not in found["torch"].found


def test_the_lock_that_a_killed_compilation_left_is_named(tmp_path, monkeypatch):
    """Torch's own lock: every later job waits for it without a word."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    path = tmp_path / "cpu_adam/lock"
    compiling = FileBaton(str(path))
    assert compiling.try_acquire()
    (held,) = software.stale_locks(Asked())
    assert held.level == "OK"
    assert f"process {os.getpid()} compiles it" in held.found
    os.close(compiling.fd)  # as the system does for a process that is killed
    (young,) = software.stale_locks(Asked())
    assert young.level == "WARN"
    os.utime(path, (time.time() - 7200,) * 2)
    (old,) = software.stale_locks(Asked())
    assert (old.level, old.fix) == ("FAIL", f"rm {path}")
    assert "2.0 h old and nobody holds it" in old.found


# -- machine ----------------------------------------------------------------------------------------------------------


def test_a_quota_of_cpu_time_is_found_in_either_version_of_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_MINE", tmp_path / "mine")
    mine, v1, v2 = tmp_path / "mine", tmp_path / "cpu/job", tmp_path / "job/step"
    v1.mkdir(parents=True)
    v2.mkdir(parents=True)
    assert machine.cpu_quota() is None
    mine.write_text("0::/job/step\n")
    (v2 / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_quota() is None
    (v2.parent / "cpu.max").write_text("50000 100000\n")
    assert machine.cpu_quota() == 0.5
    (warning,) = (check for check in machine.cpus(Asked()) if check.name == "CPUs")
    assert (warning.level, warning.fix) == ("WARN", "ask for more CPUs, or export OMP_NUM_THREADS=1")
    mine.write_text("4:cpu,cpuacct:/job\n")
    (v1 / "cpu.cfs_quota_us").write_text("-1\n")
    assert machine.cpu_quota() is None
    (v1 / "cpu.cfs_quota_us").write_text("150000\n")
    (v1 / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpu_quota() == 1.5


def test_few_open_files_are_a_warning_with_the_command(tmp_path):
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512)); "
        "from paperscale.doctor import machine, Asked; print(*machine.limits(Asked()), sep='\\n')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "level='WARN', name='open files', found='512 of at most 512" in out


def test_more_threads_than_cores_are_a_warning(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "9999")
    assert levels(machine.cpus(Asked()))["threads"] == "WARN"


@pytest.mark.parametrize(
    ("cluster", "job", "level"), [(None, None, "OK"), ("slurm", None, "OK"), ("slurm", "1", "WARN")]
)
def test_a_node_whose_own_name_is_a_loopback_address_is_warned_of_in_its_job(monkeypatch, cluster, job, level):
    """Debian's default: harmless for one machine, a trap for Gloo between several."""
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    found = {check.name: check for check in host_names.own_name(Asked(cluster))}
    assert levels(found.values()) == {"host name": level, "name service": "OK"}


# -- file systems -----------------------------------------------------------------------------------------------------


def test_a_small_file_system_in_memory_is_found(small_disk, monkeypatch, capsys, laptop):
    monkeypatch.setenv("PAPERSCALE_RUNS", str(small_disk / "runs"))
    monkeypatch.chdir(small_disk)
    code, found = doctor(capsys, "--quick")
    assert code == 2
    assert found["runs: type"]["level"] == "WARN"
    assert found["runs: type"]["found"].startswith(f"tmpfs at {small_disk}")
    assert found["runs: room"]["level"] == "FAIL"
    assert found["runs: writes"]["level"] == found["runs: locks"]["level"] == "OK"
    assert not list(small_disk.iterdir()), "nothing is left behind"


def test_data_may_be_read_only_but_runs_may_not(tmp_path):
    facts = {"error": "Read-only file system"}
    assert levels(storage.judge(storage.FileSystem("data", tmp_path), facts)) == {"data: writes": "OK"}
    assert levels(storage.judge(storage.FileSystem("runs", tmp_path), facts)) == {"runs: writes": "FAIL"}


def test_what_a_file_system_lacks_is_said_with_the_fix(tmp_path):
    bad = {
        "error": None,
        "renames": "Operation not supported",
        "exclusive": "",
        "flock": "Function not implemented",
        "fcntl": "",
        "skew_s": -30.0,
        "resolution_s": 1.0,
        "write_mb_s": 5.0,
        "read_mb_s": 200.0,
        "files_per_s": 20.0,
    }
    found = {check.name: check for check in storage.judge(storage.FileSystem("runs", tmp_path), bad)}
    expected = {"runs: writes": "FAIL", "runs: locks": "WARN", "runs: clock": "WARN", "runs: speed": "WARN"}
    assert expected.items() <= levels(found.values()).items()
    assert found["runs: clock"].found.startswith("times of files are 30.0 s behind this machine's clock")


def test_a_file_system_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    hangs = tmp_path / "hangs.py"
    hangs.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(storage, "_FACTS", hangs)
    monkeypatch.setattr(storage, "_LIMIT_S", 0.3)
    began = time.monotonic()
    found = list(storage.check(storage.FileSystem("runs", tmp_path), Asked()))
    assert time.monotonic() - began < 5
    assert levels(found)["runs: file system"] == "FAIL"


def test_mounts_with_spaces_are_told_from_their_neighbours(tmp_path):
    folder = tmp_path / "with space"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode:
        pytest.skip("needs root to mount a file system")
    try:
        assert storage.mount_of(folder / "runs") == (str(folder), "tmpfs")
        assert storage.mount_of(tmp_path / "with space too")[0] != str(folder)
    finally:
        subprocess.run(["umount", folder], check=True)


# -- W&B and data -----------------------------------------------------------------------------------------------------


def test_wandb_that_does_not_answer_is_a_warning_within_seconds(laptop, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(tracking, "LIMIT_S", 0.3)
    with socket.socket() as silent:  # takes the connection, says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        (check,) = tracking.wandb(Asked())
    assert check.level == "WARN"
    assert "WANDB_MODE=offline" in check.fix
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        (check,) = tracking.wandb(Asked())
    assert check.level == "OK"
    monkeypatch.setenv("WANDB_MODE", "offline")
    (check,) = tracking.wandb(Asked())
    assert check.level == "OK"


def test_damaged_shards_are_a_failure_and_a_quick_look_compares_sizes(laptop, own_shards, capsys):
    tar = sorted(own_shards.glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    assert doctor(capsys, "--quick", "--data", str(own_shards))[1]["shards"]["level"] == "OK"
    code, found = doctor(capsys, "--data", str(own_shards))
    assert (code, found["shards"]["level"]) == (2, "FAIL")
    tar.write_bytes(content[:-512])
    code, found = doctor(capsys, "--quick", "--data", str(own_shards))
    assert (code, found["shards"]["level"]) == (2, "FAIL")
    assert tar.name in found["shards"]["found"]
    assert doctor(capsys, "--quick", "--data", "file:///no/such/set")[1]["shards"]["level"] == "FAIL"


# -- SLURM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "name", "level"),
    [
        ("KillWait = 30 sec", "SLURM KillWait", "OK"),
        ("KillWait = 5 sec", "SLURM KillWait", "WARN"),
        ("MaxArraySize = 1", "SLURM arrays", "WARN"),
        ("MaxArraySize = 1001", "SLURM arrays", "OK"),
        ("ProctrackType = proctrack/pgid", "SLURM proctrack", "WARN"),
        ("JobRequeue = 0", "SLURM requeue", "OK"),
    ],
)
def test_settings_that_matter_are_judged(setting, name, level):
    config = scheduler.parse_config(f"Configuration data as of 2026-11-20T11:53:35\n{setting}\n")
    assert levels(scheduler.judge_config(config))[name] == level


def test_partitions_that_cancel_what_they_preempt_are_warned_of():
    config = {"PreemptType": "preempt/partition_prio"}
    fine = PARTITION.format("debug", "REQUEUE")
    assert levels(scheduler.judge_partitions(fine, config))["SLURM preemption"] == "OK"
    bad = fine + PARTITION.format("cheap", "CANCEL")
    found = {check.name: check for check in scheduler.judge_partitions(bad, config)}
    assert found["SLURM preemption"].level == "WARN"
    assert "another partition than cheap" in found["SLURM preemption"].fix
    assert found["SLURM partitions"].found == "debug (2 nodes, 01:00:00), cheap (2 nodes, 01:00:00)"
    assert levels(scheduler.judge_partitions(bad, {}))["SLURM preemption"] == "OK"


@pytest.mark.skipif(shutil.which("sinfo") is None, reason="needs SLURM's commands")
@pytest.mark.parametrize(("words", "level"), [((), "WARN"), (("--cluster", "slurm"), "FAIL")])
def test_slurm_without_a_configuration_is_a_failure_only_where_it_is_wanted(
    words, level, monkeypatch, capsys, tmp_path
):
    (tmp_path / "slurm.conf").write_text("\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    _, found = doctor(capsys, "--quick", *words)
    assert found["SLURM"]["level"] == level
    assert found["SLURM"]["found"].startswith("the commands do not work here (sinfo: error")
    assert "slurm.conf" in found["SLURM"]["fix"]


@pytest.mark.slurm
def test_a_cluster_that_works_is_found_well(capsys):
    _, found = doctor(capsys, "--quick", "--cluster", "slurm-dev")
    for name in ("SLURM", "SLURM version", "SLURM clock", "SLURM requeue", "SLURM partitions", "SLURM preemption"):
        assert found[name]["level"] == "OK", found[name]
    assert found["munge"]["found"] == "credentials are made and read"
    assert not [name for name, check in found.items() if name.startswith("profile") and check["level"] == "FAIL"]


@pytest.mark.slurm
def test_a_controller_that_is_down_is_said_to_be(tmp_path, monkeypatch, capsys):
    """The real commands, with a configuration whose controller listens nowhere."""
    text = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=True).stdout
    real = Path(scheduler.parse_config(text)["SLURM_CONF"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = {"SlurmctldPort": port, "MessageTimeout": 2, "TCPTimeout": 1}
    lines = [line for line in real.read_text().splitlines() if line.split("=")[0] not in ours]
    (tmp_path / "slurm.conf").write_text("\n".join([*lines, *(f"{name}={value}" for name, value in ours.items()), ""]))
    for other in ("cgroup.conf", "gres.conf"):
        if real.with_name(other).exists():
            shutil.copy(real.with_name(other), tmp_path)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    code, found = doctor(capsys, "--quick", "--cluster", "slurm-dev")
    assert (code, found["SLURM"]["level"]) == (2, "FAIL")
    assert found["SLURM"]["found"].startswith("the controller does not answer (")
    assert "DOWN" in found["SLURM"]["found"]
