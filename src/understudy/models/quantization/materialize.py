"""A quantized copy of a model directory, made once, so that every strategy starts from the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from understudy.errors import UserError
from understudy.models.architecture import UNBUILDABLE, invalid_config, make_config
from understudy.models.made_once import made_once
from understudy.models.quantization.bitsandbytes_package import bitsandbytes_version
from understudy.models.quantization.codecs import bitsandbytes_4bit, bitsandbytes_8bit
from understudy.models.source import read_config_file
from understudy.models.weights import stored_files
from understudy.recipe.schema import Quantization

__all__ = ["materialize_quantized", "quantized_section"]

_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 2 * 10**9
"""A file is held in memory until it is full."""


def materialize_quantized(
    directory: Path, quantization: Quantization, *, identity: str, cache: Path, report: Callable[[str], None]
) -> Path:
    """A model directory with the linear layers of `directory` quantized, and everything else as it is there.

    It is in transformers' bitsandbytes serialization, so `from_pretrained` loads it. Quantized is what transformers
    would take: every linear layer but the output head and what is tied or must stay in fp32. The copy lies in `cache`
    under a digest of `identity`, which tells one model's contents from another's, the settings and the version of
    bitsandbytes; one process builds it, others wait, and it appears whole. `report` gets a line before work begins.
    Holds in memory one weight unpacked, and a file of at most 2 GB (or one larger tensor).

    Raises `UserError` where bitsandbytes is not installed, the model is quantized already, or it has no such layers.
    """
    config = read_config_file(directory)
    if section := config.get("quantization_config"):
        method = section.get("quant_method", "bitsandbytes") if isinstance(section, Mapping) else section
        raise UserError(
            f"the model is quantized already ({method!s:.40}); remove quantization, or name the model that it was made "
            "from.",
            key="quantization",
        )
    described = [identity, quantization.data_type, quantization.nested, bitsandbytes_version()]
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    made = cache / "quantized" / digest[:32]

    def build(building: Path) -> None:
        report(f"quantizing {directory} to {quantization.data_type}, once on this machine …")
        _build(directory, config, quantization, building)

    return made_once(made, build)


def _build(directory: Path, config: dict[str, Any], quantization: Quantization, made: Path) -> None:
    network = _network(config)
    linears, skipped = _linear_names(network)
    if not linears:
        raise UserError(
            f"{config.get('model_type')} has no linear layers that can be quantized; remove quantization.",
            key="quantization",
        )
    shards = _Shards(made)
    found = set()
    for key, name, tensor in _stored_tensors(directory, network):
        layer = name.removesuffix(".weight")
        if layer not in linears:
            shards.add(key, tensor)
            continue
        found.add(layer)
        for part, stored in _quantize(tensor, name, quantization).items():
            shards.add(f"{key.removesuffix('.weight')}.{part}", stored)
    if lost := sorted(linears - found):
        raise UserError(f"{directory} has no weight {lost[0]}.weight; get the model again, or remove quantization.")
    shards.close()
    for pattern in _COMPANIONS:
        for file in directory.glob(pattern):
            if file.name not in ("config.json", _INDEX):
                shutil.copyfile(file, made / file.name)
    described = {**config, "quantization_config": quantized_section(config, quantization, skipped)}
    (made / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _network(config: dict[str, Any]) -> PreTrainedModel:
    try:
        with torch.device("meta"), no_init_weights():
            network: PreTrainedModel = AutoModelForCausalLM.from_config(make_config(config, {}), dtype=torch.float32)
    except UNBUILDABLE as error:
        raise invalid_config(str(config.get("model_type")), {}, error) from error
    network.tie_weights()
    return network


def _linear_names(network: PreTrainedModel) -> tuple[set[str], list[str]]:
    """The layers to quantize, and those that transformers would take too and must be told to leave."""
    fp32 = list(network._keep_in_fp32_modules or ())
    embedding = network.get_input_embeddings()
    tied = getattr(embedding, "weight", None)
    output = network.get_output_embeddings()
    candidates, skipped = [], []
    for name, module in network.named_modules():
        # Of subclasses transformers takes none, of GPT-2's own transposed class all.
        if type(module) is nn.Linear and module is not output and module.weight is not tied:
            candidates.append(name)
        elif type(module) is nn.Linear or isinstance(module, Conv1D):
            skipped.append(name)
    return {name for name in candidates if should_convert_module(name, skipped + fp32)}, skipped


def _stored_tensors(directory: Path, network: PreTrainedModel) -> Iterator[tuple[str, str, Tensor]]:
    """Each stored tensor's key, its name in the network, and itself."""
    renamings = [rule for rule in get_model_conversion_mapping(network) if isinstance(rule, WeightRenaming)]
    known = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    prefix = f"{network.base_model_prefix}."
    for file in stored_files(directory):
        with safe_open(file, framework="pt", device="cpu") as handle:
            for key in handle.keys():  # noqa: SIM118  # the handle is no mapping
                renamed = rename_source_key(key, renamings, [])[0]
                # Checkpoints saved from the base model, or with its prefix where the network has none.
                names = (key, renamed, prefix + key, key.removeprefix(prefix))
                yield key, next((name for name in names if name in known), key), handle.get_tensor(key)


