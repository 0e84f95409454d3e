"""DoRA (Liu et al., 2024), which peft has as a setting of LoRA."""

from understudy.models.adapters.lora import make_config

__all__ = ["make_config"]
