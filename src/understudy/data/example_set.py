"""A set of examples that a recipe asks for: the sources it is made of, and which of their rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from understudy.data.order import hash64
from understudy.data.row import Row
from understudy.data.sources import Rows
from understudy.recipe.schema import DataSource, Recipe

__all__ = ["ExampleSet", "Share", "evaluation_set", "training_set"]


_HELD_OUT = (42, 3)
"""Hash keys that no field of a recipe changes: runs of different seeds are compared on the same examples, and a model
is never evaluated on what it was trained on under another seed."""


@dataclass(frozen=True)
class Share:
    """Which rows of the sources a set takes: all, or one side of `eval_fraction`."""

    side: Literal["all", "train", "evaluation"] = "all"
    fraction: float = 0.0

    def of(self, rows: list[Row], source: int) -> list[Row]:
        """A pure function of the source and each row's number, so that added rows leave the others on their side."""
        if self.side == "all":
            return rows
        draws = hash64(np.array([row.number for row in rows], np.int64), *_HELD_OUT, source)
        evaluated = draws < np.uint64(self.fraction * 2**64)
        return list(itertools.compress(rows, evaluated if self.side == "evaluation" else ~evaluated))


@dataclass(frozen=True)
class ExampleSet:
    title: str
    """For the user."""
    key: str
    """Of the recipe, such as data.train."""
    sources: tuple[DataSource, ...]
    share: Share
    found: Sequence[Rows] = ()
    """The sources' rows, once they are found."""


def training_set(recipe: Recipe) -> ExampleSet:
    fraction = recipe.data.eval_fraction
    share = Share("train", fraction) if fraction > 0 else Share()
    return ExampleSet("Training data", "data.train", recipe.data.train, share)


def evaluation_set(recipe: Recipe) -> ExampleSet | None:
    """None where the recipe has no evaluation data."""
    data = recipe.data
    if data.eval_fraction > 0:
        share = Share("evaluation", data.eval_fraction)
        return ExampleSet("Evaluation data", "data.train", data.train, share)
    return None if data.eval is None else ExampleSet("Evaluation data", "data.eval", data.eval, Share())