def _quantize(tensor: Tensor, name: str, quantization: Quantization) -> dict[str, Tensor]:
    if tensor.dim() != 2 or not tensor.dtype.is_floating_point:
        raise UserError(
            f"{name} is {list(tensor.shape)} of {tensor.dtype}, which cannot be quantized; get the model again."
        )
    weight = tensor.float()
    if not weight.isfinite().all():
        raise UserError(f"{name} holds numbers that are not finite, which cannot be quantized; get the model again.")
    if quantization.data_type == "int8":
        return bitsandbytes_8bit.quantize(weight)
    return bitsandbytes_4bit.quantize(weight, data_type=quantization.data_type, nested=quantization.nested)


def quantized_section(
    config: Mapping[str, Any], quantization: Quantization, skipped: Sequence[str] = ()
) -> dict[str, Any]:
    """`quantization_config` of a model with this config.json, as transformers writes it; its layers compute in the
    model's own dtype."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    eight_bit = quantization.data_type == "int8"
    section: dict[str, Any] = BitsAndBytesConfig(
        load_in_8bit=eight_bit,
        load_in_4bit=not eight_bit,
        llm_int8_skip_modules=list(skipped),
        bnb_4bit_compute_dtype=dtype if dtype in ("bfloat16", "float16") else "float32",
        bnb_4bit_quant_type="fp4" if eight_bit else quantization.data_type,
        bnb_4bit_use_double_quant=quantization.nested,
    ).to_dict()
    return section


class _Shards:
    """Tensors as safetensors files of limited size, with an index if there are several."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tensors: dict[str, Tensor] = {}
        self._bytes = self._total_bytes = 0
        self._written: list[list[str]] = []

    def add(self, key: str, tensor: Tensor) -> None:
        if self._bytes + tensor.nbytes > _SHARD_BYTES:
            self._write()
        self._tensors[key] = tensor.contiguous()
        self._bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Writes what is left, and names the files as transformers looks for them."""
        self._write()
        count = len(self._written)
        if count == 1:
            self._temporary(1).rename(self._directory / "model.safetensors")
            return
        weight_map = {}
        for number, keys in enumerate(self._written, 1):
            name = f"model-{number:05}-of-{count:05}.safetensors"
            self._temporary(number).rename(self._directory / name)
            weight_map.update(dict.fromkeys(keys, name))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        if self._tensors:
            self._written.append(list(self._tensors))
            save_file(self._tensors, self._temporary(len(self._written)), {"format": "pt"})
            self._tensors, self._bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self._directory / f"{number}.part"
