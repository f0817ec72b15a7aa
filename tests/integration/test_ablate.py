"""Ablations of real, very short runs."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from labelled_runs import NUM_CLIPS, write_splits
from matplotlib.image import imread
from real_runs import COMMAND, kdhiera, write_config

from kdhiera.ablation.records import load_record, record_path
from kdhiera.demo.prepare import Prepared
from kdhiera.errors import IncompleteError, MismatchError, StoppedError, UsageError
from kdhiera.pipelines.ablate import AblatePlan, AblateSummary, ablate
from kdhiera.progress import make_progress

VARIANTS = {"both": {}, "image-only": {"objective.teachers": ["image"]}}
BAD = {"train.lr": 1.0e30, "train.clip_grad": None, "train.warmup_epochs": 0}
STEPS = 3  # in an epoch

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def base(demo: Prepared, usual: dict[str, Any], usual_cache: Path, tmp_path_factory) -> Path:
    """A run of three steps over the usual cache."""
    folder = tmp_path_factory.mktemp("base")
    section = {
        **write_splits(demo, folder),
        "labels": ["category"],
        "groups": ["object", "background"],
        "frame_stride": 3,
        "methods": ["knn"],
        "neighbours": 5,
    }
    return write_config(
        folder,
        usual,
        cache={"dir": str(usual_cache)},
        train={"epochs": 1, "warmup_epochs": 0},
        evaluate=section,
    )


def write_ablation(folder: Path, base: Path, **sections: Any) -> Path:
    values = {
        "name": "teachers",
        "run_dir": str(folder / "runs"),
        "base": str(base),
        "variants": VARIANTS,
        "seeds": [0, 1],
        "metric": {"label": "category", "method": "k-NN"},
        **sections,
    }
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory) -> Path:
    """An ablation that is done: two variants, two seeds."""
    path = write_ablation(tmp_path_factory.mktemp("finished"), base)
    summary, plan = run(path)
    assert (summary.finished, summary.failures) == (4, {})
    assert plan.done == ()
    return path


@pytest.fixture
def write(finished: Path, base: Path, tmp_path: Path) -> Write:
    """Writes an ablation beside a copy of the finished runs."""
    shutil.copytree(finished.parent / "runs", tmp_path / "runs")
    return lambda **sections: write_ablation(tmp_path, base, **sections)


def run(path: Path, *overrides: str, **options: bool) -> tuple[AblateSummary, AblatePlan]:
    plans: list[AblatePlan] = []
    with make_progress() as progress:
        summary = ablate(path, overrides, progress=progress, on_plan=plans.append, **options)
    return summary, plans[0]


def plan_of(path: Path, *overrides: str) -> AblatePlan:
    return run(path, *overrides, dry_run=True)[1]


def times(folder: Path) -> dict[str, int]:
    """When checkpoints and exports were written."""
    files = [*folder.rglob("step-*.pt"), *folder.rglob("*.safetensors")]
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in files}


def remove_weights(folder: Path) -> None:
    for name in (*VARIANTS, "baselines"):
        shutil.rmtree(folder / name)


def test_an_ablation_leaves_a_report_tables_plots_and_records(finished: Path) -> None:
    folder = finished.parent / "runs"
    report = (folder / "report.md").read_text()
    assert "4 of 4 runs finished: 2 variants over 2 seeds" in report
    assert "objective.teachers=\\[image\\]" in report
    for name in ("accuracy", "curves"):
        assert imread(folder / "report" / f"{name}.png").std() > 0.01
    document = json.loads((folder / "table.json").read_text())
    assert {(v["variant"], tuple(v["seeds"])) for v in document["variants"]} == {
        ("both", (0, 1)), ("image-only", (0, 1)),
    }  # fmt: skip
    rows = (folder / "table.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 * 2 * 4  # two readouts; two students and two teachers
    assert (folder / "table.md").read_text() in report
    for variant in VARIANTS:
        for seed in (0, 1):
            record = load_record(record_path(folder / "records", variant, seed))
            assert (record.variant, record.seed, record.steps) == (variant, seed, STEPS)
            assert len(record.outcomes.uids) == NUM_CLIPS["test"]
            assert record.curve[-1].step == STEPS
            assert record.clip_macs > 1e6


def test_seeds_and_variants_are_other_runs(finished: Path) -> None:
    folder = finished.parent / "runs" / "records"
    found = {tuple(p.loss for p in load_record(path).curve) for path in folder.glob("*.json")}
    assert len(found) == 4


def test_the_same_command_runs_nothing(write: Write, tmp_path: Path) -> None:
    path = write()
    before = times(tmp_path)
    assert before
    (tmp_path / "runs" / "report.md").unlink()
    summary, plan = run(path)
    assert (summary.finished, plan.steps) == (4, {})
    assert times(tmp_path) == before
    assert Path(summary.report).is_file()


def test_records_outlive_the_weights(write: Write, tmp_path: Path, finished: Path) -> None:
    path = write()
    remove_weights(tmp_path / "runs")
    summary, plan = run(path)
    assert (summary.finished, plan.steps) == (4, {})
    again = (tmp_path / "runs" / "report.md").read_text()
    assert again == (finished.parent / "runs" / "report.md").read_text()


def test_records_may_lie_elsewhere(write: Write, tmp_path: Path) -> None:
    shutil.move(tmp_path / "runs" / "records", tmp_path / "kept")
    shutil.rmtree(tmp_path / "runs")
    assert plan_of(write(records=str(tmp_path / "kept"))).steps == {}


def test_only_what_is_new_is_run(write: Write) -> None:
    path = write()
    plan = plan_of(path, "seeds=[0, 1, 2]")
    assert plan.steps == dict.fromkeys(("both/seed-2", "image-only/seed-2"), STEPS)
    text = plan.describe()
    assert text.startswith("6 runs, 4 done, 2 to do\n  both        3 steps, seed 2\n")
    last = {"objective.layers": {"image": [12], "video": [3]}}
    found = plan_of(write(variants={**VARIANTS, "last": last}))
    assert set(found.steps) == {"last/seed-0", "last/seed-1"}


def test_a_damaged_record_is_made_again(write: Write, tmp_path: Path, caplog) -> None:
    """From the run's own folder: nothing is trained for it."""
    path = write()
    record = record_path(tmp_path / "runs" / "records", "both", 1)
    whole = load_record(record)
    record.write_text(record.read_text()[:200])
    before = times(tmp_path)
    summary, plan = run(path)
    assert list(plan.steps) == ["both/seed-1"]
    assert summary.finished == 4
    assert "both.seed-1.json is no record of a run" in caplog.text
    assert load_record(record).curve == whole.curve
    assert {k: v for k, v in times(tmp_path).items() if k.endswith(".pt")} == {
        k: v for k, v in before.items() if k.endswith(".pt")
    }


