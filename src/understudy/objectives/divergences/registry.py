"""Divergences by kind: `divergences/<kind>.py` has a `divergence`, and a `check` if settings can be wrong for it.

A new file is a new divergence. Letters: p teacher, q student, n rows, C classes.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Protocol

from torch import Tensor

from understudy.objectives.divergences.settings import DivergenceSettings

__all__ = ["Divergence", "make_divergence"]


class Divergence(Protocol):
    def __call__(self, teacher_log: Tensor, student_log: Tensor) -> tuple[Tensor, Tensor]:
        """Two distributions' log-probabilities [n, C], fp32 or fp64, to the divergence of each row [n] in nats and its
        derivative [n, C] with respect to `student_log`, whose elements count as free variables. Changes neither.

        A class of log-probability −inf on both sides adds exact zeros to both; see `log_ratio` for one side."""
        ...


def make_divergence(kind: str, settings: DivergenceSettings) -> Divergence:
    """The divergence called `kind`. Raises `UserError` for settings that it cannot take."""
    module = importlib.import_module(f"understudy.objectives.divergences.{kind}")
    check = getattr(module, "check", None)
    if check is not None:
        check(settings)
    return partial(module.divergence, settings=settings)
