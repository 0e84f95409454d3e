"""DeepSpeed's engine, used directly: ZeRO stage 0 (replicas) and stages 1–3 (partitioned state), with offload."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from typing import Any, cast

import torch
from torch import Tensor, nn

from understudy.contracts import Batch, LazyTensor, LossScale, LossSum, Objective, TensorSpec
from understudy.errors import DivergedError, UserError
from understudy.models.language_model import LanguageModel
from understudy.models.names import canonical_name
from understudy.optim.groups import decay_groups
from understudy.parallel.world import World
from understudy.recipe.deepspeed_file import effective_deepspeed
from understudy.recipe.schema import DeepSpeed, Recipe
from understudy.strategies.base import MakeModel, MakeOptimizer, ModuleStrategy, materialize
from understudy.strategies.compiled_operators import build_operators, builders_for, choose_directory
from understudy.strategies.engine_config import engine_config
from understudy.strategies.host_adamw import make_host_adamw
from understudy.strategies.precision import Precision, compute_in
from understudy.strategies.torch_native import TorchStrategy
from understudy.strategies.zero_partitions import (
    link_in_partition_order,
    partition_as_built,
    set_weight,
    shape_of,
    whole_weight,
)
from understudy.strategies.zero_state import ZeroState

__all__ = ["ReplicatedEngine", "ZeroEngine", "make", "prepare"]


def prepare(recipe: Recipe, report: Callable[[str], None]) -> None:
    """Compiles what the strategy needs, which can take minutes: before any process waits for another (P7)."""
    _build_operators(import_deepspeed(), recipe, report)


def _build_operators(deepspeed: Any, recipe: Recipe, report: Callable[[str], None] = lambda line: None) -> None:
    _, optimizer, parameters = effective_deepspeed(cast(DeepSpeed, recipe.strategy))
    accelerator = deepspeed.accelerator.get_accelerator()
    builders = builders_for(accelerator, host_optimizer=optimizer != "none", nvme="nvme" in (optimizer, parameters))
    build_operators(accelerator, builders, report)


def make(recipe: Recipe, device: torch.device, world: World, precision: Precision) -> ReplicatedEngine | ZeroEngine:
    """The strategy for the stage that the recipe or its DeepSpeed file names."""
    stage, _, _ = effective_deepspeed(cast(DeepSpeed, recipe.strategy))
    strategy = ReplicatedEngine if stage == 0 else ZeroEngine
    return strategy(recipe, device, world, precision)


def import_deepspeed() -> Any:
    """DeepSpeed, quietened; raises `UserError` saying what to install where it is absent."""
    try:
        choose_directory(metadata.version("deepspeed"))
    except metadata.PackageNotFoundError:
        raise UserError(
            "this strategy needs DeepSpeed, which is not installed; run `pip install 'understudy[deepspeed]'` "
            "or choose `strategy: fsdp` or `strategy: ddp`."
        ) from None
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it says on stdout which accelerator it took, while it is imported
    try:
        module = importlib.import_module("deepspeed")
        module.accelerator.get_accelerator()
    finally:
        logging.disable(disabled)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return module


def _joined_deepspeed(recipe: Recipe) -> Any:
    """DeepSpeed on the process group that exists already."""
    deepspeed = import_deepspeed()
    _build_operators(deepspeed, recipe)
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
    return deepspeed


def _initialize(deepspeed: Any, module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    # DeepSpeed 0.14.4 casts buffers too, which would round rotary frequencies to the compute dtype.
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, buffer)
    return engine


def _config(recipe: Recipe, precision: Precision, world: World, module: LanguageModel) -> dict[str, Any]:
    return engine_config(
        recipe,
        precision,
        world_size=world.size,
        hidden_size=int(module.config.get_text_config().hidden_size),
        num_trained=sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
    )


class _EngineBackward:
    """The engine is told which micro-batch closes a step, and to leave the scale of the loss to us."""

    engine: Any

    def _accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)


class ReplicatedEngine(_EngineBackward, TorchStrategy):
    """ZeRO stage 0: the engine all-reduces gradients at the end of a step; clipping and scaling are ours."""

    def __init__(self, recipe: Recipe, device: torch.device, world: World, precision: Precision) -> None:
        super().__init__(device, world, precision)
        self.recipe = recipe

    def build(self, make_model: MakeModel, make_optimizer: MakeOptimizer) -> None:
        deepspeed = _joined_deepspeed(self.recipe)
        module = cast(LanguageModel, make_model())
        config = _config(self.recipe, self.precision, self.world, module)
        materialize(module, self.device, self.precision.held_in)
        compute_in(module, self.precision.compute)
        self.module = module
        self.optimizer = make_optimizer(self._parameters().items())
        self.engine = _initialize(deepspeed, module, self.optimizer, config)
        self.module = self.engine

    def _step(self) -> None:
        self.engine.step()

    def _clear_gradients(self) -> None:
        self.engine.zero_grad()


class ZeroEngine(_EngineBackward, ModuleStrategy):
    """ZeRO stages 1–3: the engine owns master weights, moments, clipping and loss scaling."""

    def __init__(self, recipe: Recipe, device: torch.device, world: World, precision: Precision) -> None:
        super().__init__(device, world, precision)
        self.recipe = recipe
        self.stage, self.offload_optimizer, _ = effective_deepspeed(cast(DeepSpeed, recipe.strategy))

    def build(self, make_model: MakeModel, make_optimizer: MakeOptimizer) -> None:
        deepspeed = _joined_deepspeed(self.recipe)
        accelerator = deepspeed.accelerator.get_accelerator()
        if self.precision.loss_scaling and not accelerator.is_fp16_supported():
            raise UserError(
                f"DeepSpeed does not train in fp16 on this device ({accelerator.device_name()}); "
                "set training.precision to bf16 or fp32, or choose `strategy: ddp` or `strategy: fsdp`.",
                key="training.precision",
            )
        module = cast(LanguageModel, make_model())
        config = _config(self.recipe, self.precision, self.world, module)
        if self.stage == 3:
            partition_as_built(module, config, self.device, self.precision.compute)
        else:
            materialize(module, self.device, lambda _: self.precision.compute)
        named = {canonical_name(name): parameter for name, parameter in module.named_parameters()}
        if self.offload_optimizer == "none":
            optimizer = make_optimizer(named.items())
        else:
            settings = self.recipe.optimizer
            optimizer = make_host_adamw(settings, decay_groups(named.items(), settings))
        self._named = named
        self.engine = _initialize(deepspeed, module, optimizer, config)
        if self.stage < 3:
            link_in_partition_order(self.engine.optimizer)
        self._state = ZeroState(self.engine.optimizer, {name: p for name, p in named.items() if p.requires_grad})
        self.module = self.engine

    def forward_backward(self, micro_batches: Sequence[Batch], objective: Objective, num_tokens: int) -> LossSum:
        total = super().forward_backward(micro_batches, objective, num_tokens)
        if not self._refuses_infinite_gradients() and not torch.isfinite(total.loss):
            raise DivergedError(
                "the loss is not finite, and this release of DeepSpeed would put it into the weights; lower "
                "optimizer.learning_rate, or install a newer DeepSpeed, which leaves such a step out."
            )
        return total

    def _refuses_infinite_gradients(self) -> bool:
        """Releases without this setting (0.14.4) check gradients in fp16 only."""
        return self.precision.loss_scaling or hasattr(self.engine._config, "bfloat16_config")

    @contextmanager
    def _inferring(self) -> Iterator[None]:
        with super()._inferring():
            self._forget_order()
            yield
            self._forget_order()

    def _forget_order(self) -> None:
        """DeepSpeed 0.14.4 has ZeRO-3 expect the modules of the pass without gradient before in the next one too. It
        fetches ahead what that may not need, a head's or an adapter's, and then fails over it."""
        offload = getattr(self.engine.optimizer, "parameter_offload", None)
        getattr(offload, "param_coordinators", {}).pop(False, None)

    def optimizer_step(self, lr: float, max_norm: float | None) -> Tensor:
        assert (max_norm or 0.0) == self.engine.gradient_clipping(), "the engine clips by its configuration"
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.engine.step()
        if getattr(self.engine.optimizer, "overflow", False):
            self._forget_gradients()
            # DeepSpeed 0.14.4 leaves the norm of the step before.
            return torch.tensor(float("inf"), device=self.device)
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)

    def _forget_gradients(self) -> None:
        """With a host-side optimizer, DeepSpeed 0.19.8 keeps the gradient of a refused step and adds the next to it."""
        kept = getattr(self.engine.optimizer, "averaged_gradients", {})
        for group in kept:
            kept[group] = None

    def layout(self) -> Mapping[str, TensorSpec]:
        return {
            name: TensorSpec(shape_of(parameter), torch.float32 if parameter.requires_grad else self.precision.compute)
            for name, parameter in self._named.items()
        }

    def optimizer_layout(self) -> Mapping[str, TensorSpec]:
        return self._state.layout()

    @torch.no_grad()
    def load_state(self, read: Callable[[str], LazyTensor]) -> None:
        for name, parameter in self._named.items():
            set_weight(parameter, read(name))

    @torch.no_grad()
    def load_optimizer_state(self, stored: Mapping[str, Mapping[str, LazyTensor]]) -> None:
        if stored:
            self._state.load(stored)

    @torch.no_grad()
    def state(self, owner: Callable[[str], int | None]) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named.items():
            if (rank := owner(name)) is None:
                continue
            weight = self._state.weight(name) if parameter.requires_grad else whole_weight(parameter)
            if rank == self.world.rank:
                yield name, weight

    @torch.no_grad()
    def optimizer_state(self, owner: Callable[[str], int]) -> Iterator[tuple[str, Tensor]]:
        yield from self._state.tensors(lambda name: owner(name) == self.world.rank)

    @property
    def loss_scale(self) -> LossScale | None:
        if not self.precision.loss_scaling:
            return None
        scaler = self.engine.optimizer.loss_scaler
        since = (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window
        return LossScale(float(scaler.cur_scale), int(since))

    @loss_scale.setter
    def loss_scale(self, scale: LossScale | None) -> None:
        if scale is not None:
            scaler = self.engine.optimizer.loss_scaler
            scaler.cur_scale, scaler.cur_iter = scale.value, scaler.last_overflow_iter + 1 + scale.steps_since_change
