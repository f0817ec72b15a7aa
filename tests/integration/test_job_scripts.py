"""The scripts of docs/jobs, run here: stopped by a signal, and started again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from real_runs import MakeConfig
from test_ranks_of_a_run import end, lines_of, wait_for

JOBS = Path(__file__).parents[2] / "docs" / "jobs"
TRAIN = {"train": {"epochs": 5, "num_threads": 1}}
KDHIERA = f"""#!/bin/bash
exec {sys.executable} -c 'from kdhiera.cli import main; main()' "$@"
"""
PYTHON = f"""#!/bin/bash
exec {sys.executable} "$@"
"""
SRUN = """#!/bin/bash
# Stands in for SLURM: as many tasks as the job has, on this machine.
shift # --kill-on-bad-exit=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
worst=0
for task in "${tasks[@]}"; do
  while :; do
    wait "$task"
    code=$?
    kill -0 "$task" 2>/dev/null || break
  done
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
# Stands in for SLURM: names this machine, and notes what is queued again.
case $1 in
  show) echo localhost ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


def start(folder: Path, script: str, *arguments: object) -> subprocess.Popen[str]:
    """A script of docs/jobs, with this environment's Python and stand-ins for SLURM."""
    tools = {"kdhiera": KDHIERA, "python": PYTHON, "srun": SRUN, "scontrol": SCONTROL}
    for name, text in tools.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return subprocess.Popen(
        ["bash", str(JOBS / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "REQUEUED": str(folder / "requeued"),
        },
    )


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.long
def test_a_slurm_job_stops_queues_again_and_goes_on(
    make_config: MakeConfig, own_cache: Path, tmp_path: Path
) -> None:
    path = make_config("slurm", **TRAIN)
    process = start(tmp_path, "slurm-distill.sh", path)
    wait_for(process, path, 3)
    (srun,) = children(process.pid)
    os.kill(srun, signal.SIGTERM)  # as SLURM signals the steps of a job, not its script
    code, _, err = end(process)
    assert code == 75, err
    assert "stopped after step" in err
    assert (tmp_path / "requeued").read_text().split() == [str(os.getpid())]
    code, out, err = end(start(tmp_path, "slurm-distill.sh", path))
    assert code == 0, err
    assert out.count("steps     15 of 8 clips") == 1
    assert len((tmp_path / "requeued").read_text().split()) == 1


@pytest.mark.slow
@pytest.mark.long
def test_a_spot_job_hands_the_signal_on_and_tries_a_crash_again(
    make_config: MakeConfig, own_cache: Path, tmp_path: Path
) -> None:
    path = make_config("spot", **TRAIN)
    process = start(tmp_path, "spot-distill.sh", path)
    wait_for(process, path, 3)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 75, err
    process = start(tmp_path, "spot-distill.sh", path)
    wait_for(process, path, len(lines_of(path)) + 2)
    (work,) = children(process.pid)
    os.kill(work, signal.SIGKILL)
    code, out, err = end(process)
    assert code == 0, err
    assert "attempt 1 ended with 137" in err
    assert "steps     15 of 8 clips" in out
    code, _, err = end(start(tmp_path, "spot-distill.sh", path, "train.lr=1"))
    assert code == 3, err
