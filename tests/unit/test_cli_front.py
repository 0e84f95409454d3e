"""The front of the program: torch-free, listed without importing, every failure with its exit status."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

import understudy
from understudy.cli import main as front
from understudy.cli.arguments import recipe_arguments
from understudy.errors import DivergedError, RecipeError, StoppedError, UserError, Violation

pytestmark = pytest.mark.unit

PACKAGE = Path(understudy.__file__).parent

# Any import of these fails, as on a machine without them.
BLOCK = """
import sys
BLOCKED = {"torch", "transformers", "numpy", "datasets", "pyarrow", "deepspeed", "tokenizers", "safetensors"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Blocker())
"""


def run(script: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK + script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)


def test_recipe_plan_launch_and_the_start_of_the_cli_need_no_torch() -> None:
    modules = [
        ".".join(("understudy", *path.relative_to(PACKAGE).with_suffix("").parts))
        for folder in ("recipe", "plan", "launch", "cli")
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        if path.stem != "__init__"
    ]
    assert len(modules) > 10
    result = run(f"import importlib\nfor name in {modules}: importlib.import_module(name)")
    assert result.returncode == 0, result.stderr


def test_help_lists_every_command_without_importing_any() -> None:
    script = """
from understudy.cli.main import exit_status
status = exit_status(["--help"])
loaded = [name for name in sys.modules if name.startswith(("understudy.cli.", "pydantic", "yaml"))]
assert loaded == ["understudy.cli.main"], loaded
sys.exit(status)
"""
    result = run(script)
    assert result.returncode == 0, result.stderr
    for name in front.program.list_commands(click.Context(front.program)):
        assert f"\n  {name} " in result.stdout


@pytest.mark.parametrize("name", front.program.list_commands(click.Context(front.program)))
def test_every_command_has_one_line_of_help_and_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = front.program.get_command(click.Context(front.program), name)
    assert isinstance(command, click.Command)
    module = sys.modules[f"understudy.cli.{front._module(name)}"]
    assert (module.__doc__ or "").splitlines()[0].endswith(".")
    assert front.exit_status([name, "--help"]) == 0
    assert "xample" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        (["schem"], "did you mean schema?"),
        (["schema", "--zz"], "See `understudy schema --help`."),
        (["schema", "extra"], "See `understudy schema --help`."),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert front.exit_status(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert arguments[-1] in line
    assert line.endswith(end)


def test_without_arguments_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert front.exit_status([]) == 2
    assert "Commands:" in capsys.readouterr().out


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert front.exit_status(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Understudy recipe"


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, status: int | None = None) -> int:
    """The exit status of a command whose function raises `error` or returns `status`."""

    @click.command
    def command() -> int | None:
        if error is not None:
            raise error
        return status

    monkeypatch.setattr(front.Program, "get_command", lambda *_: command)
    return front.exit_status(["schema"])


FULL = OSError(errno.ENOSPC, "No space left on device", "/data/x")


def caused_by(cause: BaseException) -> BaseException:
    error = ValueError("could not write")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("say so.", file="f", line=3), 2, "error: f:3: say so.\n"),
        (RecipeError([Violation("a", "one", "f", 1), Violation("b", "two")]), 2, "error: f:1: one\nerror: two\n"),
        (DivergedError("not finite"), 3, "error: not finite\n"),
        (
            StoppedError("stopped by SIGTERM after step 7; run again to go on."),
            75,
            "stopped by SIGTERM after step 7; run",
        ),
        (KeyboardInterrupt(), 1, "\nerror: interrupted\n"),
        (click.UsageError("no"), 2, "error: no. See `understudy schema --help`.\n"),
        (FULL, 2, "error: /data/x: no space is left on the disk; free some, or choose another `output_dir`.\n"),
        (caused_by(FULL), 2, "error: /data/x: no space is left on the disk; free some, or choose another"),
    ],
)
def test_a_failure_is_a_sentence_and_a_status(
    error: BaseException, status: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails_with(monkeypatch, error) == status
    captured = capsys.readouterr()
    assert captured.err.startswith(text)
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_an_unforeseen_failure_shows_its_cause_before_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails_with(monkeypatch, ZeroDivisionError("by zero\nsecond line")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["error: ZeroDivisionError: by zero", "Traceback (most recent call last):"]


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1), (75, 75)])
def test_a_command_returns_its_status(returned: int | None, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fails_with(monkeypatch, None, returned) == status


def test_a_reader_that_goes_away_is_no_failure_to_talk_about() -> None:
    command = f"{sys.executable} -m understudy schema | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("{", "")


def test_a_wrong_recipe_ends_in_status_2_without_torch(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: {path: m}\ndata: {train: [{path: a}]}\ntraining:\n  epoch: 3\n")
    script = """
from pathlib import Path
from understudy.cli import main as front
import click
from understudy.cli.arguments import recipe_arguments
@click.command
@recipe_arguments
def command(recipe, overrides):
    from understudy.recipe.load import load_recipe
    load_recipe(recipe, overrides)
front.Program.get_command = lambda *_: command
sys.exit(front.exit_status(["schema", *sys.argv[1:]]))
"""
    result = run(script, "r.yaml", "optimizer=sdg", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: command line: `optimizer` must be adamw, adamw_bf16, adamw_8bit, adafactor, lion, muon or sgd, "
        "not 'sdg'; did you mean sgd?",
        "error: r.yaml:4: unknown key `epoch` in `training`; did you mean `epochs`?",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_recipe_and_overrides_reach_the_command_among_its_options() -> None:
    @click.command
    @recipe_arguments
    @click.option("--steps", type=int)
    def command(recipe: Path, overrides: tuple[str, ...], steps: int) -> tuple[Path, tuple[str, ...], int]:
        return recipe, overrides, steps

    arguments = ["r.yaml", "a=1", "--steps", "3", "b=2"]
    assert command.main(arguments, standalone_mode=False) == (Path("r.yaml"), ("a=1", "b=2"), 3)
