"""The job files of docs/jobs: their shell parses, and their commands are accepted."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from kdhiera.config import load

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "docs" / "jobs"
SCRIPTS = sorted(JOBS.glob("*.sh"))
CONFIG = "configs/k400_hiera_base.yaml"
COMMAND = re.compile(r"(?:kdhiera (?:extract-teachers|distill)|-m kdhiera\.stages\.distill) .*")
PLACES = {
    '"$@"': CONFIG,
    "/config/run.yaml": CONFIG,
    "$address": "head:6379",
    "docs/jobs/slurm-distill.sh": "-m kdhiera.stages.distill",
    "docs/jobs/slurm-extract.sh": "kdhiera extract-teachers",
    "docs/jobs/spot-distill.sh": "kdhiera distill",
}


def commands(text: str) -> list[list[str]]:
    """Command lines of kdhiera in a text, without what the shell makes of their ends."""
    for place, what in PLACES.items():
        text = text.replace(place, what)
    found = [re.split(r" && | &$|'|`|\)$| #", line)[0] for line in COMMAND.findall(text)]
    return [shlex.split(line) for line in found]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shell_parses_and_a_missing_config_is_told(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: " in done.stderr


@pytest.mark.parametrize(
    "page", [*SCRIPTS, JOBS / "kuberay.yaml", JOBS.parent / "cluster.md"], ids=lambda p: p.name
)
def test_commands_name_settings_that_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    if page.suffix == ".yaml":
        text = yaml.safe_load(text)["spec"]["entrypoint"].replace(" && ", "\n")
    found = commands(text)
    assert found
    for words in found:
        config, *overrides = words[2:]
        assert config == CONFIG, words
        load(config, overrides)


def test_the_rayjob_shares_its_volumes_and_has_room_for_its_workers() -> None:
    job = yaml.safe_load((JOBS / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    pods = [cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]]
    for pod in pods:
        (container,) = pod["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]} == {"data", "config"}
    asked = int(re.findall(r"train\.num_workers=(\d+)", job["spec"]["entrypoint"])[0])
    gpus = int(pods[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert asked == group["replicas"] * gpus
