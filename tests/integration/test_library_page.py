"""docs/library.md: its snippets name what exists, and they run."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from labelled_runs import write_splits
from real_runs import write_config

from kdhiera.demo.prepare import Prepared

PAGE = Path(__file__).parents[2] / "docs" / "library.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def imported(tree: ast.Module) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            names |= {alias.name: getattr(module, alias.name) for alias in node.names}
    return names


def test_every_command_has_its_snippet() -> None:
    told = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    commands = {"plan", "extract-teachers", "distill", "evaluate", "show", "export", "ablate"}
    assert commands | {"cache verify"} <= set(told)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.splitlines()[0][5:40])
def test_what_is_named_exists_and_takes_these_arguments(snippet: str) -> None:
    tree = ast.parse(snippet)
    names = imported(tree)
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id in names:
            keywords = {str(k.arg): None for k in call.keywords}
            inspect.signature(names[call.func.id]).bind(*[None] * len(call.args), **keywords)


@pytest.mark.long
def test_all_of_it_runs(
    usual: dict[str, Any], demo: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, on few clips: the page's paths and column are replaced, nothing else."""
    evaluate = {
        **write_splits(demo, tmp_path),
        "labels": ["direction"],
        "methods": ["linear"],
        "frame_stride": 3,
        "resamples": 100,
    }
    section = {"evaluate": evaluate, "views": {"num": 1}, "train": {"epochs": 1}}
    config = write_config(tmp_path, usual, **section)
    ablation = {
        "name": "small",
        "run_dir": str(tmp_path / "ablation"),
        "base": str(config),
        "variants": {"both": {}, "image": {"objective.teachers": ["image"]}},
    }
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(ablation))
    code = "\n".join(SNIPPETS)
    for theirs, ours in {
        "configs/demo.yaml": str(config),
        "configs/ablations/demo.yaml": str(tmp_path / "ablation.yaml"),
        "train.epochs=50": "train.epochs=2",
        "image.10.int8": "image.12.fp32",
    }.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["features"].shape == (1, names["student"].num_features)
    assert (tmp_path / "run-small" / "export" / "hiera.pth").is_file()
    card = (tmp_path / "run-small" / "export" / "README.md").read_text()
    assert "| distilled student |" in card
    assert "vit_small_patch14_dinov2" in card
    assert "24 of 24 samples" in card
