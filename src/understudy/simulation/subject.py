"""The models of a recipe, built from their configurations alone: the student as it trains, and teachers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.contracts import LazyTensor, Strategy
from understudy.devices.attention import AttentionRule, DocumentAttention
from understudy.devices.cpu import CPU
from understudy.devices.flash import VariableLengthAttention
from understudy.errors import UserError
from understudy.models.adapters.attachment import inject
from understudy.models.adapters.freeze import freeze
from understudy.models.adapters.registry import make_config as make_adapter_config
from understudy.models.adapters.switching import without_adapter
from understudy.models.build import make_language_model
from understudy.models.language_model import LanguageModel
from understudy.models.names import canonical_name
from understudy.models.quantization.linear import replace_linears
from understudy.models.quantization.materialize import quantized_section
from understudy.models.quantization.scheme import scheme_of
from understudy.objectives.teachers.base_teacher import BaseTeacher
from understudy.objectives.teachers.model_teacher import ModelTeacher
from understudy.objectives.teachers.several_teachers import SeveralTeachers
from understudy.objectives.teachers.teacher import Teaching
from understudy.parallel.world import World
from understudy.plan.shape.model import ModelShape
from understudy.recipe import teachers as sections
from understudy.recipe.adapters import Freeze
from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import Model, Recipe
from understudy.strategies.precision import precision_of
from understudy.strategies.teaching import hold, hold_sharded
from understudy.training.teacher_model import teacher_dtype

__all__ = ["HOST", "SimulatedDevice", "make_student", "make_teachers", "make_teaching"]

HOST = torch.device("cpu")


class _Kernel(VariableLengthAttention):
    """PyTorch's kernel of variable length, wherever the plan says that such a kernel runs."""

    def supports(self, query: Tensor, value: Tensor, rule: AttentionRule) -> bool:
        return True


class SimulatedDevice(CPU):
    """A device with the attention that the plan has for the real one; all its memory is counted on a processor."""

    def __init__(self, kernel: str) -> None:
        self.attention: DocumentAttention | None = None if kernel in ("documents", "explicit") else _Kernel()
        self.flash_attention = self.attention


@dataclass(frozen=True)
class _Hollow:
    """A stored tensor whose values nobody needs."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=HOST)[index]


def make_student(recipe: Recipe, shape: ModelShape, device: SimulatedDevice) -> LanguageModel:
    """On the meta device, with what the recipe puts around it. Raises `UserError` where it cannot be built."""
    dtype = precision_of(recipe.training.precision).compute
    model = _build(shape.sizes.config, recipe.model.attention, device)
    config = dict(shape.sizes.config)
    if recipe.quantization is not None:
        config["quantization_config"] = quantized_section(config, recipe.quantization)
    if (scheme := scheme_of(config)) is not None:
        linears = [name for name, module in model.network.named_modules() if type(module) is nn.Linear]
        replace_linears(model.network, scheme, dtype, {f"{name}.{scheme.marker}" for name in linears})
    if isinstance(recipe.adapter, Freeze):
        freeze(model, recipe.adapter)
    elif recipe.adapter is not None:
        inject(model, make_adapter_config(recipe.adapter, model.network), dtype)
    checkpointing = recipe.training.activation_checkpointing
    if checkpointing in ("full", "selective"):
        model.enable_activation_checkpointing(checkpointing)
    return model


def make_teachers(
    recipe: Recipe, shapes: Sequence[ModelShape | None], device: SimulatedDevice
) -> list[LanguageModel | None]:
    """The recipe's teachers on the meta device, None for the student's own base. Raises `UserError` for those that are
    not in these processes."""
    objective = recipe.objective
    if not isinstance(objective, Distillation):
        return []
    if objective.hidden_states or objective.divergence == "uld" or objective.on_policy_fraction:
        raise UserError(
            "the exact tier simulates no matched hidden states, no teacher with another tokenizer and no answers of "
            "the student's own; leave out --exact.",
            key="objective",
        )
    return [_teacher(section, shape, device) for section, shape in zip(objective.teachers, shapes, strict=True)]


def _teacher(section: sections.OneTeacher, shape: ModelShape | None, device: SimulatedDevice) -> LanguageModel | None:
    if isinstance(section, sections.BaseTeacher):
        return None
    sharded = isinstance(section, sections.ShardedTeacher)
    own = isinstance(section, sections.ResidentTeacher) and section.device == "own" and section.quantization is None
    if shape is None or not (sharded or own):
        raise UserError(
            "the exact tier simulates teachers that are whole or shared out on the student's devices, not cached, "
            "served, quantized ones or those elsewhere; leave out --exact.",
            key="objective.teacher",
        )
    return _build(shape.sizes.config, "auto", device)


def make_teaching(
    recipe: Recipe,
    models: Sequence[LanguageModel | None],
    student: LanguageModel,
    strategy: Strategy,
    world: World,
) -> Teaching | None:
    """Who teaches, out of what `make_teachers` gave; None for an objective without a teacher."""
    objective = recipe.objective
    if not isinstance(objective, Distillation):
        return None
    rows = student.config.get_text_config().vocab_size
    classes = min([rows, *(one.config.get_text_config().vocab_size for one in models if one is not None)])
    made = []
    for section, model in zip(objective.teachers, models, strict=True):
        if model is None:
            made.append(Teaching(BaseTeacher(strategy, partial(without_adapter, student), student.head), classes))
            continue
        assert isinstance(section, sections.LocalTeacher), "it has a model of its own"
        _hold(model, teacher_dtype(recipe, section), world, sharded=isinstance(section, sections.ShardedTeacher))
        made.append(Teaching(ModelTeacher(model, model.head, HOST), classes))
    if not isinstance(objective.teacher, sections.SeveralTeachers):
        return made[0]
    return Teaching(SeveralTeachers(tuple(zip(objective.teacher.shares, made))), None)


def _hold(model: LanguageModel, dtype: torch.dtype, world: World, *, sharded: bool) -> None:
    shapes = {canonical_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def read(name: str) -> LazyTensor:
        return _Hollow(shapes[name], dtype)

    if sharded:
        hold_sharded(model, read, HOST, dtype, world)
    else:
        hold(model, read, HOST, dtype)


def _build(config: Mapping[str, Any], attention: Any, device: SimulatedDevice) -> LanguageModel:
    plain = {name: value for name, value in config.items() if name not in ("quantization_config", "auto_map")}
    with tempfile.TemporaryDirectory(prefix="understudy-") as made:
        directory = Path(made)
        (directory / "config.json").write_text(json.dumps(plain), encoding="utf-8")
        # No weights, in a file that is there to be looked into.
        header = b"{}" + b" " * 6
        (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        return make_language_model(directory, Model(path=made, attention=attention), device)
