"""The vocabulary head: it computes the loss and all gradients of itself in the forward pass, a chunk at a time
(`models.head`)."""

from __future__ import annotations

from dataclasses import dataclass

from understudy.plan.memory.setting import FP32
from understudy.plan.network import Network
from understudy.recipe.objectives import CausalLM, Distillation, Objective

__all__ = ["CHUNK_BYTES", "Head", "head_of"]

CHUNK_BYTES = 256 * 2**20
"""`models.head.CHUNK_BYTES`: fp32 logits of a chunk."""
_BLOCK_BYTES = 32 * 2**20
"""`objectives.distillation_loss.BLOCK_BYTES`: of which several are worked with."""
_BLOCKS = {"adaptive_kl": 7, "uld": 10}


@dataclass(frozen=True)
class Head:
    vocabulary: int
    hidden: int
    itemsize: int
    """Of what computes."""
    trained: bool
    capped: bool
    """Logits go through a soft cap, whose slope is one more tensor."""
    passes_on: bool = True
    """Whether the hidden states need a gradient."""
    teacher_classes: int = 0
    """Of a teacher whose logits are made beside the student's, chunk by chunk."""
    blocks: int = 0

    def chunk_bytes(self, tokens: int) -> int:
        """fp32 logits of a chunk."""
        rows = max(1, CHUNK_BYTES // (FP32 * self.vocabulary))
        return FP32 * self.vocabulary * min(tokens, rows)

    def loss_bytes(self, tokens: int) -> int:
        """As a chunk's gradient goes into the weight's: logits, in both dtypes; the weight's gradient in fp32, and a
        chunk's part of it; hidden states and their gradient."""
        chunk, narrow = self.chunk_bytes(tokens), self.itemsize < FP32
        logits = chunk + chunk * self.itemsize // FP32 * narrow + (chunk if self.capped else 0)
        rows = chunk // (FP32 * self.vocabulary)
        teacher = rows * self.teacher_classes * (FP32 + self.itemsize * narrow)
        # In fp32 it is added in place.
        weight = self.vocabulary * self.hidden * (FP32 + self.itemsize * narrow) if self.trained else 0
        # Logits are rounded before they are summed up, and a chunk's part of the weight's gradient comes after.
        work = max(logits, chunk + teacher + self.blocks * min(_BLOCK_BYTES, chunk))
        return work + weight + self._states(tokens, 2)

    def kept_bytes(self, tokens: int) -> int:
        """Between the loss and the head's backward: gradients of hidden states, and of the weight in fp32 where the one
        that is handed over is another."""
        wide = self.vocabulary * self.hidden * FP32 if self.trained and self.itemsize < FP32 else 0
        return wide + self._states(tokens, 2)

    def _states(self, tokens: int, copies: int) -> int:
        return copies * tokens * self.hidden * self.itemsize if self.passes_on else 0


def head_of(network: Network, itemsize: int, objective: Objective, teacher_classes: int) -> Head:
    """`teacher_classes` are those of teachers whose logits are made here."""
    sizes = network.shape.sizes
    blocks = 0
    if isinstance(objective, Distillation):
        blocks = _BLOCKS.get(objective.divergence, 5)
    else:
        assert isinstance(objective, CausalLM), "there are two"
    passes_on = any(group.trains or group.input_grad for group in network.layers)
    passes_on = passes_on or any(held.trained and held.role == "norm" for held in network.outside)
    return Head(
        vocabulary=sizes.vocabulary,
        hidden=sizes.hidden,
        itemsize=itemsize,
        trained=network.head_trained,
        capped=bool(sizes.config.get("final_logit_softcapping", 30.0 if sizes.family.softcap else None)),
        passes_on=passes_on,
        teacher_classes=teacher_classes,
        blocks=blocks,
    )
