"""What every strategy shares: running the objective over micro-batches and adding up its sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from understudy.contracts import Batch, HeldBytes, HiddenStates, LossSum, Objective
from understudy.models.decoding import Decoding
from understudy.parallel.world import World
from understudy.strategies.held import held_bytes
from understudy.strategies.precision import Precision
from understudy.strategies.sums import global_sum

__all__ = ["MakeModel", "MakeOptimizer", "ModuleStrategy", "materialize"]

MakeModel = Callable[[], nn.Module]
MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


class ModuleStrategy(ABC):
    """A strategy over one callable module. Subclasses say how gradients accumulate and how a step is taken."""

    module: nn.Module
    """The wrapped module: `module(batch, token_loss)` as `LanguageModel.forward`. Set by `build`."""

    def __init__(self, device: torch.device, world: World, precision: Precision) -> None:
        self.device = device
        self.world = world
        self.precision = precision

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Back-propagates; afterwards gradients hold the mean over ranks of what each rank's `loss` gave."""

    def _loss_factor(self) -> float:
        """A further factor on the loss that `optimizer_step` takes out again."""
        return 1.0

    def _accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """Entered around each micro-batch; `last` closes the step, the moment to communicate where that can wait."""
        return nullcontext()

    def forward_backward(self, micro_batches: Sequence[Batch], objective: Objective, num_tokens: int) -> LossSum:
        self.module.train()
        # The engines average over ranks; P2 wants the sum over the global batch divided by its token count.
        factor = self.world.size / num_tokens * self._loss_factor()
        parts = []
        for index, batch in enumerate(micro_batches):
            with self._accumulating(last=index == len(micro_batches) - 1):
                part = objective.loss(self.module, objective.prepare(batch.to(self.device)))
                # Times NaN where the loss is not finite: its gradient can be finite all the same, and then no rank
                # would know that the step must not be taken.
                self._backward(part.loss * (factor + 0.0 * part.loss.detach()))
            parts.append(_detached(part))
        return global_sum(parts)

    def held_bytes(self) -> HeldBytes:
        return held_bytes(self.module)

    @contextmanager
    def _inferring(self) -> Iterator[None]:
        """Entered around passes without gradient: the module is in eval mode, and after them in the mode it was in."""
        was_training = self.module.training
        self.module.eval()
        with torch.no_grad():
            yield
        self.module.train(was_training)

    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> LossSum:
        with self._inferring():
            return global_sum(
                [objective.loss(self.module, objective.prepare(batch.to(self.device))) for batch in micro_batches]
            )

    def logits(self, batch: Batch, at: Tensor) -> Tensor:
        with self._inferring():
            logits: Tensor = self.module(batch.to(self.device), logits_at=at.to(self.device))
        return logits

    def hidden(self, batch: Batch, at: Tensor, layers: Sequence[int] = ()) -> HiddenStates:
        with self._inferring():
            hidden: HiddenStates = self.module(batch.to(self.device), hidden_at=at.to(self.device), layers=layers)
        return hidden

    def decode(self, texts: Decoding) -> Tensor:
        texts.place(self.device)
        with self._inferring():
            logits: Tensor = self.module(None, texts=texts)
        return logits


def _detached(part: LossSum) -> LossSum:
    metrics = {name: value.detach() for name, value in part.metrics.items()}
    return LossSum(part.loss.detach(), part.num_tokens, metrics)


def materialize(module: nn.Module, device: torch.device, dtype_of: Callable[[nn.Parameter], torch.dtype]) -> None:
    """Gives every meta parameter of `module` uninitialised memory of the dtype that `dtype_of` it says on `device`, in
    place and once where tied; moves buffers, which are real, to `device` in their own dtype."""
    fresh: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if id(parameter) not in fresh:
                values = torch.empty(parameter.shape, dtype=dtype_of(parameter), device=device)
                fresh[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            setattr(child, name, fresh[id(parameter)])
        for name, buffer in list(child.named_buffers(recurse=False)):
            setattr(child, name, buffer.to(device))
