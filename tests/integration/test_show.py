"""Pictures of a real run: a cache with bad rows, a student trained on it."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from real_runs import Member, write_config, write_tar

from kdhiera.cli import main
from kdhiera.config import RunConfig, load
from kdhiera.errors import MismatchError, UsageError
from kdhiera.objective.losses import RunningMean
from kdhiera.objective.targets import normalise
from kdhiera.progress import Progress, make_progress
from kdhiera.stages.distill import distill, student_of
from kdhiera.stages.distillation.source import open_source
from kdhiera.stages.extract_teachers import extract
from kdhiera.stages.show import Kind, draw, parse_kinds, show
from kdhiera.training.batches import Position, make_batch
from kdhiera.training.checkpoint import load_latest

FAULTY = {
    "empty": "decode_error",
    "text": "decode_error",
    "cut": "decode_error",
    "lonely": "missing_member",
    "short": "too_short",
}


@pytest.fixture
def progress() -> Progress:
    with make_progress() as made:
        yield made


def _white_video(num_frames: int) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 255, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


@pytest.fixture(scope="module")
def trained(
    usual: dict[str, Any], real_members: list[Member], tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """Twelve good clips, one of them good for one teacher only, and five bad ones."""
    folder = tmp_path_factory.mktemp("show")
    good = real_members[:22]
    video = next(data for name, data in good if name.endswith(".mp4"))
    bad = [
        ("empty.mp4", b""),
        ("text.mp4", b"this is not a video\n" * 50),
        ("cut.mp4", video[: len(video) // 2]),
        ("lonely.json", b"{}"),
        ("short.mp4", _white_video(2)),
        ("white.mp4", _white_video(30)),
    ]
    shard = write_tar(folder / "mixed.tar", [*good, *bad])
    teachers = {**usual["teachers"]}
    teachers["video"] = {**teachers["video"], "factory": "nan_teacher:make"}
    config = load(
        write_config(
            folder,
            {**usual, "teachers": teachers},
            data={"shards": [str(shard)], "max_bad_fraction": 0.5},
            train={"epochs": 4, "batch_size": 4},
        )
    )
    with make_progress() as bars:
        extract(config, progress=bars)
        distill(config, progress=bars)
    return config


def test_all_kinds_are_drawn_and_the_offenders_are_named(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(trained.model_dump(mode="json", exclude_none=True)))
    stale = tmp_path / "clip-01.png"
    stale.touch()
    monkeypatch.setattr(
        "sys.argv", ["kdhiera", "show", str(path), "--clips", "1", "--out", str(tmp_path), "--json"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert not stale.exists()
    names = ["clip-00", "masks", "agreement", "statuses"]
    assert [p["path"] for p in told["pictures"]] == [str(tmp_path / f"{n}.png") for n in names]
    assert told["left_out"] == {}
    for name in names:
        with Image.open(tmp_path / f"{name}.png") as image:
            image.load()
            assert image.width > 1000
    statuses = told["statuses"]
    assert statuses["rows"] == {
        "ok": 24, "decode_error": 6, "missing_member": 2, "too_short": 2
    }  # fmt: skip
    assert statuses["columns"]["video.3.fp32"] == {"ok": 22, "nonfinite": 2}
    bad = {(b["key"], b["view"]): (b["status"], b["column"]) for b in statuses["bad"]}
    wanted = {(key, view): (status, None) for key, status in FAULTY.items() for view in range(2)}
    wanted |= {("white", view): ("nonfinite", "video.3.fp32") for view in range(2)}
    assert bad == wanted
    assert all(b["message"] for b in statuses["bad"] if b["column"] is None)


def test_frames_are_shown_of_what_decodes_in_part(trained: RunConfig, progress: Progress) -> None:
    (drawn,) = draw(trained, kinds=[Kind.STATUSES], num_clips=1, progress=progress).pictures
    frames = [axes for axes in drawn.figure.axes if axes.images]
    assert len(frames) == 2 + 3  # the two of the short video, three of the white one
    for axes in frames:
        assert np.asarray(axes.images[0].get_array()).mean() > 250
    words = "\n".join(text.get_text() for text in drawn.figure.texts)
    assert all(key in words for key in (*FAULTY, "white"))
    assert "24 of 34 rows" in words


def test_agreement_is_what_training_measured(trained: RunConfig, progress: Progress) -> None:
    (drawn,) = draw(trained, kinds=[Kind.AGREEMENT], num_clips=1, progress=progress).pictures
    explained, _, before, after = drawn.figure.axes
    names = [label.get_text() for label in explained.get_yticklabels()]
    assert names == ["image/6", "image/12", "video/3"]
    assert len(before.texts) == len(after.texts) == 9 * 3  # nano has nine blocks
    assert len(after.patches) == 3  # framed: what the three heads read
    grown = np.asarray(after.images[0].get_array()) - np.asarray(before.images[0].get_array())
    assert np.abs(grown).max() > 0.01  # training changed something
    wanted = _explained_in_one_batch(trained)
    assert [bar.get_width() for bar in explained.patches] == pytest.approx(wanted, rel=1e-4)


@torch.inference_mode()
def _explained_in_one_batch(config: RunConfig) -> list[float]:
    """As training measures it, over all clips at once."""
    state = load_latest(Path(config.run_dir) / "checkpoints")["learner"]
    with open_source(config, None) as opened:
        student, heads, specs = student_of(config, opened)
        student.eval().load_state_dict(state["student"])
        heads.load_state_dict(state["heads"])
        numbers = np.arange(opened.source.num_samples)
        batch = make_batch(
            opened.source.read(numbers, view=0),
            config.mask_schedule.widest,
            Position(step=0, epoch=0, view=0, draw=0),
            numbers,
        )
    predicted = heads(student(batch.pixels, batch.units), batch.units, batch.units)
    found = []
    for spec in specs:
        target = normalise(spec.decode(batch.columns[spec.column], batch.units), "layer_norm")
        mean = RunningMean(spec.width, torch.device("cpu"))
        mean.load_state_dict(state["means"][spec.name])
        found.append(float(mean.explained_variance(predicted[spec.name], target, "smooth_l1")))
    return found


def test_without_student_and_cache_the_rest_is_drawn(
    make_run: Callable[..., RunConfig],
    progress: Progress,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_run("nothing-yet")
    with caplog.at_level("INFO"):
        summary = show(config, kinds=[*Kind], num_clips=1, folder=tmp_path, progress=progress)
    assert [path.name for path in summary.paths] == ["clip-00.png", "masks.png"]
    assert summary.describe().splitlines() == [str(path) for path in summary.paths]
    for kind in (Kind.AGREEMENT, Kind.STATUSES):
        assert f"no picture of {kind}: there is no cache" in caplog.text
    with pytest.raises(UsageError, match="nothing to show: there is no cache"):
        show(config, kinds=[Kind.STATUSES], num_clips=1, folder=tmp_path, progress=progress)


def test_where_no_clip_decodes_the_statuses_still_say_why(
    make_run: Callable[..., RunConfig], trained: RunConfig, progress: Progress, tmp_path: Path
) -> None:
    junk = write_tar(tmp_path / "mixed.tar", [("a.mp4", b"no"), ("b.mp4", b"")])
    config = make_run(cache={"dir": trained.cache.dir}, data={"shards": [str(junk)]})
    kinds = [Kind.CLIPS, Kind.MASKS, Kind.STATUSES]
    drawing = draw(config, kinds=kinds, num_clips=2, progress=progress)
    assert [drawn.kind for drawn in drawing.pictures] == [Kind.STATUSES]
    assert drawing.left_out == dict.fromkeys(kinds[:2], "no clip of data.shards decodes")
    with pytest.raises(UsageError, match=r"no clip of data\.shards decodes"):
        show(config, kinds=[Kind.CLIPS], num_clips=2, folder=tmp_path, progress=progress)


def test_what_belongs_to_another_config_is_refused(
    trained: RunConfig, progress: Progress, tmp_path: Path
) -> None:
    other_clips = trained.model_copy(update={"views": trained.views.model_copy(update={"seed": 5})})
    for kind in (Kind.AGREEMENT, Kind.STATUSES):
        with pytest.raises(MismatchError, match=r"views\.seed|seed"):
            draw(other_clips, kinds=[kind], num_clips=1, progress=progress)
    other_loss = trained.model_copy(
        update={"objective": trained.objective.model_copy(update={"loss": "mse"})}
    )
    with pytest.raises(MismatchError, match="objective"):
        draw(other_loss, kinds=[Kind.AGREEMENT], num_clips=1, progress=progress)


def test_decoders_of_hidden_units_leave_the_bars_out(
    make_run: Callable[..., RunConfig], shards: list[Path], progress: Progress
) -> None:
    config = make_run(
        data={"shards": [str(shards[0])]},
        cache={"mode": "live"},
        masks={"ratio": 0.5, "draws": 1, "keep": "all"},
        objective={"kind": "masked", "teachers": ["video"]},
        scores={"teacher": "video", "source": "uniform"},
        train={"max_steps": 1, "warmup_epochs": 0, "batch_size": 4, "prefetch": 1},
    )
    distill(config, progress=progress)
    (drawn,) = draw(config, kinds=[Kind.AGREEMENT], num_clips=1, progress=progress).pictures
    before, after = drawn.figure.axes
    assert len(before.texts) == len(after.texts) == 9
    assert not after.patches  # decoders read many blocks


def test_kinds_are_read_with_commas_and_unknown_ones_named() -> None:
    assert parse_kinds(()) == (*Kind,)
    assert parse_kinds(["statuses,clips", "masks"]) == (Kind.CLIPS, Kind.MASKS, Kind.STATUSES)
    with pytest.raises(UsageError, match=r"'film'.*clips, masks, agreement, statuses"):
        parse_kinds(["clips, film"])
