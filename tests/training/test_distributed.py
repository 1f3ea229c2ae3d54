"""Two processes on one machine, with gloo."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_two_processes_measure_what_one_does(tiny: list[str], tmp_path: Path) -> None:
    """Seven validation samples do not divide by two: neither is one counted twice, nor does a process wait for ever."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mtl"]
    flags = [*tiny, "--epochs", "2", "--device", "cpu", "--devices", "2"]
    flags[flags.index("--data.val-samples") + 1] = "7"
    subprocess.run([*command, "train", *flags], env=environment, check=True, timeout=200, stdout=subprocess.DEVNULL)
    (folder,) = (tmp_path / "runs").iterdir()
    rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["gain"]]
    # 24 samples in steps of 2 x 4: three steps an epoch, so that --batch-size is each process's own.
    assert [row["step"] for row in rows] == ["3", "6"]
    best = max(rows, key=lambda row: float(row["gain"]))
    report = tmp_path / "report.json"
    one = [*command, "evaluate", str(folder), "--json", str(report), "--devices", "1"]
    subprocess.run(one, env=environment, check=True, timeout=200, stdout=subprocess.DEVNULL)
    for name, value in json.loads(report.read_text()).items():
        assert value == pytest.approx(float(best[name]), rel=1e-5), name