def test_what_the_cache_lacks_is_refused_before_anything_starts(base: Path, tmp_path: Path) -> None:
    variants = {
        **VARIANTS,
        "tube": {"objective.strategy": "tube"},
        "sparse": {"objective.draws": 5},
    }
    path = write_ablation(tmp_path, base, variants=variants)
    done = kdhiera("ablate", path)
    assert done.returncode == 3, done.stderr
    assert "2 variants cannot run, so none was started" in done.stderr
    assert "  tube: the cache in" in done.stderr
    assert "strategy tube (planned: attention)" in done.stderr
    assert "  sparse: " in done.stderr
    assert "mend or remove what is named here, or extract what the cache lacks" in done.stderr
    assert "both" not in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["ablation.yaml"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"variants": {"a": {"evaluate.test": "no-*.tar"}}}, "  a: .*no-"),
        ({"per_seed": {1: {"evaluate.test": "no-*.tar"}}}, "  both: .*no-"),
        ({"variants": {"a": {"student.taps": {"image": ["x", "y"], "video": ["z"]}}}}, "  a: "),
        ({"metric": {"label": "categori"}}, "label `categori`, but .* both has: category"),
        ({"metric": {"label": "category"}}, "method `linear probe`, but .* both has: k-NN"),
        (
            {"metric": {"label": "category", "method": "k-NN", "features": "audio teacher"}},
            "features `audio teacher`, but .*: distilled student, random student, .*image teacher",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    base: Path, tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        run(write_ablation(tmp_path, base, **sections))
    assert not (tmp_path / "runs").exists()


def test_a_run_that_fails_stops_no_other_and_is_tried_again(write: Write, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "runs" / "both")
    record_path(tmp_path / "runs" / "records", "both", 0).unlink()
    path = write(variants={"bad": BAD, **VARIANTS}, seeds=[0], baseline="both")
    with pytest.raises(IncompleteError, match="1 run of 3 failed") as caught:
        run(path)
    assert caught.value.exit_code == 5
    assert load_record(record_path(tmp_path / "runs" / "records", "both", 0)).steps == STEPS
    report = (tmp_path / "runs" / "report.md").read_text()
    assert "2 of 3 runs finished" in report
    assert "**1 run failed**" in report
    assert "| bad/seed-0 | step 2: the loss is not finite" in report
    assert "| bad | not run |" in report
    done = kdhiera("ablate", path, "--json")
    assert done.returncode == 5, done.stderr
    assert "3 runs, 2 done, 1 to do\n  bad  3 steps, seed 0\n" in done.stderr
    assert "failed    bad/seed-0: step 2: the loss is not finite" in done.stderr
    document = json.loads(done.stdout)
    assert document["finished"] == 2
    assert list(document["failures"]) == ["bad/seed-0"]


def test_other_settings_are_run_again_and_said(write: Write, tmp_path: Path, caplog) -> None:
    path = write(seeds=[0], variants={"both": {}})
    remove_weights(tmp_path / "runs")
    summary, plan = run(path, "overrides.train.epochs=2")
    assert "1 run recorded with other settings, to be run again: both/seed-0" in caplog.text
    assert plan.steps == {"both/seed-0": 2 * STEPS}
    record = load_record(record_path(tmp_path / "runs" / "records", "both", 0))
    assert (summary.finished, record.steps) == (1, 2 * STEPS)


def test_weights_of_other_settings_are_thrown_away_only_if_asked(
    write: Write, tmp_path: Path
) -> None:
    path = write(seeds=[0])
    before = times(tmp_path)
    changed = 'variants.both={"train.epochs": 2}'
    with pytest.raises(
        MismatchError, match=r"both/seed-0 holds a run with other settings(.|\n)*--overwrite"
    ):
        run(path, changed)
    assert times(tmp_path) == before
    summary, plan = run(path, changed, overwrite=True)
    assert (summary.finished, list(plan.steps)) == (2, ["both/seed-0"])
    after = times(tmp_path)
    assert after["runs/both/seed-0/export/model.safetensors"] > max(before.values())
    assert {k: v for k, v in after.items() if "both/seed-0" not in k} == {
        k: v for k, v in before.items() if "both/seed-0" not in k
    }


def test_a_dry_run_starts_nothing(base: Path, tmp_path: Path) -> None:
    path = write_ablation(tmp_path, base)
    summary, plan = run(path, dry_run=True)
    assert set(plan.steps.values()) == {STEPS}
    assert (summary.finished, summary.report) == (0, None)
    assert summary.describe() == "nothing was started"
    assert [p.name for p in tmp_path.iterdir()] == ["ablation.yaml"]


def test_json_is_on_stdout_and_the_plan_is_not(write: Write, tmp_path: Path) -> None:
    done = kdhiera("ablate", write(), "--json")
    assert done.returncode == 0, done.stderr
    report = str(tmp_path / "runs" / "report.md")
    assert json.loads(done.stdout) == {"finished": 4, "failures": {}, "report": report}
    assert "4 runs, 4 done, 0 to do" in done.stderr


def start(path: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "ablate", str(path), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(found: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not found():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def lines(folder: Path) -> list[str]:
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_stopped_by_sigterm_the_same_command_goes_on(write: Write, tmp_path: Path) -> None:
    path = write(variants={**VARIANTS, "long": {"train.epochs": 8}}, seeds=[0])
    folder = tmp_path / "runs" / "long" / "seed-0"
    process = start(path)
    wait_for(lambda: len(lines(folder)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == StoppedError.exit_code, errors
    assert "stopped: the same command goes on with the runs that are left" in errors
    assert "2 of 3 runs finished" in (tmp_path / "runs" / "report.md").read_text()
    before = lines(folder)
    assert len(before) < 8 * STEPS
    summary, plan = run(path)
    assert (summary.finished, list(plan.steps)) == (3, ["long/seed-0"])
    after = lines(folder)
    assert after[: len(before)] == before
    assert [json.loads(line)["step"] for line in after] == list(range(1, 8 * STEPS + 1))


def workers(pid: int) -> list[int]:
    """Ray workers under a process that do a run."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    direct = [int(p) for p in found.stdout.split()]
    names = {p: Path(f"/proc/{p}/cmdline") for p in direct}
    own = [p for p, f in names.items() if f.exists() and b"ray::_work" in f.read_bytes()]
    return [*own, *(w for p in direct for w in workers(p))]


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_a_stop_goes_on_and_a_killed_worker_is_replaced(base: Path, tmp_path: Path) -> None:
    epochs = 30
    path = write_ablation(
        tmp_path,
        base,
        variants={"long": {"train.epochs": epochs}, "short": {}, "bad": BAD},
        seeds=[0],
        overrides={"ray.enabled": True, "train.save_every": 5, "train.keep_last": 1},
    )
    folder = tmp_path / "runs" / "long" / "seed-0"
    process = start(path)
    wait_for(lambda: len(lines(folder)) >= STEPS, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == StoppedError.exit_code, errors
    stopped = lines(folder)

    process = start(path)
    wait_for(lambda: len(lines(folder)) > len(stopped), process)
    victims = workers(process.pid)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    output, errors = process.communicate(timeout=150)
    assert victims
    assert process.returncode == IncompleteError.exit_code, errors
    assert "failed    bad/seed-0: step 2: the loss is not finite" in errors
    assert "Traceback" not in errors
    steps = [json.loads(line)["step"] for line in lines(folder)]
    assert steps == list(range(1, epochs * STEPS + 1))
    assert lines(folder)[: len(stopped)] == stopped
    assert "2 of 3 runs finished" in (tmp_path / "runs" / "report.md").read_text()
    assert "to do\n  long" in output
