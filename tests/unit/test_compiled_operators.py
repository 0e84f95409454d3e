"""DeepSpeed's operators are built ahead, each release in its own directory, and a failure is a sentence."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from understudy.devices.build_failures import OperatorBuildError
from understudy.errors import UserError
from understudy.recipe.environment import extensions_directory
from understudy.strategies.compiled_operators import build_operators, choose_directory

pytestmark = pytest.mark.unit


class Builder:
    name = "cpu_adam"

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem = problem
        self.loaded = 0

    def load(self, *, verbose: bool) -> None:
        if self.problem is not None:
            raise self.problem
        self.loaded += 1


class Accelerator:
    def __init__(self, **builders: Builder) -> None:
        self.builders = builders

    def create_op_builder(self, name: str) -> Builder | None:
        return self.builders.get(name)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


def test_a_lock_that_a_killed_process_left_does_not_hold_up_the_next(directory: Path) -> None:
    stale = directory / "cpu_adam" / "lock"
    stale.parent.mkdir(parents=True)
    stale.touch()
    builder = Builder()
    build_operators(Accelerator(CPUAdamBuilder=builder), ["CPUAdamBuilder", "NotOnThisAcceleratorBuilder"])
    assert builder.loaded == 1
    assert not stale.exists()


def test_what_is_to_be_compiled_is_said_before_it_takes_minutes(directory: Path) -> None:
    (directory / "pin_memory").mkdir(parents=True)
    (directory / "pin_memory" / "pin_memory.so").touch()
    built, missing = Builder(), Builder()
    built.name = "pin_memory"
    said: list[str] = []
    build_operators(Accelerator(built=built, missing=missing), ["built", "missing"], said.append)
    assert len(said) == 1
    assert said[0].startswith("compiling DeepSpeed's operator cpu_adam")


def test_a_failed_build_gives_the_compilers_words_and_the_way_out(directory: Path) -> None:
    problem = RuntimeError(
        "Error building extension 'cpu_adam'\n[1/3] c++ …\nadam.cpp:3:10: fatal error: Python.h: none"
    )
    with pytest.raises(UserError, match=r"cpu_adam could not be compiled \(adam\.cpp:3:10: fatal error.*install"):
        build_operators(Accelerator(CPUAdamBuilder=Builder(problem)), ["CPUAdamBuilder"])


COMMAND = "c++ -MMD -fPIC -O3 -c /ds/adam.cpp -o adam.o"
NINJA = f"Error building extension 'cpu_adam': [1/3] {COMMAND}\nFAILED: adam.o\n{COMMAND}\n%s\nninja: build stopped."


@pytest.mark.parametrize(
    ("problem", "words", "fix"),
    [
        (RuntimeError(NINJA % "/bin/sh: 1: c++: not found"), "/bin/sh: 1: c++: not found", "install a C++ compiler"),
        (FileNotFoundError(2, "No such file or directory", "c++"), "directory: 'c++'", "install a C++ compiler"),
        (subprocess.CalledProcessError(1, ["which", "c++"]), "which", "install a C++ compiler"),
        (FileNotFoundError(2, "No such file or directory", "which"), "which", "the program `which`"),
        (
            RuntimeError("Unable to JIT load the cpu_adam op due to ninja not being installed."),
            "ninja",
            "pip install ninja",
        ),
        (RuntimeError(NINJA % "adam.cpp:3:10: fatal error: Python.h: No such file"), "Python.h", "python3-dev"),
        (RuntimeError(NINJA % "/tmp/a.s: Fatal error: cannot write: 'No space left on device'"), "space", "TMPDIR"),
        (RuntimeError(NINJA % "c++: fatal error: Killed signal terminated program cc1plus"), "Killed", "MAX_JOBS=1"),
        (RuntimeError(NINJA % "c++: error: unrecognized command-line option '-std=c++20'"), "c++20", "name it in CXX"),
        (
            Exception("Installed CUDA version 11.8 does not match the version torch was compiled with 12.8"),
            "11.8",
            "toolkit",
        ),
        (Exception("CUDA_HOME does not exist, unable to compile CUDA op(s)"), "CUDA_HOME", "toolkit"),
        (ImportError("/x/cpu_adam.so: failed to map segment from shared object"), "map segment", "noexec"),
        (
            RuntimeError(NINJA % "adam.cpp:9:1: error: no matching function\nadam.cpp:7:1: note: candidate"),
            "no matching",
            "",
        ),
        (RuntimeError(NINJA % "oddcc: your licence has run out"), "your licence has run out", "install a C++ compiler"),
    ],
)
def test_the_compilers_words_are_told_with_what_to_do_about_them(problem: Exception, words: str, fix: str) -> None:
    error = OperatorBuildError("cpu_adam", problem, Path("/cache/extensions"))
    assert words in error.words
    assert COMMAND not in str(error)
    assert fix in error.fix
    assert "{" not in error.fix


def test_a_full_disk_is_named() -> None:
    error = OperatorBuildError("cpu_adam", OSError(28, "No space left on device"), Path("/cache/extensions"))
    assert "/cache/extensions" in error.fix


def test_the_cause_under_an_error_counts_too() -> None:
    problem = RuntimeError("Error building extension 'cpu_adam'")
    problem.__cause__ = FileNotFoundError(2, "No such file or directory", "c++")
    assert "C++ compiler" in OperatorBuildError("cpu_adam", problem, Path("/x")).fix


def test_releases_do_not_share_a_directory_unless_the_user_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path))
    chosen = set()
    for release in ("0.14.4", "0.19.8"):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        choose_directory(release)
        chosen.add(extensions_directory())
    assert len(chosen) == 2
    assert all(tmp_path in path.parents for path in chosen)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/somewhere")
    choose_directory("0.19.8")
    assert extensions_directory() == Path("/somewhere")


def test_a_directory_that_cannot_be_made_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "extensions"))
    with pytest.raises(UserError, match="cannot be written"):
        build_operators(Accelerator(), [])
