"""The command line as a user meets it."""

import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kdhiera.cli import main

COMMANDS = [
    [],
    ["pack"],
    ["init"],
    ["doctor"],
    ["extract-teachers"],
    ["plan"],
    ["distill"],
    ["evaluate"],
    ["show"],
    ["export"],
    ["ablate"],
    ["config"],
    ["config", "show"],
    ["config", "check"],
    ["cache"],
    ["cache", "verify"],
    ["cache", "info"],
    ["cache", "diff"],
    ["cache", "ls"],
    ["cache", "drop"],
    ["cache", "gc"],
    ["cache", "bench-encodings"],
]
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


COMMAND = (sys.executable, "-c", "from kdhiera.cli import main; main()")


def kdhiera(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_begins_with_examples_and_ends_well(command: list[str]) -> None:
    done = kdhiera(*command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Examples:\n  kdhiera ")
    assert "Usage: " in done.stdout
    for line in done.stdout.partition("\n\n")[0].splitlines()[1:]:
        assert line.startswith("  kdhiera " + " ".join(command))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_command_that_keeps_nothing_with_75(name: str) -> None:
    code = (
        "import os, signal, sys\n"
        "import kdhiera.config\n"
        f"kdhiera.config.load = lambda *_: os.kill(os.getpid(), signal.{name})\n"
        "from kdhiera.cli import main\n"
        "sys.argv = ['kdhiera', 'config', 'show', 'any.yaml']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert done.stderr == "error: stopped: run the same command again to go on\n"


def test_a_signal_after_the_end_changes_nothing() -> None:
    code = (
        "import atexit, os, signal, sys\n"
        "from kdhiera.cli import main\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "sys.argv = ['kdhiera', '--version']\n"
        "main()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['kdhiera', '--help']\n"
        "from kdhiera.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'zarr', 'ray', 'pydantic', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    kdhiera("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 3  # a guard against imports, not a timing


def test_version_and_resolved_config() -> None:
    assert kdhiera("--version").stdout.startswith("kdhiera ")
    shown = kdhiera("config", "show", str(DEMO), "train.epochs=3")
    assert yaml.safe_load(shown.stdout)["train"]["epochs"] == 3
    as_json = kdhiera("config", "show", str(DEMO), "--json")
    assert json.loads(as_json.stdout)["name"] == "demo"


@pytest.fixture
def own_logging() -> Iterator[None]:
    """What a command sets up for its messages, taken down afterwards."""
    root = logging.getLogger()
    own = logging.getLogger("kdhiera")
    before, level = list(root.handlers), own.level
    root.handlers.clear()
    yield
    root.handlers[:] = before
    own.setLevel(level)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["extract-teachers"], "Missing argument 'CONFIG'"),
        (["extrakt"], "No such command"),
        (["distill", "nowhere.yaml"], "no config file at nowhere.yaml"),
        (["distill", str(DEMO), "train.epoch=3"], "did you mean `train.epochs`"),
        (["extract-teachers", str(DEMO), "clip.height=100"], "multiple of 32 px"),
        (["extract-teachers", str(DEMO), "data.shards=none-*.tar"], "no file matches"),
        (["extract-teachers", str(DEMO), "data.shards=pipe:touch x"], "scheme 'pipe:'"),
        (["distill", str(DEMO)], "extract-teachers"),
        (["evaluate", str(DEMO)], "kdhiera distill"),
        (["evaluate", str(DEMO), "evaluate=null"], "no `evaluate` section"),
        (["pack", "nowhere", "out"], "nowhere is not there"),
        (["pack", "nowhere", "out", "--split", "validation"], "such as validation=0.1"),
        (["pack", "nowhere", "s3://bucket/out"], "is an address"),
        (["init", "my.yaml"], "name your shards"),
        (["init", "my.yaml", "--videos", "none-*.tar"], "no file matches"),
        (["doctor", "nowhere.yaml"], "no config file at nowhere.yaml"),
        (["ablate", "nowhere.yaml"], "no config file at nowhere.yaml"),
        (["ablate", str(DEMO)], "unknown key `data`"),
    ],
)
def test_a_wrong_input_is_one_sentence_and_code_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    own_logging: None,
) -> None:
    # In this process: a command's imports take seconds, and are not what is asked here.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kdhiera", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert words in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_missing_weights_and_layers_are_said_before_anything_is_made(tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    import io
    import tarfile

    with tarfile.open(shard, "w") as tar:
        info = tarfile.TarInfo("a.mp4")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"none"))
    done = kdhiera("extract-teachers", str(DEMO), "data.shards=shard.tar", cwd=tmp_path)
    assert done.returncode == 2
    assert "no teacher weights at demo-data/teachers/image-vits14.safetensors" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["shard.tar"]


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_where_an_error_comes_from(place: int) -> None:
    words = ["config", "show", "nowhere.yaml"]
    plain = kdhiera(*words)
    words.insert(place, "--debug")
    told = kdhiera(*words)
    assert plain.returncode == told.returncode == 2
    assert "Traceback" not in plain.stderr
    assert "Traceback" in told.stderr
    assert "read_raw" in told.stderr
    assert told.stderr.splitlines()[-1] == plain.stderr.strip()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands(shell: str) -> None:
    def completed(words: str) -> str:
        environment = {
            **os.environ,
            "_KDHIERA_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
            "_TYPER_COMPLETE_ARGS": words,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
        done = subprocess.run(COMMAND, capture_output=True, text=True, env=environment, check=False)
        return done.stdout

    assert "distill" in completed("kdhiera dis")
    assert "bench-encodings" in completed("kdhiera cache ben")
    assert "--max-per-shard" in completed("kdhiera pack --max")
    assert "--show-completion" in kdhiera("--help").stdout
