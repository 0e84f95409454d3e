"""The numbers that divergences take, in one place with their defaults."""

from __future__ import annotations

from dataclasses import dataclass

from understudy.errors import UserError

__all__ = ["DivergenceSettings"]


@dataclass(frozen=True)
class DivergenceSettings:
    """`beta` is the teacher's share of jsd's mixture; `alpha` is the share that the skewed divergences mix in. Each
    divergence checks the one it reads."""

    alpha: float = 0.1
    beta: float = 0.5

    def check_alpha(self) -> None:
        """Raises `UserError` unless 0 ≤ alpha < 1."""
        if not 0.0 <= self.alpha < 1.0:
            raise UserError(f"a skewed divergence needs 0 <= alpha < 1, not {self.alpha:g}: write alpha = 0.1, say")
