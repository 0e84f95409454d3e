"""LoRA (Hu et al., 2022): a low-rank update beside each frozen matrix; DoRA, rsLoRA and other beginnings by setting."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from transformers import PreTrainedModel

from understudy.models.adapters.peft_package import import_peft
from understudy.models.adapters.targets import find_targets, parts_to_save
from understudy.recipe.adapters import LoRA

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["make_config"]

_INITIAL = {
    "default": True,
    "gaussian": "gaussian",
    "pissa": "pissa_niter_16",  # a randomized decomposition: exact ones take minutes on large matrices
    "olora": "olora",
}


def make_config(adapter: LoRA, network: PreTrainedModel) -> PeftConfig:
    peft = import_peft()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rank_stabilized,
        use_dora=adapter.kind == "dora",
        init_lora_weights=_INITIAL[adapter.init],
        target_modules=find_targets(network, adapter.targets, adapter.layers),
        layers_to_transform=None if adapter.layers is None else list(adapter.layers),
        modules_to_save=parts_to_save(network, adapter.train) or None,
    )
    return cast("PeftConfig", config)
