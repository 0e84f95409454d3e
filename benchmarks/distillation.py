"""The distillation loss in the head against the same divergence of all logits: time and memory of value and gradient.

Given are hidden states and heads of student and teacher. The references are a few lines of PyTorch, and TRL's loss on
the same logits. `benchmarks.distillation_sides` is one side, on one core; its seconds are the core's own, so that other
work on the machine does not count.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata

from benchmarks.process import ROOT, measure
from benchmarks.table import GIBIBYTE, Row, print_table

__all__ = ["PEERS", "Case", "Measured", "compare"]

PEERS = ROOT / "build" / "peers"
"""Where packages lie that are only compared with."""
INSTALL_TRL = "python -m pip install --no-deps --target build/peers trl"
AGREE = {"fp32": 1e-5, "bf16": 1e-3}
"""Most relative difference of losses and gradients' norms, by precision."""
KEPT = 64
ONE_CORE = {"OMP_NUM_THREADS": "1"}
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""Of glibc: what is freed goes back to the system, as what counts is what is held."""
MOST_GIBIBYTES = 0.7
"""For any vocabulary and number of tokens: two chunks of logits of 256 MiB, the student's and the teacher's, and five
tensors of 32 MiB that the loss works with are 0.66 GiB."""


@dataclass(frozen=True)
class Case:
    """What every side computes."""

    vocabulary: int
    tokens: int
    divergence: str = "forward_kl"
    """Or `jsd`, at beta = 0.5."""
    precision: str = "fp32"
    """Of hidden states and heads; logits are fp32."""
    kept: int | None = None
    """So many of the teacher's likeliest classes and one for all others, instead of its hidden states."""
    width: int = 576
    """Of student and teacher alike: narrow, so that there is little to measure beside the loss."""

    @property
    def size(self) -> str:
        return f"V = {self.vocabulary:,}, {self.tokens:,} tokens"


@dataclass(frozen=True)
class Measured:
    """What a side did."""

    seconds: float
    """Of loss and gradient."""
    num_bytes: int
    """Most memory beyond inputs and gradients."""
    loss: float
    """Nats a token."""
    hidden_norm: float
    """Of the gradient of the student's hidden states."""
    head_norm: float
    """Of that of its head."""

    def difference(self, other: Measured) -> float:
        """The largest relative one of losses and norms, NaN where there is one."""
        pairs = [
            (self.loss, other.loss),
            (self.hidden_norm, other.hidden_norm),
            (self.head_norm, other.head_norm),
        ]
        differences = [abs(mine / theirs - 1) for mine, theirs in pairs]
        return max(differences, key=lambda difference: (math.isnan(difference), difference))


COMPARED = (Case(49_152, tokens=2_048), Case(128_256, tokens=1_024))
"""Each with more tokens than the head has logits of at once."""


def compare(steps: int, *, cases: Sequence[Case] = COMPARED) -> None:
    """Prints the tables. `steps` are each side's, of which the first is not timed. Ends the program where two sides do
    not compute the same."""
    version = _trl_version()
    rows: dict[str, list[Row]] = {"naive": [], "trl": []}
    growth = []
    for whole in cases:
        kinds = {
            "forward KL": whole,
            "JSD": replace(whole, divergence="jsd"),
            "forward KL, bf16": replace(whole, precision="bf16"),
            f"forward KL, top {KEPT}": replace(whole, kept=KEPT),
        }
        for name, case in kinds.items():
            ours = _measure("ours", case, steps)
            for side in ("naive", *(("trl",) if version is not None and case.kept is None else ())):
                reference = _measure(side, case, steps)
                rows[side] += _rows(f"{case.size}, {name}", ours, reference, AGREE[case.precision])
        growth += _growth(whole)
    print_table(
        f"Distillation: loss and gradients, hidden width {cases[0].width}, one core, median of {steps - 1}; memory is "
        "beyond inputs and gradients",
        "all logits",
        rows["naive"],
    )
    missing = Row("TRL is not installed", INSTALL_TRL)
    print_table(
        "The same against TRL's generalized_jsd_loss",
        "TRL" if version is None else f"TRL {version}",
        [missing] if version is None else rows["trl"],
    )
    print_table("As tokens grow: memory beyond inputs and gradients, forward KL", "all logits", growth)


def _trl_version() -> str | None:
    found = next(iter(metadata.distributions(name="trl", path=[str(PEERS), *sys.path])), None)
    return None if found is None else found.version


def _measure(side: str, case: Case, steps: int, environment: Mapping[str, str] | None = None) -> Measured:
    settings = {"side": side, "case": asdict(case), "steps": steps}
    return Measured(**measure("benchmarks.distillation_sides", settings, {**ONE_CORE, **(environment or {})}))


def _rows(name: str, ours: Measured, reference: Measured, agree: float) -> list[Row]:
    difference = ours.difference(reference)
    if not difference <= agree:
        sys.exit(f"{name}: the two sides do not compute the same: {ours} and {reference}")
    return [
        Row(
            f"{name}: time",
            f"{ours.seconds:.2f} s",
            f"{reference.seconds:.2f} s",
            ours.seconds / reference.seconds,
        ),
        Row(
            f"{name}: memory",
            f"{ours.num_bytes / GIBIBYTE:.2f} GiB",
            f"{reference.num_bytes / GIBIBYTE:.2f} GiB",
            ours.num_bytes / reference.num_bytes,
        ),
        Row(f"{name}: difference", f"{difference:.0e}", "", None, f"at most {agree:.0e}", True),
    ]


def _growth(case: Case) -> list[Row]:
    """Memory at a quarter of the tokens, at as many, and at four times as many, whose logits few machines have room
    for."""
    rows = []
    for tokens in (case.tokens // 4, case.tokens, case.tokens * 4):
        one = replace(case, tokens=tokens)
        ours = _measure("ours", one, 2, FREED_AT_ONCE).num_bytes / GIBIBYTE
        naive = _measure("naive", one, 2, FREED_AT_ONCE).num_bytes / GIBIBYTE if tokens <= case.tokens else None
        rows.append(
            Row(
                one.size,
                f"{ours:.2f} GiB",
                "" if naive is None else f"{naive:.2f} GiB",
                goal=f"at most {MOST_GIBIBYTES} GiB",
                reached=ours <= MOST_GIBIBYTES,
            )
        )
    return rows
