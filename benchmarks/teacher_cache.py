"""The teacher cache: its size, and how fast it is built and read, without what the teacher's layers compute.

Building is what `keep` makes of the teacher's last hidden states, its head included, and writing that to the disk.
`benchmarks.teacher_cache_worker` measures one kind of contents, on one core, in the core's own seconds except where the
disk is waited for.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass

from benchmarks.process import ROOT, measure
from benchmarks.table import print_figures

__all__ = ["CASES", "Case", "Measured", "compare"]

ONE_CORE = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Case:
    kind: str
    """Of contents."""
    vocabulary: int
    kept: int = 64
    """Ids of `top_k`."""
    drawn: int = 12
    """Ids of `samples`."""
    width: int = 576
    """Of hidden states, in bf16."""
    examples: int = 2_048
    supervised: int = 150
    """Positions of an example, on average."""
    asked: int = 1_200
    """Positions that the teacher is asked about at once."""

    @property
    def name(self) -> str:
        if self.kind == "hidden":
            return f"hidden, width {self.width}, bf16"
        what = {"top_k": f"k = {self.kept}", "samples": f"m = {self.drawn}"}
        return f"{self.kind}, {what[self.kind]}, {self.vocabulary:,} ids"


@dataclass(frozen=True)
class Measured:
    """Medians, of supervised tokens."""

    bytes_per_token: float
    kept: float
    """Tokens a second that `keep` takes in."""
    written: float
    """Tokens a second of a `CacheWriter`, its commit included."""
    first_read: float
    """Tokens a second of a `TeacherCache` that is opened and read in random order, which verifies it."""
    read: float
    """Tokens a second as it is read again."""

    @property
    def built(self) -> float:
        """Tokens a second, kept and written."""
        return 1 / (1 / self.kept + 1 / self.written)


CASES = (
    *(Case(kind, vocabulary) for vocabulary in (49_152, 128_256) for kind in ("top_k", "samples")),
    Case("hidden", 128_256),
)


def compare() -> None:
    rows = []
    for case in CASES:
        # Not where temporary files are: that may be in memory.
        (ROOT / "build").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="understudy-bench-", dir=ROOT / "build") as scratch:
            settings = {"case": asdict(case), "scratch": scratch}
            done = Measured(**measure("benchmarks.teacher_cache_worker", settings, ONE_CORE))
        rates = (done.built, done.written, done.first_read, done.read)
        rows.append([case.name, f"{done.bytes_per_token:.1f}", *(f"{rate:,.0f}" for rate in rates)])
    print_figures(
        f"Teacher cache: {CASES[0].examples:,} examples, {CASES[0].supervised} supervised tokens each, one core",
        ("bytes a token", "built, tokens/s", "of which written", "first read", "read again"),
        rows,
    )
