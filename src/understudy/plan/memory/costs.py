"""The formula of each strategy, by its kind; a new strategy is one more file and one more line here."""

from __future__ import annotations

from understudy.plan.memory.fsdp import fsdp_costs
from understudy.plan.memory.replicated import replicated_costs
from understudy.plan.memory.setting import Costs, Setting
from understudy.plan.memory.zero import zero_costs
from understudy.plan.memory.zero3 import zero3_costs
from understudy.recipe.deepspeed_file import effective_deepspeed
from understudy.recipe.schema import DDP, FSDP

__all__ = ["costs_of"]


def costs_of(setting: Setting) -> Costs:
    if isinstance(setting.strategy, DDP):
        return replicated_costs(setting)
    if isinstance(setting.strategy, FSDP):
        return fsdp_costs(setting)
    stage = effective_deepspeed(setting.strategy).stage
    return replicated_costs(setting) if stage == 0 else zero3_costs(setting) if stage == 3 else zero_costs(setting)
