"""The study's driver, on two small runs of the real task."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from kdhiera.demo.prepare import Prepared
from kdhiera.pipelines import study

REPOSITORY = Path(__file__).parents[2]
VARIANTS = {"both": {}, "image-only": {"objective.teachers": ["image"]}}
SMALL = {
    "clip": {"num_frames": 4, "height": 64, "width": 64},
    "train": {"epochs": 1, "warmup_epochs": 0, "lr": 1e-3, "batch_size": 8, "num_threads": 1},
}


def write_configs(folder: Path) -> None:
    """The study's own files, with two variants, a shard and small clips."""
    shutil.copytree(REPOSITORY / "configs" / "study", folder)
    base = yaml.safe_load((folder / "base.yaml").read_text())
    base |= SMALL
    base["data"]["shards"] = ["demo-data/shards/train-000003.tar"]
    base["views"]["num"] = 1
    base["evaluate"]["methods"] = ["linear"]
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    whole = yaml.safe_load((folder / "study.yaml").read_text())
    whole["variants"] = VARIANTS
    whole["questions"] = [
        question
        for question in whole["questions"]
        if {c["variant"] for c in question["contrasts"]} <= {"both", "image-only"}
        and {c["against"] for c in question["contrasts"]} <= {"both", "image-only"}
    ]
    (folder / "study.yaml").write_text(yaml.safe_dump(whole))
    for name in ("labels", "fresh"):
        part = yaml.safe_load((folder / f"{name}.yaml").read_text())
        part["questions"] = []
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(part))


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_what_is_missing_is_run_and_the_page_written(
    demo: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-data").symlink_to(demo.train[0].parents[1])
    write_configs(tmp_path / "configs" / "study")
    known = json.loads((REPOSITORY / "docs" / "results" / "controls.json").read_text())
    controls = tmp_path / "docs" / "results" / "controls.json"
    controls.parent.mkdir(parents=True)
    controls.write_text(json.dumps({fold: known[fold] for fold in ("1", "2", "3")}))

    arguments = ["--part", "study", "seeds=[0]"]
    assert study.main(arguments) == 0
    told = capfd.readouterr().out
    assert "2 runs, 0 done" not in told  # the plan of a single ablation is `ablate`'s to print
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "- study: 2 of 10 runs done" in page
    assert "- fresh: 0 of 15 runs done" in page
    assert "image teacher, pooled" in page
    found = {one["name"]: one for one in json.loads(controls.read_text())["0"]}
    mine = {one["name"]: one for one in known["0"] if one["name"] in found}
    assert {name: found[name] for name in mine} == mine
    records = tmp_path / "docs" / "results" / "records"
    before = {path: path.stat().st_mtime_ns for path in records.rglob("*") if path.is_file()}
    assert len(before) == 2

    shutil.rmtree(tmp_path / "runs")  # records outlive weights and caches
    shutil.rmtree(tmp_path / "caches")
    assert study.main(arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in records.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "caches").exists()
    assert (tmp_path / "docs" / "results.md").read_text() == page
