"""``python tests/cluster/fault_table.py MEASURED PAGE``: writes what `make faults` has measured into docs/faults.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from paperscale.bench.report import hardware

MARK = "<!-- measured -->"


def main(measured: Path, page: Path) -> None:
    """Put the table after the mark of the page."""
    rows = [json.loads(line) for line in measured.read_text().splitlines()]
    machine = hardware()
    slurm = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    lines = [
        f"{slurm}, nodes in namespaces of one machine ({machine['cores']} cores of {machine['cpu']}, which all nodes "
        "share), two ranks of a small network. In every row the run that went on was compared with one that nothing "
        "had happened to: weights, momenta, logged rows and samples of every step are the same, bit for bit.",
        "",
        "| fault | what `paperscale status` and the log say | noticed after | training again after |",
        "|---|---|---|---|",
    ]
    for row in rows:
        seen = f"{row['cause']}: {row['seen']}" if row["seen"] else row["cause"]
        lines.append(f"| {row['fault']} | {seen} | {row['detected_s']} s | {row['running_s']} s |")
    text = page.read_text()
    page.write_text(text[: text.index(MARK) + len(MARK)] + "\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
