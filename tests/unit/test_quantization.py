"""Quantized frozen bases: the bytes are bitsandbytes' own, may be cut anywhere, and compute as plain layers do."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from tests.small_models import CONFIGS, SIZES, recipe
from understudy.errors import UserError
from understudy.models.initialization import materialize_random
from understudy.models.quantization import materialize
from understudy.models.quantization.bitsandbytes_package import bitsandbytes_functional
from understudy.models.quantization.codec import ALIGNMENT, Codec
from understudy.models.quantization.codecs.bitsandbytes_4bit import FourBit
from understudy.models.quantization.codecs.bitsandbytes_4bit import quantize as quantize_4bit
from understudy.models.quantization.codecs.bitsandbytes_8bit import EightBit
from understudy.models.quantization.codecs.bitsandbytes_8bit import quantize as quantize_8bit
from understudy.models.quantization.linear import QuantizedLinear, replace_linears
from understudy.models.quantization.materialize import materialize_quantized
from understudy.models.quantization.packed import PackedTensor, packed_tensors
from understudy.models.quantization.scheme import scheme_of
from understudy.models.weights import WeightReader
from understudy.recipe.schema import Quantization

pytestmark = pytest.mark.unit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETTINGS = {
    "nf4": Quantization(double=False),
    "nf4-double": Quantization(),
    "fp4": Quantization(type="fp4", double=False),
    "fp4-double": Quantization(type="fp4"),
    "int8": Quantization(bits=8),
}
SHAPES = [(48, 32), (20, 100), (300, 66), (1, 64)]
"""Of the second and third, blocks of 64 straddle rows, and the last block is not full; the third has several blocks of
scales."""
Encoded = tuple[Codec, dict[str, Tensor]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def llama(cache: Path) -> Path:
    directory = materialize_random(recipe("llama", CONFIGS["llama"] | {"attention_bias": True}), 1, cache)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def encode(kind: str, weight: Tensor) -> Encoded:
    """The codec and what is stored for `weight`."""
    chosen = SETTINGS[kind]
    if chosen.data_type == "int8":
        return EightBit(*weight.shape), quantize_8bit(weight)
    codec = FourBit(*weight.shape, data_type=chosen.data_type, nested=chosen.nested)
    return codec, quantize_4bit(weight, data_type=chosen.data_type, nested=chosen.nested)


def packed_tensor(codec: Codec, stored: Mapping[str, Tensor], dtype: torch.dtype) -> PackedTensor:
    return PackedTensor("layer", codec, codec.sources(stored.__getitem__), dtype)


def linear_of(kind: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> QuantizedLinear:
    codec, stored = encode(kind, weight)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer = QuantizedLinear(plain, codec, dtype)
    layer.weight = nn.Parameter(packed_tensor(codec, stored, dtype)[:], requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer


def quantized(directory: Path, kind: str, cache: Path, report: Callable[[str], None] = lambda line: None) -> Path:
    return materialize_quantized(directory, SETTINGS[kind], identity=directory.name, cache=cache, report=report)


def network_of(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network in `directory` with our linear layers, read through `packed_tensors`."""
    described = json.loads((directory / "config.json").read_text())
    scheme = scheme_of(described)
    assert scheme is not None
    plain = {name: value for name, value in described.items() if name != "quantization_config"}
    network: nn.Module = AutoModelForCausalLM.from_config(materialize.make_config(plain, {}), dtype=dtype)
    reader = WeightReader(directory)
    replace_linears(network, scheme, dtype, reader)
    read = packed_tensors(reader, network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            held = read(name)[:]
            module = network.get_submodule(name.rpartition(".")[0])
            setattr(module, name.rpartition(".")[2], nn.Parameter(held.to(dtype), parameter.requires_grad))
    return network


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_values_are_those_of_bitsandbytes(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[0], 1) * 3
    chosen = SETTINGS[kind]
    if chosen.data_type == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight)
        expected = functional.int8_vectorwise_dequant(codes, scales).to(dtype)
    else:
        codes, state = functional.quantize_4bit(weight, quant_type=chosen.data_type, compress_statistics=chosen.nested)
        expected = functional.dequantize_4bit(codes, state).to(dtype)
    dequantized = linear_of(kind, weight, None, dtype).dequantize()
    assert dequantized.dtype == dtype
    assert torch.equal(dequantized, expected)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_rows_of_zeros_stay_zeros(kind: str) -> None:
    weight = torch.randn(4, 64)
    weight[1:3] = 0
    dequantized = linear_of(kind, weight, None, torch.float32).dequantize()
    # With quantized scales a block of zeros has a scale that is not exactly zero, and codes that are.
    assert torch.equal(dequantized[1:3], torch.zeros(2, 64))


