"""What every section of a recipe is, and the numbers that sections hold. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Count", "Decay", "Fraction", "OpenFraction", "Processes", "Section"]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
# Past these bounds a number is a slip of the hand, and would overflow or exhaust the machine far from where it stands.
Count = Annotated[int, Field(gt=0, lt=2**31)]
Processes = Annotated[int, Field(gt=0, le=1024)]


class Section(BaseModel):
    """A mapping in a recipe: immutable, unknown keys refused, numbers never made from strings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
