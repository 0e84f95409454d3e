"""Students cut from a larger model: what is cut, how it is chosen, and what is refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests import tiny_data
from tests.small_models import CONFIGS, VOCABULARY, recipe
from understudy.checkpoint.pruned_model import materialize_pruned
from understudy.data.cache import TokenCache
from understudy.errors import UserError
from understudy.models.initialization import materialize_random
from understudy.models.made_once import made_once
from understudy.models.pruning.choice import choose
from understudy.models.pruning.importance import Importance, Measured, measure
from understudy.models.pruning.structure import Kept, Structure
from understudy.recipe.schema import Model
from understudy.recipe.source_map import SourceMap
from understudy.training.prepare import data_preparer, materialized_model, prepare_job, require_fit
from understudy.training.pruning import pruned_model
from understudy.training.resume import determinants

pytestmark = pytest.mark.unit

TOKENS = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(3))
FOUR_LAYERS = {"num_hidden_layers": 4}
OF_DEPTH = ["llama-tied", "qwen2-windowed", "gemma3_text", "smollm3", "gpt2", "gpt_neox", "gpt_oss", "apertus"]
OF_WIDTHS = ["llama", "llama-tied", "qwen2", "qwen3", "gemma3_text"]


def made(name: str, root: Path, **changes: Any) -> Path:
    """A small random model, its norms and biases not left at what they start from."""
    directory = materialize_random(recipe(name.split("-")[0], CONFIGS[name] | changes), 0, root / "base")
    file = directory / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    weights = {
        key: value + 0.3 * torch.rand(value.shape, generator=generator) if value.dim() == 1 else value
        for key, value in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})
    return directory


def plain(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def cut(directory: Path, kept: Kept, root: Path, **options: Any) -> Path:
    return materialize_pruned(
        Structure(directory), kept, identity="base", cache=root / "cache", report=lambda line: None, **options
    )


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OF_DEPTH)
def test_kept_layers_compute_what_they_did(name: str, tmp_path: Path) -> None:
    directory = made(name, tmp_path, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 4})
    by_hand = plain(directory)
    layers = max((m for m in by_hand.modules() if isinstance(m, nn.ModuleList)), key=len)
    kept = [layers[i] for i in (0, 2, 3)]
    config = by_hand.config
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list) and len(value) == 4:
            setattr(config, key, [value[i] for i in (0, 2, 3)])
    config.num_hidden_layers = 3
    del layers[:]
    layers.extend(kept)
    config.use_cache = False
    student = plain(cut(directory, Kept((0, 2, 3)), tmp_path))
    assert student.config.num_hidden_layers == 3
    same(logits(student), logits(by_hand))


@pytest.mark.parametrize("name", OF_WIDTHS)
def test_cutting_heads_and_channels_is_silencing_them(name: str, tmp_path: Path) -> None:
    directory = made(name, tmp_path)
    masked = plain(directory)
    size = Structure(directory).head_size
    kept = Kept((0, 1), groups=((1,), (0,)), channels=(tuple(range(0, 48, 3)), tuple(range(5, 21))))
    assert kept.groups is not None
    assert kept.channels is not None
    for i, layer in enumerate(masked.model.layers):
        [group] = kept.groups[i]
        silent = [row for head in range(4) if head // 2 != group for row in range(head * size, (head + 1) * size)]
        layer.self_attn.o_proj.weight.data[:, silent] = 0.0
        layer.mlp.down_proj.weight.data[:, [c for c in range(48) if c not in kept.channels[i]]] = 0.0
    student = plain(cut(directory, kept, tmp_path))
    text = student.config.get_text_config()
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (2, 1, size)
    assert text.intermediate_size == 16
    assert not torch.equal(logits(masked), logits(plain(directory)))
    same(logits(student), logits(masked))


def sliced(directory: Path, kept: Sequence[int]) -> dict[str, Tensor]:
    """Weights with fewer dimensions of the hidden states, by the role of each, told by its name."""
    index = torch.tensor(kept)
    found = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        last = name.split(".")[-2]
        if last in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"):
            found[name] = weight[:, index] if weight.dim() == 2 else weight
        elif last in ("o_proj", "down_proj") or (last.endswith("norm") and last not in ("q_norm", "k_norm")):
            found[name] = weight[index]
        else:
            found[name] = weight
    return found


@pytest.mark.parametrize("name", [*OF_WIDTHS, "olmo2"])
def test_a_narrower_model_has_its_part_of_every_weight(name: str, tmp_path: Path) -> None:
    directory, kept = made(name, tmp_path), tuple(i for i in range(32) if i % 4 < 2)
    student = cut(directory, Kept((0, 1), width=kept), tmp_path)
    expected, stored = sliced(directory, kept), load_file(student / "model.safetensors")
    assert stored.keys() == expected.keys()
    for key, weight in stored.items():
        assert torch.equal(weight, expected[key]), key
    model = plain(student)
    text = model.config.get_text_config()
    assert (text.hidden_size, text.num_attention_heads) == (16, 4)
    assert text.head_dim == 8
    assert logits(model).isfinite().all()


def test_dimensions_that_do_nothing_are_cut_without_a_trace(tmp_path: Path) -> None:
    directory, kept = made("llama", tmp_path, rms_norm_eps=1e-12), tuple(range(0, 32, 2))
    silent = [i for i in range(32) if i not in kept]
    weights = load_file(directory / "model.safetensors")
    for name, weight in weights.items():
        if name.split(".")[-2] in ("o_proj", "down_proj"):
            weight[silent] = 0.0
        elif name.split(".")[-2] == "embed_tokens":
            weight[:, silent] = 0.0
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    student = plain(cut(directory, Kept((0, 1), width=kept), tmp_path))
    for module in student.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight.data *= 2**0.5  # the mean of squares is now over half as many, without the zeros
    same(logits(student), logits(plain(directory)))


@pytest.mark.parametrize("tied", [True, False])
def test_the_student_is_stored_like_its_base(tied: bool, tmp_path: Path) -> None:
    directory = made("llama", tmp_path, tie_word_embeddings=tied, **FOUR_LAYERS)
    weights = {name: weight.bfloat16() for name, weight in load_file(directory / "model.safetensors").items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    tiny_data.write_tokenizer(directory)
    kept = Kept((1, 3), channels=((0, 1), (2, 3)))
    student, in_parts = cut(directory, kept, tmp_path), cut(directory, kept, tmp_path / "parts", shard_bytes=1000)
    stored = load_file(student / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in stored) is not tied
    assert torch.equal(stored["model.layers.1.mlp.up_proj.weight"], weights["model.layers.3.mlp.up_proj.weight"][2:4])
    assert (student / "tokenizer.json").read_text() == (directory / "tokenizer.json").read_text()
    assert len(list(in_parts.glob("*.safetensors"))) > 1
    assert torch.equal(logits(plain(in_parts)), logits(plain(student)))


# What is chosen


def documents() -> list[Tensor]:
    return [TOKENS[0], TOKENS[1, :7]]


def test_importance_is_the_mean_over_all_tokens(tmp_path: Path) -> None:
    """Against plain transformers, one document at a time, hidden states and inputs taken there."""
    directory = made("gemma2", tmp_path)
    parts: tuple[Measured, ...] = ("layers", "heads", "channels", "width")
    found = measure(Structure(directory), documents(), parts)
    network, total = plain(directory), sum(map(len, documents()))
    read: dict[str, list[Tensor]] = {}
    for name, module in network.named_modules():
        module.register_forward_pre_hook(
            lambda _, args, name=name: read.setdefault(name, []).append(args[0][0].double()) if args else None
        )
    layers, width = torch.zeros(2).double(), torch.zeros(3, 32).double()
    with torch.no_grad():
        for document in documents():
            output = network(document[None], output_hidden_states=True)
            states = [state[0].double() for state in output.hidden_states]
            last = read["model.norm"][-1]  # what the last layer gave; hidden_states has it after the norm
            for i, (before, after) in enumerate([(states[0], states[1]), (states[1], last)]):
                cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
                layers[i] += (1 - cosine).sum()
            width[2] += states[-1].abs().sum(dim=0)
    for i in range(2):
        for place in ("self_attn.q_proj", "mlp.gate_proj"):
            width[i] += torch.cat(read[f"model.layers.{i}.{place}"]).abs().sum(dim=0)
    channels = torch.stack([torch.cat(read[f"model.layers.{i}.mlp.down_proj"]).abs().mean(dim=0) for i in range(2)])
    heads = torch.stack(
        [
            torch.cat(read[f"model.layers.{i}.self_attn.o_proj"]).reshape(total, 4, 8).norm(dim=-1).mean(dim=0)
            for i in range(2)
        ]
    )
    expected = Importance(layers / total, heads, channels, width / total)
    for part in parts:
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-4, atol=1e-6)


def test_what_matters_most_is_kept(tmp_path: Path) -> None:
    directory = made("llama", tmp_path, **FOUR_LAYERS)
    strong = {0: [3, 17, 40], 1: [0, 1, 2], 2: [45, 46, 47], 3: [7, 8, 30]}
    weights = load_file(directory / "model.safetensors")
    for i, channels in strong.items():
        layer = f"model.layers.{i}"
        weights[f"{layer}.mlp.up_proj.weight"][channels] *= 30.0
        group = i % 2
        weights[f"{layer}.self_attn.v_proj.weight"][group * 8 : group * 8 + 8] *= 30.0
        if i == 2:  # adds next to nothing
            weights[f"{layer}.mlp.down_proj.weight"] *= 1e-4
            weights[f"{layer}.self_attn.o_proj.weight"] *= 1e-4
    for name, weight in weights.items():
        if "norm" in name:
            weight[[4, 9, 11, 30]] *= 50.0
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    model = Model.model_validate(
        {"path": "m", "init": "pruned", "layers": "importance", "keep_layers": 3}
        | {"keep_heads": 2, "intermediate_size": 3, "hidden_size": 4}
    )
    structure = Structure(directory)
    found = choose(model, structure, measure(structure, documents(), ("layers", "heads", "channels", "width")))
    assert found.layers == (0, 1, 3)
    assert found.groups == ((0,), (1,), (1,))
    assert found.channels == tuple(tuple(strong[i]) for i in (0, 1, 3))
    assert found.width == (4, 9, 11, 30)


def test_a_rule_chooses_layers(tmp_path: Path) -> None:
    structure = Structure(made("llama", tmp_path, num_hidden_layers=30, hidden_size=8, intermediate_size=4))

    def chosen(rule: str, count: int) -> tuple[int, ...]:
        model = Model.model_validate({"path": "m", "init": "pruned", "layers": rule, "keep_layers": count})
        return choose(model, structure, Importance()).layers

    assert chosen("uniform", 10) == (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)
    assert (chosen("uniform", 2), chosen("uniform", 1)) == ((0, 29), (0,))
    assert chosen("first", 3) == (0, 1, 2)
    assert (chosen("first_and_last", 3), chosen("first_and_last", 1)) == ((0, 1, 29), (29,))


# Where it lies, and when


def student_of(directory: Path, cache: Path, report: Any = lambda line: None, **fields: Any) -> Path:
    model = Model.model_validate({"path": str(directory), "init": "pruned", **fields})

    def measured_on() -> tuple[Path, TokenCache]:
        examples = [([int(token) for token in document], [1] * len(document)) for document in documents()]
        return directory, tiny_data.cache_of(cache / "tokens", examples)

    return pruned_model(model, directory, measured_on, cache=cache, report=report)


def test_the_same_is_cut_once_and_another_elsewhere(tmp_path: Path) -> None:
    directory, cache = made("llama", tmp_path, **FOUR_LAYERS), tmp_path / "cache"
    lines: list[str] = []
    first = student_of(directory, cache, lines.append, layers=[0, 3])
    assert lines == [
        "pruned: 2 of 4 layers (0, 3).",
        f"cutting a smaller model from {directory}, once on this machine …",
    ]
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert student_of(directory, cache, layers="uniform", keep_layers=2) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    others = [
        student_of(directory, cache, layers=[0, 2]),
        student_of(directory, cache, layers=[0, 3], intermediate_size=8),
        student_of(made("llama-tied", tmp_path, **FOUR_LAYERS), cache, layers=[0, 3]),
    ]
    assert len({first, *others}) == 4
    assert not list(cache.rglob("*.partial"))


def test_importance_is_measured_only_where_it_decides_and_once(tmp_path: Path) -> None:
    directory, cache = made("llama", tmp_path, **FOUR_LAYERS), tmp_path / "cache"
    student_of(directory, cache, layers="first", keep_layers=2)
    assert not (cache / "tokens").exists()
    lines: list[str] = []
    fields = {"layers": "importance", "keep_layers": 2, "keep_heads": 2}
    first = student_of(directory, cache, lines.append, **fields)
    assert lines[0] == "measuring importance on 2 training examples, 18 tokens, once on this machine …"
    again: list[str] = []
    assert student_of(directory, cache, again.append, **fields) == first
    assert [line.partition(":")[0] for line in again] == ["pruned"]


def test_of_two_builders_one_waits_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    place, built = tmp_path / "pruned" / "name", []

    def build(directory: Path) -> None:
        built.append(directory)
        assert not place.exists()
        time.sleep(0.1)
        (directory / "file").write_text("whole")

    def fail(directory: Path) -> None:
        (directory / "file").write_text("half")
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        made_once(place, fail)
    assert not [path for path in place.parent.iterdir() if path.is_dir()]
    threads = [threading.Thread(target=made_once, args=(place, build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert (place / "file").read_text() == "whole"
    assert [path for path in place.parent.iterdir() if path.is_dir()] == [place]


@pytest.mark.parametrize(
    ("name", "fields", "key", "message"),
    [
        ("llama", {"layers": [0, 4]}, "model.layers", "has no layer 4; its 4 layers are 0 to 3"),
        ("llama", {"layers": "uniform", "keep_layers": 5}, "model.keep_layers", "is 5, but the model has 4 layers"),
        ("llama", {"keep_heads": 3}, "model.keep_heads", "2 at a time in this model of 4"),
        ("llama", {"keep_heads": 6}, "model.keep_heads", "is 6, but the model has 4 heads"),
        ("llama", {"intermediate_size": 49}, "model.intermediate_size", "49, but the model has 48"),
        ("llama", {"hidden_size": 33}, "model.hidden_size", "33, but the model has 32 dimensions"),
        (
            "llama",
            {"hidden_size": 18},
            "model",
            r"hidden size \(18\) is not a multiple of .* heads \(4\); choose others",
        ),
        ("llama", {"layers": [0, 1, 2, 3], "keep_heads": 4, "hidden_size": 32}, "model.init", "nothing of the model"),
        ("phi3", {"intermediate_size": 8}, "model.intermediate_size", "gate_up_proj.weight is no plain projection"),
        ("phi3", {"keep_heads": 2}, "model.keep_heads", "qkv_proj.weight is no plain projection"),
        ("olmo2", {"keep_heads": 2}, "model.keep_heads", "q_norm.weight joins or normalizes all of its heads"),
        ("gpt_oss", {"intermediate_size": 8}, "model.intermediate_size", "experts.gate_up_proj is no plain"),
        ("gpt_oss", {"hidden_size": 16}, "model.hidden_size", "experts.gate_up_proj is neither an embedding"),
        ("gpt_neox", {"hidden_size": 16}, "model.hidden_size", "the size of its heads follows from its width"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_anything_is_measured(
    name: str, fields: dict[str, Any], key: str, message: str, tmp_path: Path
) -> None:
    directory = made(name, tmp_path, **FOUR_LAYERS)
    with pytest.raises(UserError, match=message) as caught:
        student_of(directory, tmp_path / "cache", **fields)
    assert caught.value.key == key
    assert not (tmp_path / "cache" / "tokens").exists()


def test_layers_that_go_by_their_number_are_not_put_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    directory, begin = made("llama", tmp_path, **FOUR_LAYERS), modeling_llama.LlamaAttention.__init__

    def with_a_scale(self: Any, config: Any, layer_idx: int) -> None:
        begin(self, config, layer_idx)
        self.scaling = 1.0 / (layer_idx + 1)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "__init__", with_a_scale)
    student_of(directory, tmp_path / "cache", layers=[0, 1])
    with pytest.raises(UserError, match=r"depends on their place \(model\.layers\.1\.self_attn\)"):
        student_of(directory, tmp_path / "cache", layers=[0, 2])


def test_a_quantized_model_and_one_with_its_own_code_are_refused(tmp_path: Path) -> None:
    directory = made("llama", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match="is quantized, which cannot be cut"):
        Structure(directory)
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "a.B"}}))
    with pytest.raises(UserError, match=r"leave model\.trust_remote_code out"):
        Structure(directory, trust_remote_code=True)
    assert Structure(directory).layers == 2


def test_numbers_that_are_not_finite_are_not_ranked(tmp_path: Path) -> None:
    directory = made("llama", tmp_path)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="numbers that are not finite"):
        measure(Structure(directory), documents(), ("width",))


# As a recipe has it


def test_a_job_trains_what_was_cut_by_its_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    base = made("llama", tmp_path, vocab_size=300, max_position_embeddings=512)
    tiny_data.write_tokenizer(base)
    rows = [{"instruction": f"say {i}", "output": f"well, {i}"} for i in range(9)]
    made_recipe = tiny_data.recipe(tiny_data.write_lines(tmp_path / "a.jsonl", rows), model=str(base))
    pruned = {"path": str(base), "init": "pruned", "layers": [1], "intermediate_size": 16, "new_tokens": ["<new>"]}
    trained = made_recipe.model_validate({**made_recipe.model_dump(mode="json"), "model": pruned, "strategy": "ddp"})
    trained = trained.model_copy(
        update={"training": trained.training.model_copy(update={"precision": "fp32", "micro_batch_tokens": 256})}
    )
    lines: list[str] = []
    prepared = prepare_job(trained, SourceMap("r.yaml"), lines.append)
    assert [line.partition(" ")[0] for line in lines].count("training") <= 1, lines
    said = [line.partition(":")[0].partition(" on ")[0] for line in lines]
    assert said.index("measuring importance") < said.index("pruned")
    assert prepared.parameters < 30_000
    config = json.loads((prepared.job.model_directory / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"], config["vocab_size"]) == (1, 16, 301)
    whole = {**pruned, "init": "pretrained", "layers": None, "intermediate_size": None}
    uncut = prepare_job(
        trained.model_copy(update={"model": Model.model_validate(whole)}), SourceMap("r.yaml"), lines.append
    )
    for checkpoint, job in (("its own", prepared.job), ("another", uncut.job)):
        (tmp_path / checkpoint).mkdir()
        (tmp_path / checkpoint / "model").symlink_to(job.model_directory)
    require_fit(prepared.job, tmp_path / "its own")
    with pytest.raises(
        UserError,
        match=r"does not fit this recipe: .* does not fit its configuration|does not fit this recipe: .* lacks",
    ):
        require_fit(prepared.job, tmp_path / "another")
    again: list[str] = []
    assert prepare_job(trained, SourceMap("r.yaml"), again.append).job.model_directory == prepared.job.model_directory
    assert not [line for line in again if line.startswith(("measuring", "cutting"))]
    asked = data_preparer(trained, SourceMap("r.yaml"), prepared.job.tokenizer_directory, again.append)
    cut_from = materialized_model(trained, prepared.job.tokenizer_directory, asked, again.append)
    assert cut_from.parent == tmp_path / "cache" / "pruned"


def test_another_cut_is_another_course_of_training() -> None:
    one, other = (
        tiny_data.recipe("a").model_copy(update={"model": Model(path="m", init="pruned", layers=layers)})
        for layers in ((0, 1), (0, 2))
    )
    assert determinants(one)["model.layers"] == [0, 1]
    assert determinants(one) != determinants(other)