@pytest.mark.parametrize("kind", SETTINGS)
def test_transformers_loads_it_with_the_same_values_and_logits(kind: str, llama: Path, cache: Path) -> None:
    directory = quantized(llama, kind, cache)
    loaded = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")
    ours = network_of(directory)
    wrapped = [name for name, module in ours.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(wrapped) == 2 * 7
    for name in wrapped:
        module = loaded.get_submodule(name)
        assert type(module).__name__ == ("Linear8bitLt" if kind == "int8" else "Linear4bit")
        layer = ours.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(layer.dequantize(), dequantize_module_weight(module).float())
    if kind != "int8":  # there bitsandbytes rounds the inputs too
        tokens = torch.arange(1, 40).unsqueeze(0)
        # In eval mode bitsandbytes may take a kernel that computes in bf16.
        expected = loaded.train()(tokens).logits
        torch.testing.assert_close(ours.train()(tokens).logits, expected, rtol=0, atol=1e-5)


def test_everything_but_the_linears_is_as_it_was(llama: Path, cache: Path) -> None:
    directory = quantized(llama, "fp4", cache)
    before, after = load_file(llama / "model.safetensors"), load_file(directory / "model.safetensors")
    kept = {name for name in before if name in after and after[name].dtype == before[name].dtype}
    assert {name for name in before if "proj.weight" not in name} == kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert (directory / "tokenizer.json").read_text() == "{}"
    assert (directory / "generation_config.json").is_file()


def test_a_model_of_several_files_is_quantized_into_several(
    llama: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = quantized(llama, "nf4", cache)
    monkeypatch.setattr(materialize, "_SHARD_BYTES", 9000)
    several = quantized(llama, "nf4", tmp_path)
    files = sorted(several.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    joined = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(single / "model.safetensors")
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)
    loaded = AutoModelForCausalLM.from_pretrained(several, device_map="cpu")
    first = network_of(several).get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(first, QuantizedLinear)
    assert torch.equal(
        dequantize_module_weight(loaded.get_submodule("model.layers.0.self_attn.q_proj")), first.dequantize()
    )


def test_tied_models_keep_their_head(cache: Path) -> None:
    tied = materialize_random(recipe("llama", CONFIGS["llama-tied"]), 1, cache)
    directory = quantized(tied, "nf4", cache)
    network = network_of(directory)
    assert not isinstance(network.get_submodule("lm_head"), QuantizedLinear)
    loaded = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu").train()
    network.tie_weights()  # type: ignore[operator]
    tokens = torch.arange(1, 40).unsqueeze(0)
    torch.testing.assert_close(network(tokens).logits, loaded(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen2", "phi3", "gemma3_text", "gpt_neox", "opt", "gpt_oss"])
def test_architectures_load_in_transformers_too(model_type: str, cache: Path) -> None:
    base = materialize_random(recipe(model_type, CONFIGS[model_type]), 1, cache)
    directory = quantized(base, "nf4-double", cache)
    loaded = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu").train()
    network = network_of(directory).train()
    network.tie_weights()  # type: ignore[operator]
    linears = {name for name, module in loaded.named_modules() if type(module).__name__ == "Linear4bit"}
    assert linears == {name for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    tokens = torch.arange(1, 40).unsqueeze(0)
    torch.testing.assert_close(network(tokens).logits, loaded(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(5,), (1, 5)])
def test_output_and_gradient_are_those_of_a_plain_linear(kind: str, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = linear_of(kind, torch.randn(20, 100), torch.randn(20), dtype)
    hidden = torch.randn(*lead, 100, dtype=dtype, requires_grad=True)
    reference = hidden.detach().clone().requires_grad_()
    expected = F.linear(reference, layer.dequantize(), layer.bias)
    direction = torch.randn_like(expected)
    expected.backward(direction)
    out = layer(hidden)
    out.backward(direction)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    assert torch.equal(hidden.grad, reference.grad)
    assert layer.weight.grad is None
    with torch.no_grad():
        assert torch.equal(layer(hidden), expected)


def test_only_the_packed_parameter_is_kept_for_backward() -> None:
    layer = linear_of("nf4-double", torch.randn(20, 100), torch.randn(20), torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(5, 100, requires_grad=True))
    assert [tensor.data_ptr() for tensor in kept] == [layer.weight.data_ptr()]
    assert kept[0].numel() == layer.weight.numel()


def test_the_parameter_may_be_freed_and_gathered_between_forward_and_backward() -> None:
    layer = linear_of("nf4-double", torch.randn(20, 100), None, torch.float32)
    plain = layer.dequantize()
    hidden = torch.randn(5, 100, requires_grad=True)
    out = layer(hidden)
    gathered = layer.weight.data
    layer.weight.data = torch.empty(0)
    layer.weight.data = gathered.clone()
    gathered.zero_()
    out.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.ones(5, 20) @ plain)


def test_activation_checkpointing_gives_the_same_gradient() -> None:
    layer = linear_of("int8", torch.randn(20, 100), None, torch.bfloat16)
    hidden = torch.randn(5, 100, dtype=torch.bfloat16, requires_grad=True)
    layer(hidden).sum().backward()
    plain, hidden.grad = hidden.grad, None
    checkpoint(layer, hidden, use_reentrant=False).sum().backward()
    assert torch.equal(hidden.grad, plain)


def test_a_second_derivative_is_refused() -> None:
    layer = linear_of("nf4", torch.randn(20, 100), None, torch.float32)
    hidden = torch.randn(5, 100, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(hidden).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_cast_is_refused() -> None:
    layer = linear_of("nf4", torch.randn(20, 100), None, torch.float32)
    with pytest.raises(AssertionError, match="destroys"):
        nn.Sequential(layer).to(torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_weight_may_lie_anywhere_in_memory(dtype: torch.dtype) -> None:
    layer = linear_of("nf4-double", torch.randn(300, 66), None, dtype)
    around = torch.zeros(layer.weight.numel() + 1, dtype=dtype)
    around[1:] = layer.weight
    assert torch.equal(layer.codec.dequantize(around[1:]), layer.dequantize())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(list(SETTINGS)), shape=st.sampled_from(SHAPES))
def test_any_parts_of_a_packed_weight_join_to_the_whole(data: st.DataObject, kind: str, shape: tuple[int, int]) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    codec, stored = encode(kind, torch.randn(shape))
    tensor = packed_tensor(codec, stored, dtype)
    size = codec.numel(dtype)
    assert tensor.shape == (size,)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=8)))
    parts = [tensor[start:stop] for start, stop in zip([0, *cuts], [*cuts, size])]
    joined, whole = torch.cat(parts), tensor[()]
    assert joined.dtype == tensor.dtype == dtype
    assert torch.equal(joined.view(torch.uint8), whole.view(torch.uint8))
    assert torch.equal(whole.view(torch.uint8), tensor[(slice(None),)].view(torch.uint8))


def test_a_part_reads_only_the_rows_that_hold_it() -> None:
    codec, stored = encode("int8", torch.randn(300, 66))
    asked: list[tuple[str, int]] = []

    class Watched:
        def __init__(self, name: str) -> None:
            self.name, self.shape, self.dtype = name, tuple(stored[name].shape), stored[name].dtype

        def __getitem__(self, index: Any) -> Tensor:
            part = stored[self.name][index]
            asked.append((self.name, part.numel()))
            return part

    tensor = PackedTensor("layer", codec, codec.sources(Watched), torch.float32)  # type: ignore[arg-type]
    asked.clear()
    tensor[20:40]  # bytes 80 to 160 are in rows 1 and 2
    assert asked == [("weight", 2 * 66)]


def test_every_segment_is_aligned() -> None:
    codec = FourBit(3, 7, data_type="nf4", nested=True)
    assert all(offset % ALIGNMENT == 0 for offset in codec.offsets.values())
    assert codec.total_bytes % ALIGNMENT == 0


def test_weights_stored_by_another_dtype_are_the_same_bytes(tmp_path: Path) -> None:
    """`bnb_4bit_quant_storage` views the codes as another type."""
    codec, stored = encode("nf4-double", torch.randn(48, 32))
    viewed = {**stored, "weight": stored["weight"].view(-1).view(torch.bfloat16).view(-1, 1)}
    save_file({f"layer.{name}": tensor for name, tensor in viewed.items()}, tmp_path / "model.safetensors")
    reader = WeightReader(tmp_path)
    sources = codec.sources(lambda name: reader(f"layer.{name}"))
    read = PackedTensor("layer", codec, sources, torch.float32)
    assert torch.equal(read[:].view(torch.uint8), packed_tensor(codec, stored, torch.float32)[:].view(torch.uint8))


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_dora_finds_the_norm_of_the_dequantized_weight(kind: str, llama: Path, cache: Path) -> None:
    network = network_of(quantized(llama, kind, cache))
    layer = network.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, QuantizedLinear)
    adapted = get_peft_model(network, LoraConfig(use_dora=True, target_modules=["down_proj"]))  # type: ignore[arg-type]
    wrapped = adapted.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    magnitude = wrapped.lora_magnitude_vector["default"].weight  # type: ignore[index, union-attr]
    torch.testing.assert_close(magnitude, layer.dequantize().norm(dim=1))
    hidden = torch.randn(3, layer.in_features, requires_grad=True)
    torch.testing.assert_close(wrapped(hidden), layer(hidden))


def test_two_builders_at_once_leave_one_directory(llama: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    together = threading.Barrier(2)

    def build(_: int) -> Path:
        together.wait()
        return quantized(llama, "nf4-double", tmp_path, lines.append)

    with ThreadPoolExecutor(2) as builders:
        first, second = builders.map(build, range(2))
    assert first == second
    assert len(lines) == 1
    assert [entry.name for entry in (tmp_path / "quantized").iterdir() if entry.is_dir()] == [first.name]


def test_settings_and_identity_tell_directories_apart(llama: Path, cache: Path) -> None:
    made = {quantized(llama, kind, cache) for kind in ("nf4", "fp4")}
    other = materialize_quantized(llama, SETTINGS["nf4"], identity="other", cache=cache, report=lambda line: None)
    assert len({*made, other}) == 3


def test_a_failed_build_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "model"
    damaged.mkdir()
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(tensors, damaged / "model.safetensors")
    (damaged / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(UserError, match=r"up_proj\.weight holds numbers that are not finite"):
        quantized(damaged, "nf4", tmp_path)
    assert not [entry for entry in (tmp_path / "quantized").iterdir() if entry.is_dir()]


def test_a_quantized_base_is_not_quantized_again(llama: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=r"quantized already \(bitsandbytes\); remove quantization"):
        quantized(quantized(llama, "nf4", cache), "int8", cache)


def test_a_model_without_linear_layers_is_refused(cache: Path) -> None:
    gpt2 = materialize_random(recipe("gpt2", CONFIGS["gpt2"]), 1, cache)
    with pytest.raises(UserError, match="gpt2 has no linear layers"):
        quantized(gpt2, "nf4", cache)


def test_a_missing_package_is_named(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    bitsandbytes_functional.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'understudy\[quantization\]'"):
        quantized(llama, "nf4", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"quant_method": "bitsandbytes", "_load_in_4bit": True, "load_in_4bit": True}, "fp4"),
    ],
)
def test_the_scheme_is_what_the_config_says(section: dict[str, Any], name: str) -> None:
    scheme = scheme_of({"quantization_config": section})
    assert scheme is not None
    assert scheme.name == name
    assert scheme_of({}) is None


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "int4, a 4-bit type"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ in 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "GPTQ in the file format marlin"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:mlp": {"bits": 8}}}, "GPTQ with settings that differ"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ in 4 bits in the file format gemv"),
        ({"quant_method": "awq", "zero_point": False}, "AWQ without zero points"),
        ({"quant_method": "hqq", "quant_config": {"self_attn.q_proj": {}}}, "HQQ with settings that differ"),
    ],
)
def test_what_is_not_read_is_refused_by_name(section: dict[str, Any], named: str) -> None:
    with pytest.raises(
        UserError, match=f"stored as {named}.*, which .* name the model that it was made from"
    ) as raised:
        scheme_of({"quantization_config": section})
    assert raised.value.key == "model.path"


