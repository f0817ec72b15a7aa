import logging
import os
from pathlib import Path

import pytest
import torch

from kdhiera.errors import DamagedError
from kdhiera.training import checkpoint


def save(folder: Path, step: int, keep_last: int = 2) -> Path:
    state = {"step": step, "weights": {"a": torch.full((100,), float(step))}, "names": ["x"]}
    return checkpoint.save(folder, state, step=step, keep_last=keep_last)


def flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "c", 7)
    state = checkpoint.load_latest(tmp_path / "c")
    assert state is not None
    assert state["step"] == 7
    assert torch.equal(state["weights"]["a"], torch.full((100,), 7.0))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path / "nothing") is None


def test_the_last_few_are_kept_and_the_pointer_names_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep_last=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "latest", "step-00000003.pt", "step-00000003.pt.sha256", "step-00000010.pt",
        "step-00000010.pt.sha256",
    ]  # fmt: skip
    assert (tmp_path / "latest").read_text() == "step-00000010.pt\n"


@pytest.mark.parametrize("position", [0, 200, -1])
def test_a_flipped_bit_falls_back_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, position: int
) -> None:
    save(tmp_path, 1)
    flip_a_bit(save(tmp_path, 2), position)
    with caplog.at_level(logging.WARNING):
        state = checkpoint.load_latest(tmp_path)
    assert state is not None
    assert state["step"] == 1
    assert "step-00000002.pt is damaged (sha256 is" in caplog.text


@pytest.mark.parametrize("size", [0, 1000])
def test_a_cut_file_falls_back(tmp_path: Path, size: int) -> None:
    save(tmp_path, 1)
    os.truncate(save(tmp_path, 2), size)
    state = checkpoint.load_latest(tmp_path)
    assert state is not None
    assert state["step"] == 1


def test_a_crash_before_the_checksum_falls_back(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    path.with_name(path.name + ".sha256").unlink()
    (tmp_path / "latest").write_text("step-00000001.pt\n")
    state = checkpoint.load_latest(tmp_path)
    assert state is not None
    assert state["step"] == 1


def test_a_crash_while_writing_leaves_the_others_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)

    class Unsavable:
        def __reduce__(self) -> str:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        checkpoint.save(tmp_path, {"a": Unsavable()}, step=2, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest", "step-00000001.pt", "step-00000001.pt.sha256",
    ]  # fmt: skip


def test_all_damaged_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_bit(save(tmp_path, step), 50)
    with pytest.raises(DamagedError, match=r"all 2 checkpoints .* damaged: restore one"):
        checkpoint.load_latest(tmp_path)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/owned",)

    checkpoint.save(tmp_path, {"a": Payload()}, step=1, keep_last=1)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoint.load_latest(tmp_path)
    assert not (tmp_path / "owned").exists()
