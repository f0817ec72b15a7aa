import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdhiera.training.metrics import MetricLog, read_metrics


def write(folder: Path, steps: range, *, steps_done: int = 0, value: float = 1.0) -> None:
    with MetricLog(folder, steps_done=steps_done) as log:
        for step in steps:
            log.write(step, {"loss": value * step, "cosine/image/9": 0.5})


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    assert read_metrics(tmp_path) == [
        {"step": step, "loss": float(step), "cosine/image/9": 0.5} for step in (1, 2, 3)
    ]


def test_a_resumed_run_lists_no_step_twice(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 10), steps_done=4, value=-1.0)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["loss"] for line in lines[3:6]] == [4.0, -5.0, -6.0]
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in curves.Scalars("loss")]
    assert points == [(line["step"], line["loss"]) for line in lines]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, range(3, 5), steps_done=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_no_file_is_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