def pack(codes: list[int], bits: int, order: tuple[int, ...] | None = None) -> int:
    """One 32-bit word of `codes`, the first lowest or, with `order`, code order[n] at place n; signed, as int32 is."""
    places = order or tuple(range(len(codes)))
    word = sum(codes[code] << (bits * place) for place, code in enumerate(places))
    return word - 2**32 if word >= 2**31 else word


def directory_of(path: Path, section: dict[str, Any], stored: Mapping[str, Tensor]) -> nn.Module:
    """A network of one layer called `layer`, read from a directory where it is stored so."""
    save_file({f"layer.{name}": tensor.contiguous() for name, tensor in stored.items()}, path / "model.safetensors")
    scheme = scheme_of({"quantization_config": section})
    assert scheme is not None
    reader = WeightReader(path)
    network = nn.ModuleDict({"layer": nn.Linear(32, 16, bias=False, device="meta")})
    replace_linears(network, scheme, torch.float16, reader)
    whole = packed_tensors(reader, network)("layer.weight")
    network["layer"].weight = nn.Parameter(torch.cat([whole[:7], whole[7:]]), requires_grad=False)
    return network["layer"]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("file_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_gptq_checkpoints_are_read(
    bits: int, reordered: bool, file_format: str, scale_dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(bits)
    per_word = 32 // bits
    codes, zeros = torch.randint(2**bits, (32, 16)), torch.randint(1, 2**bits, (2, 16))
    scales = torch.rand(2, 16).to(scale_dtype)
    group = torch.arange(32)[torch.randperm(32) if reordered else slice(None)] // 16
    stored_zeros = zeros - 1 if file_format == "gptq" else zeros
    stored = {
        "qweight": torch.tensor(
            [[pack(codes[i : i + per_word, o].tolist(), bits) for o in range(16)] for i in range(0, 32, per_word)],
            dtype=torch.int32,
        ),
        "qzeros": torch.tensor(
            [[pack(row[o : o + per_word].tolist(), bits) for o in range(0, 16, per_word)] for row in stored_zeros],
            dtype=torch.int32,
        ),
        "scales": scales,
        "g_idx": group.to(torch.int32),
    }
    section = {"quant_method": "gptq", "bits": bits, "group_size": 16, "checkpoint_format": file_format}
    layer = directory_of(tmp_path, section | {"dynamic": {"-:lm_head": {}}}, stored)
    expected = (codes - zeros[group]).double() * scales[group].double()
    assert torch.equal(layer.dequantize(), expected.t().to(torch.float16))  # type: ignore[operator]


def test_awq_checkpoints_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's WQLinear_GEMM.from_linear
    codes, zeros, scales = torch.randint(16, (32, 16)), torch.randint(16, (2, 16)), torch.rand(2, 16).half()
    words = {
        name: torch.tensor(
            [[pack(row[o : o + 8].tolist(), 4, order) for o in (0, 8)] for row in matrix], dtype=torch.int32
        )
        for name, matrix in {"qweight": codes, "qzeros": zeros}.items()
    }
    section = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    layer = directory_of(tmp_path, section, {**words, "scales": scales})
    group = torch.arange(32) // 16
    expected = (codes - zeros[group]).double() * scales[group].double()
    assert torch.equal(layer.dequantize(), expected.t().to(torch.float16))  # type: ignore[operator]
    hidden = torch.randn(3, 32, dtype=torch.float16, requires_grad=True)
    layer(hidden).sum().backward()
    assert torch.equal(hidden.grad, torch.ones(3, 16, dtype=torch.float16) @ layer.dequantize())  # type: ignore[operator]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_checkpoints_are_read(bits: int, axis: int, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    rows, columns = (64, 8) if axis == 1 else (8, 64)  # groups of 8
    codes = torch.randint(2**bits, (rows, columns))
    one_a_group = (rows, 1) if axis == 1 else (1, columns)
    zero, scale = torch.rand(one_a_group) * 2**bits, torch.rand(one_a_group)
    height = rows * bits // 8
    packed = torch.zeros(height, columns, dtype=torch.int64)
    for row in range(rows):
        packed[row % height] += codes[row] << (8 - bits - bits * (row // height))
    weights = {"nbits": bits, "group_size": 8, "axis": axis, "view_as_float": False}
    layer = directory_of(
        tmp_path,
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": weights}},
        {"W_q": packed.to(torch.uint8), "scale": scale, "zero": zero},
    )
    expected = ((codes.float() - zero) * scale).reshape(16, 32).to(torch.float16)
    assert torch.equal(layer.dequantize(), expected)  # type: ignore[operator]


def test_a_quantized_head_is_refused(llama: Path, cache: Path) -> None:
    directory = quantized(llama, "nf4", cache)
    scheme = scheme_of(json.loads((directory / "config.json").read_text()))
    assert scheme is not None
    network = nn.ModuleDict({"lm_head": nn.Embedding(61, 32)})
    with pytest.raises(UserError, match="lm_head is quantized"):
        replace_linears(network, scheme, torch.float32, {"lm_head.weight.absmax"})
    with pytest.raises(UserError, match="no linear layer of it is stored so"):
        replace_linears(network, scheme, torch.float32, set())


def test_weights_of_another_size_are_named(llama: Path, cache: Path) -> None:
    directory = quantized(llama, "nf4", cache)
    scheme = scheme_of(json.loads((directory / "config.json").read_text()))
    assert scheme is not None
    reader = WeightReader(directory)
    name = "model.layers.0.mlp.up_proj"
    network = nn.Module()
    network.add_module("model", nn.ModuleDict({"layers": nn.ModuleDict({"0": nn.ModuleDict({"mlp": nn.Module()})})}))
    network.get_submodule("model.layers.0.mlp").add_module("up_proj", nn.Linear(SIZES["hidden_size"], 64, False))
    replace_linears(network, scheme, torch.float32, reader)
    with pytest.raises(UserError, match=rf"{name}\.weight is \[768, 1\], not \[1024, 1\]"):
        packed_tensors(reader, network)
