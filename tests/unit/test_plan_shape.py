"""The planner's idea of a model, against the model: every parameter, and what autograd really keeps of a layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.small_models import CONFIGS, SIZES
from understudy.contracts import Batch
from understudy.devices.cpu import CPU
from understudy.errors import UserError
from understudy.models.adapters.attachment import inject
from understudy.models.adapters.freeze import freeze
from understudy.models.adapters.registry import make_config
from understudy.models.architecture import make_config as make_model_config
from understudy.models.build import make_language_model
from understudy.models.language_model import LanguageModel
from understudy.objectives.causal_lm import CausalLMObjective
from understudy.plan.network import make_network
from understudy.plan.shape.attention import kernel_for
from understudy.plan.shape.families import FAMILIES
from understudy.plan.shape.layer import trace_layer
from understudy.plan.shape.model import model_shape
from understudy.plan.shape.tape import Treatment
from understudy.recipe.adapters import IA3, Adapter, Freeze, LlamaAdapter, LoRA, PromptTuning, VeRA
from understudy.recipe.schema import Model
from understudy.strategies.base import materialize

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are so small that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


HEADS_OF_8 = SIZES | {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2}
MORE: dict[str, dict[str, Any]] = {
    "gemma": HEADS_OF_8,
    "ministral": HEADS_OF_8,
    "olmo3": SIZES,
    "cohere2": SIZES,
    "cohere-normed": SIZES | {"model_type": "cohere", "use_qk_norm": True},
    "llama-biased": SIZES | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "glm": HEADS_OF_8,
    "glm4": HEADS_OF_8,
    "helium": HEADS_OF_8,
    "ernie4_5": HEADS_OF_8,
    "seed_oss": HEADS_OF_8,
    "exaone4": SIZES,
    "arcee": SIZES,
    "hunyuan_v1_dense": HEADS_OF_8,
    "mixtral": SIZES | EXPERTS | {"num_local_experts": 4},
    "granitemoe": SIZES | EXPERTS | {"num_local_experts": 4},
    "olmoe": SIZES | EXPERTS | {"num_experts": 4},
    "qwen3_moe": HEADS_OF_8 | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 24},
    "qwen3_moe-sparse": HEADS_OF_8
    | EXPERTS
    | {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 24, "decoder_sparse_step": 2},
    "qwen2_moe": SIZES
    | EXPERTS
    | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
}


def sized(
    hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        **more,
    }


HUB: dict[str, tuple[dict[str, Any], float]] = {
    "SmolLM2-135M": (
        sized(576, 1536, 30, 9, 3, 49152, model_type="llama", tie_word_embeddings=True),
        0.1345,
    ),
    "Llama-3.2-1B": (
        sized(2048, 8192, 16, 32, 8, 128256, model_type="llama", head_dim=64, tie_word_embeddings=True),
        1.2358,
    ),
    "Llama-2-7B": (sized(4096, 11008, 32, 32, 32, 32000, model_type="llama"), 6.7384),
    "Llama-3.1-8B": (sized(4096, 14336, 32, 32, 8, 128256, model_type="llama"), 8.0303),
    "Mistral-7B": (sized(4096, 14336, 32, 32, 8, 32000, model_type="mistral"), 7.2417),
    "Qwen2.5-0.5B": (
        sized(896, 4864, 24, 14, 2, 151936, model_type="qwen2", tie_word_embeddings=True),
        0.4940,
    ),
    "Qwen2.5-7B": (sized(3584, 18944, 28, 28, 4, 152064, model_type="qwen2"), 7.6156),
    "Qwen3-0.6B": (
        sized(1024, 3072, 28, 16, 8, 151936, model_type="qwen3", head_dim=128, tie_word_embeddings=True),
        0.5960,
    ),
    "Qwen3-8B": (sized(4096, 12288, 36, 32, 8, 151936, model_type="qwen3", head_dim=128), 8.1907),
    "Gemma-2-2B": (sized(2304, 9216, 26, 8, 4, 256000, model_type="gemma2", head_dim=256), 2.6143),
    "Gemma-3-1B": (sized(1152, 6912, 26, 4, 1, 262144, model_type="gemma3_text", head_dim=256), 0.9999),
    "Phi-3.5-mini": (sized(3072, 8192, 32, 32, 32, 32064, model_type="phi3"), 3.8211),
}
"""Configurations as they lie on the Hub, and how many billions of parameters their cards say."""


def network_of(name: str, config: dict[str, Any]) -> tuple[dict[str, Any], nn.Module]:
    own = dict(config)
    model_type = own.pop("model_type", name)
    made = AutoConfig.for_model(model_type, **own)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(made)
    network.tie_weights()
    return {"model_type": model_type, **own}, network


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_parameters_are_those_of_the_model_by_name_and_shape(name: str) -> None:
    config, network = network_of(name, (CONFIGS | MORE)[name])
    expected = {key: tuple(parameter.shape) for key, parameter in network.named_parameters()}
    assert {weight.name: weight.shape for weight in model_shape(config).parameters()} == expected
    # A configuration as save_pretrained writes it, with every field.
    stored = network.config.to_dict()
    assert {weight.name: weight.shape for weight in model_shape(stored).parameters()} == expected


def test_every_known_architecture_is_tested() -> None:
    tested = {config.get("model_type", name) for name, config in (CONFIGS | MORE).items()}
    assert set(FAMILIES) == tested


@pytest.mark.parametrize("name", HUB)
def test_models_of_the_hub_have_as_many_parameters_as_they_really_have(name: str) -> None:
    config, billions = HUB[name]
    _, network = network_of("", config)
    shape = model_shape(config)
    assert shape.count == sum(parameter.numel() for parameter in network.parameters())
    assert shape.count == pytest.approx(billions * 1e9, rel=1e-3)
    assert sum(shape.by_component.values()) == shape.count


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "names no model_type"),
        ({"model_type": "lama"}, "does not know the architecture 'lama'; did you mean llama?"),
        ({"model_type": "mamba2"}, "does not know the architecture"),
        ({"model_type": "llama"}, "does not say its hidden_size"),
        ({"model_type": "gpt2", "n_embd": 8, "n_head": 2}, "does not say its n_layer"),
        (SIZES | {"model_type": "llama", "vocab_size": None}, "does not say its vocab_size"),
        (SIZES | {"model_type": "llama", "num_hidden_layers": "two"}, "num_hidden_layers of the model's configuration"),
        (SIZES | {"model_type": "llama", "hidden_size": 30}, "no multiple of num_attention_heads"),
        (CONFIGS["opt"] | {"model_type": "opt", "word_embed_proj_dim": 16}, "does not know opt models that project"),
    ],
)
def test_what_cannot_be_read_from_a_configuration_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        model_shape(config)


ADAPTERS: dict[str, Adapter] = {
    "lora": LoRA(rank=4),
    "lora, two modules": LoRA(rank=4, targets=("q_proj", "v_proj")),
    "lora, an expression": LoRA(rank=4, targets=r".*\.1\.mlp\..*_proj"),
    "lora, one layer": LoRA(rank=4, layers=(1,)),
    "lora and the head": LoRA(rank=4, train=("head",)),
    "lora and both ends": LoRA(rank=4, train=("embeddings", "head")),
    "dora": LoRA(kind="dora", rank=4),
    "ia3": IA3(),
    "vera": VeRA(rank=8),
    "llama_adapter": LlamaAdapter(tokens=3, adapted_layers=1),
    "prompt_tuning": PromptTuning(tokens=3),
    "the last layer": Freeze(last_layers=1),
    "parameters by name": Freeze(parameters=("norm",)),
}


def language_model(directory: Path, name: str, config: dict[str, Any]) -> LanguageModel:
    own = dict(config)
    made = make_model_config({"model_type": own.pop("model_type", name), **own}, {})
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(made.to_dict()))
    return make_language_model(directory, Model(path=str(directory)), CPU())


def with_adapter(model: LanguageModel, adapter: Adapter, dtype: torch.dtype = torch.float32) -> None:
    if isinstance(adapter, Freeze):
        freeze(model, adapter)
    else:
        inject(model, make_config(adapter, model.network), dtype)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_as_many_parameters_are_trained_as_peft_trains(name: str, adapter: Adapter, tmp_path: Path) -> None:
    model = language_model(tmp_path / "m", name, CONFIGS[name])
    with_adapter(model, adapter)
    config = {"model_type": "llama", **CONFIGS[name]}
    network = make_network(model_shape(config), adapter, None)
    assert network.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert network.frozen_numel == frozen


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (LoRA(targets=("q_prj",)), "which no linear layer of this llama model has"),
        (LoRA(targets="("), "no regular expression"),
        (Freeze(last_layers=9), "the model has 2"),
        (Freeze(parameters=("nothing",)), "no parameter's name has in it"),
        (LlamaAdapter(adapted_layers=9), "the model has 2 layers"),
        (LoRA(path="/nowhere"), "cannot be read"),
    ],
)
def test_an_adapter_that_fits_nothing_is_refused(adapter: Adapter, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_network(model_shape({"model_type": "llama", **SIZES}), adapter, None)


def test_an_adapter_that_exists_has_settled_its_own_size(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "target_modules": ["q_proj"]}))
    shape = model_shape({"model_type": "llama", **SIZES})
    assert make_network(shape, LoRA(path=str(tmp_path)), None).trained == 2 * 2 * (32 + 32)


def kept_by_autograd(model: LanguageModel, tokens: int) -> list[int]:
    """Bytes of tensors, parameters apart, that autograd keeps of each layer's forward pass."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: list[dict[int, tuple[int, torch.Tensor]]] = [{} for _ in model.decoder_layers()]
    inside: list[int | None] = [None]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if inside[0] is not None and storage.data_ptr() not in known:
            kept[inside[0]][storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    for number, layer in enumerate(model.decoder_layers()):
        layer.register_forward_pre_hook(lambda *_, number=number: inside.__setitem__(0, number))
        layer.register_forward_hook(lambda *_: inside.__setitem__(0, None))
    document = torch.randint(3, 60, (tokens,))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        CausalLMObjective().loss(model, Batch.of([(document, document.clone())]))
    shared = set(kept[0]) & set(kept[1])  # rotary angles
    return [sum(size for key, (size, _) in part.items() if key not in shared) for part in kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen3",
        "phi3",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "olmo",
        "olmo2",
        "cohere",
        "starcoder2",
        "gpt_oss",
        "opt",
        "gpt_neox",
        "mixtral",
        "qwen2_moe",
        "arcee",
    ],
)
def test_a_layer_keeps_what_autograd_keeps(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, tokens = (CONFIGS | MORE)[name], 128
    model = language_model(tmp_path / "m", name, config)
    materialize(model, torch.device("cpu"), lambda _: dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    sizes = model_shape({"model_type": name, **config}).sizes
    kernel = kernel_for(sizes, "cpu", 0.0, dtype.itemsize, "auto")
    treatment = Treatment(dtype.itemsize, attention=kernel, document=tokens, accelerated=False)
    for number, real in enumerate(kept_by_autograd(model.train(), tokens)):
        # Windows are attended to in bands, whose masks are a few percent of so small a model.
        assert trace_layer(sizes, number, treatment).tape.saved().at(tokens) == pytest.approx(real, rel=0.035)
