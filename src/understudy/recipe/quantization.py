"""What a recipe may say about storing frozen weights in fewer bits. Imports no torch."""

from __future__ import annotations

from typing import Literal

from understudy.recipe.section import Section

__all__ = ["Quantization"]


class Quantization(Section):
    """How the frozen weights of the decoder layers are stored (bitsandbytes); embeddings and head keep their dtype."""

    bits: Literal[4, 8] = 4
    """8 stores whole numbers with one scale a row."""
    type: Literal["nf4", "fp4"] | None = None
    """Of 4 bits: NormalFloat (Dettmers et al., 2023), which is the default, or floating point."""
    double: bool | None = None
    """Of 4 bits: store the scales in 8 bits too, which is the default."""

    @property
    def data_type(self) -> str:
        """`nf4`, `fp4` or `int8`."""
        return "int8" if self.bits == 8 else self.type or "nf4"

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized too."""
        return self.bits == 4 and self.double is not False
