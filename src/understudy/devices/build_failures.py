"""Why a compiled operator could not be built on this machine, in the compiler's own words, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from understudy.errors import UserError

__all__ = ["OperatorBuildError"]

_CAUSES = (
    (
        r"no space left on device|disk quota exceeded",
        "free some space on the disks of {directory} and of the directory for temporary files (TMPDIR), or name a "
        "directory on another disk in TORCH_EXTENSIONS_DIR",
    ),
    (r"ninja (is required|not being installed)", "install the missing package with `pip install ninja`"),
    (r"python\.h", "install the headers of this Python, in most systems the package python3-dev or python3-devel"),
    (
        r"does not match the version (that was used to compile pytorch|torch was compiled with)",
        "install the CUDA toolkit that this torch is built for, or a torch for the toolkit that is installed, and let "
        "CUDA_HOME name the toolkit",
    ),
    (
        r"cuda_home|nvcc.*(not found|no such file)|unable to run .*nvcc",
        "install the CUDA toolkit that this torch is built for, with nvcc, and let CUDA_HOME name its directory",
    ),
    (
        r"killed signal|internal compiler error: killed|cannot allocate memory|virtual memory exhausted",
        "the compiler ran out of memory: free some, or set MAX_JOBS=1, and try again",
    ),
    (
        r"unrecognized (command.line )?option|too old version of gcc|you need c\+\+\d+|unsupported gnu version",
        "install a C++ compiler of a version that this torch can be compiled with, and name it in CXX",
    ),
    (
        r"no such file or directory: 'which'",
        "install the program `which`, with which PyTorch looks for the compiler, and a C++ compiler if there is none",
    ),
    (
        r"(c\+\+|cc1plus|g\+\+|clang\+\+|gcc|'\S+'): (command )?not found|no such file or directory: '\S*(\+\+|cc)'"
        r"|cannot execute|'-?c\+\+'|\['which', '.*'\]",
        "install a C++ compiler, in most systems the package g++ or gcc-c++, or name one in CXX",
    ),
    (
        r"failed to map segment|operation not permitted",
        "programs may not run from {directory}: name a directory on a disk that is not mounted noexec in "
        "TORCH_EXTENSIONS_DIR",
    ),
    (
        r"permission denied|read-only file system",
        "let {directory} be written to, or name another directory in TORCH_EXTENSIONS_DIR",
    ),
    (
        r"version `(glibc|glibcxx|cxxabi)\S*' not found|undefined symbol",
        "another torch or compiler made what is there: remove {directory} and try again",
    ),
)
"""What to do, by what the words must match; the first that does so anywhere counts."""
_OTHERWISE = "install a C++ compiler and Python's headers"


class OperatorBuildError(UserError):
    """An operator could not be compiled or loaded: `words` are the compiler's, `fix` says what to do."""

    def __init__(self, operator: str, problem: BaseException, directory: Path) -> None:
        lines = [line for error in _with_causes(problem) for line in _lines(error)] or [type(problem).__name__]
        self.words, self.fix = _explained(lines, next(_of_compiler(str(problem)), None))
        self.fix = self.fix.format(directory=directory)
        self.operator = operator
        super().__init__(
            f"DeepSpeed's operator {operator} could not be compiled ({self.words}); {self.fix}, or choose a strategy "
            "that does not need it: ddp or fsdp."
        )


def _explained(lines: list[str], said: str | None) -> tuple[str, str]:
    """The line that tells most, and what to do; `said` is the compiler's first."""
    for pattern, fix in _CAUSES:
        for line in lines:
            if re.search(pattern, line, re.IGNORECASE):
                return line, fix
    return next((line for line in lines if "error:" in line.lower()), said or lines[-1]), _OTHERWISE


def _lines(error: BaseException) -> list[str]:
    """What is said, without the commands that are repeated and what ninja adds."""
    lines = (line.strip() for line in str(error).splitlines())
    return [line for line in lines if line and not re.match(r"\[\d+/\d+\] |FAILED: |ninja: build|.* -c .* -o ", line)]


def _of_compiler(log: str) -> Iterator[str]:
    """What stands below a command that failed, in ninja's log."""
    below = False
    lines = iter(log.splitlines())
    for line in lines:
        if line.startswith("FAILED: "):
            below = next(lines, None) is not None  # the command
        elif re.match(r"\[\d+/\d+\] |ninja: ", line):
            below = False
        elif below and line.strip():
            yield line.strip()


def _with_causes(problem: BaseException) -> Iterator[BaseException]:
    yield problem
    if problem.__cause__ is not None:
        yield from _with_causes(problem.__cause__)
