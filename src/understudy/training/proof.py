"""The proof that a saved model is the trained one: it loads with plain transformers and computes the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.checkpoint.reloading import (
    UnloadableModelError,
    reload_adapter,
    reload_dequantized,
    reload_model,
    reload_tokenizer,
)
from understudy.contracts import IGNORED, Batch, Strategy
from understudy.errors import UnderstudyError
from understudy.models.quantization.scheme import scheme_of
from understudy.models.source import read_config_file
from understudy.models.vocabulary_growth import read_growth
from understudy.recipe.schema import Model

__all__ = ["TOLERANCES", "Proof", "UnprovenModelError", "prove_model", "trained_logits"]

FAITHFUL = ("nf4", "fp4")
"""Quantized bases that transformers computes with as training does; other kernels round activations too, or need a
device."""
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference between two logits, as a share of the largest logit: what the kernels of the two computations,
packed and not, may differ by through a deep network in that dtype."""


class UnprovenModelError(UnderstudyError):
    """The saved model is not the trained one."""


@dataclass(frozen=True)
class Proof:
    difference: float
    """Largest difference of two logits, as a share of the largest."""
    tolerance: float
    tokens: int
    """Positions compared."""


def trained_logits(strategy: Strategy, documents: Sequence[Tensor]) -> Tensor:
    """[T, V] fp32 on the CPU: the trained model's logits at every token of `documents` ([·] int64 each), packed. A
    collective."""
    batch = Batch.of([(tokens, torch.full_like(tokens, IGNORED)) for tokens in documents])
    return strategy.logits(batch, at=torch.arange(len(batch.tokens))).cpu()


def prove_model(
    directory: Path,
    *,
    documents: Sequence[Tensor],
    expected: Tensor,
    base: Path | None = None,
    dtype: torch.dtype,
    tokenizer: Any,
    trust_remote_code: bool,
) -> Proof:
    """Loads `directory` as anybody would, on the CPU, and compares its logits for each document alone with `expected`.
    Of an adapter, `base` is the model that it belongs to, whose vocabulary may have grown since it was saved.

    Raises `UnprovenModelError` when weights are missing, left over or of another shape, when the chat template or the
    tokens of a text changed, or when logits differ by more than the dtype's tolerance. No collective.
    """
    try:
        if base is None:
            model = reload_model(directory, dtype=dtype, trust_remote_code=trust_remote_code)
        else:
            model = _computing_in(dtype, reload_adapter(_reload_base(base, dtype, trust_remote_code), directory))
        reloaded = reload_tokenizer(directory, trust_remote_code=trust_remote_code)
    except UnloadableModelError as error:
        raise UnprovenModelError(f"the model saved in {directory} {error.message}") from error
    _compare_tokenizers(directory, reloaded, tokenizer, documents)
    quantized = getattr(model, "is_quantized", False)
    if quantized:
        # Else bitsandbytes takes a kernel for inference, which rounds to bf16 whatever it is given.
        model.enable_input_require_grads()
    with torch.set_grad_enabled(quantized):
        # A learned prompt comes before the tokens.
        logits = [
            model.eval()(input_ids=tokens.unsqueeze(0)).logits[0, -len(tokens) :].detach().float()
            for tokens in documents
        ]
    scale = float(expected.abs().max())
    proof = Proof(float((torch.cat(logits) - expected).abs().max()) / scale, TOLERANCES[dtype], len(expected))
    if not proof.difference <= proof.tolerance:  # NaN is no proof either
        raise UnprovenModelError(
            f"the model saved in {directory} loads, but its logits differ from the trained model's by "
            f"{proof.difference:.1e} of the largest, more than {proof.tolerance:.0e}; it is kept there for inspection."
        )
    return proof


def _reload_base(directory: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    growth = read_growth(directory)  # the adapter brings the rows that were added
    whole = directory if growth is None else growth.directory
    scheme = scheme_of(read_config_file(whole))
    if scheme is None or scheme.name in FAITHFUL:
        model = reload_model(whole, dtype=dtype, trust_remote_code=trust_remote_code)
        return model if scheme is None else _unquantized_in(dtype, model)
    return reload_dequantized(whole, Model(path=str(whole), trust_remote_code=trust_remote_code), dtype)


def _unquantized_in(dtype: torch.dtype, model: Any) -> Any:
    """transformers leaves what is not quantized in the dtype of the directory, whatever it is asked for."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
        for parameter in module.parameters(recurse=False):
            if type(parameter) is torch.nn.Parameter and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model


def _computing_in(dtype: torch.dtype, adapted: Any) -> Any:
    """peft keeps adapters in fp32 on a base of fewer bits; training computes both in `dtype`."""
    for parameter in adapted.parameters():
        if parameter.dtype is torch.float32:
            parameter.data = parameter.data.to(dtype)
    for name, buffer in adapted.named_buffers():
        if ".vera_" in name:  # its projections, which are no parameters
            buffer.data = buffer.data.to(dtype)
    return adapted


def _compare_tokenizers(directory: Path, reloaded: Any, tokenizer: Any, documents: Sequence[Tensor]) -> None:
    if reloaded.chat_template != tokenizer.chat_template:
        raise UnprovenModelError(f"the tokenizer saved in {directory} has another chat template than training used")
    for text in map(tokenizer.decode, documents):
        if reloaded(text).input_ids != tokenizer(text).input_ids:
            raise UnprovenModelError(f"the tokenizer saved in {directory} splits a training text in another way")
