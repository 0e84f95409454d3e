"""Fields that contradict each other are refused together, and what only looks like it is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from understudy.errors import RecipeError, UserError
from understudy.recipe.deepspeed_file import effective_deepspeed, read_deepspeed_file
from understudy.recipe.rules import RULES, check, check_processes
from understudy.recipe.schema import DeepSpeed, Recipe
from understudy.recipe.source_map import SourceMap

pytestmark = pytest.mark.unit

FOREIGN = Path(__file__).parents[3] / "shared" / "foreign"


def recipe_with(changes: dict[str, Any]) -> Recipe:
    """A right recipe with some sections given by dotted keys."""
    values: dict[str, Any] = {
        "name": "r",
        "output_dir": "runs/r",
        "model": {"path": "m"},
        "data": {"train": [{"path": "a"}]},
    }
    for key, value in changes.items():
        section, _, field = key.partition(".")
        if field:
            values.setdefault(section, {})[field] = value
        else:
            values[section] = value
    return Recipe.model_validate(values)


def violations(changes: dict[str, Any]) -> dict[str, str]:
    try:
        check(recipe_with(changes), SourceMap("r.yaml"))
    except RecipeError as error:
        return {violation.key: violation.message for violation in error.violations}
    return {}


def served(*addresses: str) -> dict[str, Any]:
    return {**TAUGHT, "teacher": {**SERVER, "endpoints": addresses}}


def answered_at(address: str) -> dict[str, Any]:
    return {**TAUGHT, "on_policy_fraction": 0.5, "on_policy": {"endpoint": address}}


HYBRID = {"kind": "fsdp", "sharding": "hybrid_shard"}
TAUGHT = {"kind": "distillation", "teacher": {"kind": "resident", "path": "t"}}
UNIVERSAL = {**TAUGHT, "divergence": "uld"}
SERVER = {"kind": "server", "path": "t", "endpoints": ["http://127.0.0.1:1/v1"]}
SEVERAL = {"kind": "several", "teachers": [{"kind": "resident", "path": "t"}, SERVER]}
CACHED = {"kind": "distillation", "teacher": {"kind": "cache", "path": "t", "targets": "samples", "k": 12}}
HIDDEN = {"kind": "cache", "path": "t", "targets": "hidden"}
NO_ADDRESSES = (
    "127.0.0.1:8000/v1",
    "ftp://a/v1",
    "http:///v1",
    "http://me:word@a/v1",
    "http://a:port/v1",
    "http://a b/v1",
    "http://[::1/v1",
    "http://a/v1?key=b",
)
RANDOM = {"init": "random", "tokenizer": "t", "config": {"model_type": "llama"}}
PRUNED = {"path": "m", "init": "pruned"}

# Rule; recipes it refuses, by the key it names; recipes near them that it lets pass.
CASES: list[tuple[str, list[tuple[str, dict[str, Any]]], list[dict[str, Any]]]] = [
    ("a_name_is_one_part_of_a_path", [("name", {"name": "a/b"}), ("name", {"name": ".."})], [{"name": "a.b"}]),
    ("the_output_directory_has_a_name", [("output_dir", {"output_dir": " "})], [{"output_dir": "/tmp/x"}]),
    (
        "the_batch_feeds_every_process",
        [
            ("training.global_batch_size", {"cluster.processes": 4, "training.global_batch_size": 3}),
            ("parallel.replicate", {"cluster.processes": 5, "parallel.replicate": 2, "strategy": HYBRID}),
        ],
        [
            {"cluster.processes": 4, "training.global_batch_size": 4},
            {"cluster.processes": 4, "parallel.replicate": 2, "strategy": HYBRID},
            {"training.global_batch_size": 1},
        ],
    ),
    (
        "a_memory_limit_is_a_fraction_or_a_size",
        [("training.memory_limit", {"training.memory_limit": limit}) for limit in (0, 1.5, -0.1, "20", "90%", "0GiB")],
        [{"training.memory_limit": limit} for limit in (0.9, 1, "20GiB", "2 GB", "512MiB", "1.5tib", None)],
    ),
    (
        "a_pretrained_model_has_a_path",
        [("model", {"model": {}}), ("model", {"model": {"init": "pruned", "layers": [0]}})],
        [{}],
    ),
    (
        "a_random_model_has_an_architecture",
        [("model", {"model": {"init": "random", "tokenizer": "t"}})],
        [{"model": RANDOM}, {"model": {"init": "random", "path": "m"}}],
    ),
    (
        "a_random_model_has_a_tokenizer",
        [("model", {"model": {"init": "random", "config": {"model_type": "llama"}}})],
        [{"model": RANDOM}],
    ),
    (
        "a_revision_is_of_something_on_the_hub",
        [("model.revision", {"model": {**RANDOM, "revision": "main"}})],
        [{"model": {"path": "m", "revision": "main"}}],
    ),
    (
        "new_tokens_are_different_words",
        [
            ("model.new_tokens", {"model": {"path": "m", "new_tokens": ["<a>", "<b>", "<a>"]}}),
            ("model.new_tokens", {"model": {"path": "m", "new_tokens": [" "]}}),
        ],
        [{"model": {"path": "m", "new_tokens": ["<a>", "<A>"]}}],
    ),
    (
        "only_a_pruned_model_is_cut",
        [
            ("model.layers", {"model": {"path": "m", "layers": [0, 2]}}),
            ("model.hidden_size", {"model": {"path": "m", "init": "random", "hidden_size": 64}}),
        ],
        [{"model": {"path": "m", "init": "pruned", "layers": [0, 2], "hidden_size": 64}}, {"model": {"path": "m"}}],
    ),
    (
        "a_pruned_model_is_cut",
        [("model.init", {"model": {"path": "m", "init": "pruned"}})],
        [{"model": {"path": "m", "init": "pruned", "keep_heads": 4}}],
    ),
    (
        "kept_layers_are_in_order",
        [
            ("model.layers", {"model": {**PRUNED, "layers": [0, 2, 2]}}),
            ("model.layers", {"model": {**PRUNED, "layers": [0, 2, 1]}}),
        ],
        [{"model": {**PRUNED, "layers": [0, 2, 5]}}, {"model": {**PRUNED, "layers": [7]}}],
    ),
    (
        "a_rule_for_layers_has_a_number",
        [
            ("model.layers", {"model": {**PRUNED, "layers": "uniform"}}),
            ("model.keep_layers", {"model": {**PRUNED, "layers": [0, 1], "keep_layers": 2}}),
            ("model.keep_layers", {"model": {**PRUNED, "keep_layers": 2}}),
        ],
        [
            {"model": {**PRUNED, "layers": "importance", "keep_layers": 2}},
            {"model": {**PRUNED, "intermediate_size": 64}},
        ],
    ),
    (
        "the_sizes_of_a_pruned_model_are_what_it_keeps",
        [("model.config.num_hidden_layers", {"model": {**PRUNED, "layers": [0], "config": {"num_hidden_layers": 1}}})],
        [
            {"model": {**PRUNED, "layers": [0], "config": {"attention_dropout": 0.1}}},
            {"model": {"path": "m", "config": {"hidden_size": 64}}},
        ],
    ),
    (
        "every_source_has_a_path",
        [
            ("data.train.0.path", {"data.train": [{"path": ""}]}),
            ("data.eval.0.path", {"data.train": [{"path": "a"}], "data.eval": [{"path": " "}]}),
        ],
        [{"data.train": [{"path": "a"}], "data.eval": [{"path": "b"}]}],
    ),
    (
        "a_micro_batch_holds_the_longest_example",
        [("training.micro_batch_tokens", {"training.micro_batch_tokens": 99, "data.max_length": 100})],
        [{"training.micro_batch_tokens": 100, "data.max_length": 100}, {"training.micro_batch_tokens": "auto"}],
    ),
    (
        "evaluation_data_comes_from_one_place",
        [("data.eval_fraction", {"data.eval": [{"path": "b"}], "data.eval_fraction": 0.1})],
        [{"data.eval": [{"path": "b"}]}, {"data.eval_fraction": 0.1}],
    ),
    (
        "evaluation_has_data",
        [(f"evaluation.{name}", {f"evaluation.{name}": 3}) for name in ("every", "samples", "max_batches")],
        [{"evaluation.every": 3, "data.eval_fraction": 0.1}, {"evaluation.samples": 0}],
    ),
    (
        "the_best_checkpoint_is_told_by_evaluation",
        [("checkpoint.keep_best", {"checkpoint.keep_best": True})],
        [{"checkpoint.keep_best": True, "data.eval_fraction": 0.1}, {"checkpoint.keep_best": False}],
    ),
    (
        "resuming_has_a_place",
        [("checkpoint.resume", {"checkpoint.resume": " "})],
        [{"checkpoint.resume": "never"}, {"checkpoint.resume": "runs/a/checkpoints/step-00000010"}],
    ),
    (
        "every_divergence_field_is_read",
        [
            ("objective.alpha", {"objective": {**TAUGHT, "alpha": 0.2}}),
            ("objective.beta", {"objective": {**TAUGHT, "divergence": "skew_forward_kl", "beta": 0.2}}),
        ],
        [
            {"objective": {**TAUGHT, "divergence": "jsd", "beta": 0.2}},
            {"objective": {**TAUGHT, "divergence": "skew_reverse_kl", "alpha": 0.2}},
        ],
    ),
    (
        "each_of_several_teachers_has_a_weight",
        [("objective.teacher.weights", {"objective": {**TAUGHT, "teacher": {**SEVERAL, "weights": [1.0]}}})],
        [
            {"objective": {**TAUGHT, "teacher": {**SEVERAL, "weights": [1.0, 3.0]}}},
            {"objective": {**TAUGHT, "teacher": SEVERAL}},
        ],
    ),
    (
        "a_base_teaches_without_its_adapter",
        [
            ("objective.teacher", {"objective": {"kind": "distillation", "teacher": "base"}}),
            ("objective.teacher", {"objective": {"kind": "distillation", "teacher": "base"}, "adapter": "freeze"}),
            (
                "adapter.train",
                {
                    "objective": {"kind": "distillation", "teacher": "base"},
                    "adapter": {"kind": "lora", "train": ["head"]},
                },
            ),
        ],
        [{"objective": {"kind": "distillation", "teacher": "base"}, "adapter": "lora"}, {"objective": TAUGHT}],
    ),
    (
        "draws_estimate_forward_kl_alone",
        [("objective.divergence", {"objective": {**CACHED, "divergence": "jsd"}})],
        [{"objective": CACHED}, {"objective": {**TAUGHT, "divergence": "jsd"}}],
    ),
    (
        "hidden_states_have_no_k",
        [("objective.teacher.k", {"objective": {**TAUGHT, "teacher": {**HIDDEN, "k": 3}}})],
        [{"objective": {**TAUGHT, "teacher": HIDDEN}}, {"objective": CACHED}],
    ),
    (
        "a_server_speaks_at_temperature_one",
        [("objective.temperature", {"objective": {**TAUGHT, "teacher": SERVER, "temperature": 2.0}})],
        [{"objective": {**TAUGHT, "teacher": SERVER}}, {"objective": {**TAUGHT, "temperature": 2.0}}],
    ),
    (
        "a_server_has_an_address",
        [
            *[("objective.teacher.endpoints.0", {"objective": served(address)}) for address in NO_ADDRESSES],
            ("objective.teacher.endpoints.1", {"objective": served("http://a/v1", "b/v1")}),
            ("objective.on_policy.endpoint", {"objective": answered_at("localhost:1")}),
        ],
        [
            {"objective": served("http://[::1]:8000/v1", "https://a.b/c/v1/")},
            {"objective": answered_at("http://localhost:1")},
        ],
    ),
    (
        "what_a_student_says_itself_is_in_no_cache",
        [("objective.teacher", {"objective": {**CACHED, "on_policy_fraction": 0.5}})],
        [{"objective": CACHED}, {"objective": {**TAUGHT, "on_policy_fraction": 0.5}}],
    ),
    (
        "on_policy_settings_are_read",
        [
            ("objective.on_policy", {"objective": {**TAUGHT, "on_policy": {"temperature": 0.5}}}),
            (
                "objective.on_policy.model",
                {"objective": {**TAUGHT, "on_policy_fraction": 0.5, "on_policy": {"model": "student"}}},
            ),
        ],
        [{"objective": {**TAUGHT, "on_policy_fraction": 0.5, "on_policy": {"temperature": 0.5}}}],
    ),
    (
        "hidden_states_are_those_of_one_model_here",
        [("objective.hidden_states", {"objective": {**CACHED, "hidden_states": {}}})],
        [{"objective": {**TAUGHT, "hidden_states": {"loss": "cosine"}}}, {"objective": CACHED}],
    ),
    (
        "another_tokenizers_teacher_runs_here",
        [
            ("objective.teacher", {"objective": {**UNIVERSAL, "teacher": HIDDEN}}),
            ("objective.teacher.teachers.1", {"objective": {**UNIVERSAL, "teacher": SEVERAL}}),
        ],
        [{"objective": UNIVERSAL}, {"objective": {**TAUGHT, "teacher": HIDDEN}}],
    ),
    (
        "two_tokenizers_meet_in_the_data_alone",
        [
            ("objective.on_policy_fraction", {"objective": {**UNIVERSAL, "on_policy_fraction": 0.5}}),
            ("objective.hidden_states", {"objective": {**UNIVERSAL, "hidden_states": {}}}),
            ("data.overflow", {"objective": UNIVERSAL, "data.overflow": "split"}),
        ],
        [{"objective": UNIVERSAL, "data.overflow": "drop"}, {"objective": TAUGHT, "data.overflow": "split"}],
    ),
    (
        "quantized_weights_are_frozen",
        [
            ("quantization", {"quantization": {"bits": 4}}),
            ("quantization", {"quantization": {"bits": 8}, "adapter": "freeze"}),
        ],
        [{"quantization": {"bits": 4}, "adapter": "lora"}, {"adapter": "freeze"}],
    ),
    (
        "eight_bits_have_no_type",
        [
            ("quantization.type", {"quantization": {"bits": 8, "type": "nf4"}, "adapter": "lora"}),
            ("quantization.double", {"quantization": {"bits": 8, "double": False}, "adapter": "lora"}),
        ],
        [
            {"quantization": {"bits": 4, "type": "fp4", "double": False}, "adapter": "ia3"},
            {"quantization": {"bits": 8}, "adapter": "lora"},
        ],
    ),
    (
        "a_residual_is_of_whole_weights",
        [("adapter.init", {"quantization": {"bits": 8}, "adapter": {"kind": "lora", "init": "pissa"}})],
        [
            {"adapter": {"kind": "dora", "init": "olora"}},
            {"quantization": {"bits": 8}, "adapter": {"kind": "lora", "init": "gaussian"}},
        ],
    ),
    (
        "lora_plus_is_of_lora",
        [("optimizer.lora_plus_ratio", {"optimizer.lora_plus_ratio": 16.0, "adapter": "ia3"})],
        [{"optimizer.lora_plus_ratio": 16.0, "adapter": "lora"}, {"optimizer.lora_plus_ratio": 1.0}],
    ),
    (
        "a_run_has_one_length",
        [("training.max_steps", {"training.max_steps": 3, "training.epochs": 3})],
        [{"training.max_steps": 3}, {"training.epochs": 1}],
    ),
    (
        "every_optimizer_field_is_read",
        [
            ("optimizer.momentum", {"optimizer": {"momentum": 0.9}}),
            ("optimizer.betas", {"optimizer": {"kind": "sgd", "betas": [0.9, 0.99]}}),
            ("optimizer.eps", {"optimizer": {"kind": "lion", "eps": 1e-6}}),
        ],
        [{"optimizer": {"kind": "sgd", "momentum": 0.9}}, {"optimizer": {"kind": "muon", "betas": [0.9, 0.99]}}],
    ),
    (
        "every_schedule_field_is_read",
        [
            ("schedule.power", {"schedule": {"power": 2.0}}),
            ("schedule.min_ratio", {"schedule": {"kind": "constant", "min_ratio": 0.0}}),
            ("schedule.gamma", {"schedule": {"kind": "wsd", "gamma": 0.1}}),
        ],
        [{"schedule": {"kind": "polynomial", "power": 2.0}}, {"schedule": {"kind": "step", "gamma": 0.1}}],
    ),
    (
        "adamw_bf16_keeps_bf16_weights",
        [
            ("optimizer.kind", {"optimizer": "adamw_bf16"}),
            ("optimizer.kind", {"optimizer": "adamw_bf16", "training.precision": "bf16"}),
        ],
        [
            {"optimizer": "adamw_bf16", "training.precision": "pure_bf16"},
            {"optimizer": "adamw", "training.precision": "pure_bf16"},
        ],
    ),
    (
        "bf16_moments_follow_their_gradients",
        [
            (
                "optimizer.betas",
                {"optimizer": {"kind": "adamw_bf16", "betas": [0.9, 0.999]}, "training.precision": "pure_bf16"},
            )
        ],
        [
            {"optimizer": {"kind": "adamw_bf16", "betas": [0.9, 0.99]}, "training.precision": "pure_bf16"},
            {"optimizer": {"kind": "adamw", "betas": [0.9, 0.999]}},
        ],
    ),
    (
        "hybrid_shard_and_replicate_go_together",
        [
            ("strategy.sharding", {"strategy": HYBRID}),
            ("parallel.replicate", {"parallel.replicate": 2}),
            ("parallel.replicate", {"parallel.replicate": 2, "strategy": "fsdp"}),
        ],
        [{"strategy": HYBRID, "parallel.replicate": 2}, {"strategy": "fsdp"}],
    ),
    (
        "deepspeed_keeps_fp32_weights",
        [("training.precision", {"strategy": "zero0", "training.precision": "pure_bf16"})],
        [{"strategy": "zero0", "training.precision": "bf16"}, {"strategy": "fsdp", "training.precision": "pure_bf16"}],
    ),
    (
        "partitioned_parameters_have_no_rows",
        [
            ("optimizer.kind", {"strategy": "zero1", "optimizer": "muon"}),
            ("optimizer.kind", {"strategy": {"kind": "deepspeed"}, "optimizer": "adafactor"}),
        ],
        [{"strategy": "zero0", "optimizer": "muon"}, {"strategy": "zero3", "optimizer": "lion"}],
    ),
    (
        "offloaded_optimizer_state_needs_adamw",
        [("optimizer.kind", {"strategy": "zero2-offload", "optimizer": "lion"})],
        [{"strategy": "zero2-offload"}, {"strategy": "fsdp-offload", "optimizer": "lion"}],
    ),
    (
        "optimizer_offload_needs_partitions",
        [("strategy", {"strategy": {"kind": "deepspeed", "stage": 0, "offload_optimizer": "cpu"}})],
        [{"strategy": {"kind": "deepspeed", "stage": 1, "offload_optimizer": "cpu"}}],
    ),
    (
        "parameter_offload_needs_stage_3",
        [("strategy.offload_parameters", {"strategy": {"kind": "deepspeed", "offload_parameters": "cpu"}})],
        [{"strategy": "zero3-offload"}, {"strategy": {"kind": "deepspeed", "offload_parameters": "none"}}],
    ),
    (
        "nvme_offload_has_a_path",
        [("strategy", {"strategy": {"kind": "deepspeed", "stage": 3, "offload_optimizer": "nvme"}})],
        [
            {"strategy": {"kind": "deepspeed", "stage": 3, "offload_parameters": "nvme", "nvme_path": "/nvme"}},
            {"strategy": "zero3-offload"},
        ],
    ),
    (
        "selective_checkpointing_cannot_repeat_stage_3",
        [
            (
                "training.activation_checkpointing",
                {"strategy": "zero3", "training.activation_checkpointing": "selective"},
            )
        ],
        [
            {"strategy": "zero3", "training.activation_checkpointing": "full"},
            {"strategy": "fsdp", "training.activation_checkpointing": "selective"},
        ],
    ),
    (
        "compile_cannot_see_through_stage_3",
        [("training.compile", {"strategy": "zero3", "training.compile": True})],
        [{"strategy": "zero2", "training.compile": True}, {"strategy": "fsdp", "training.compile": True}],
    ),
]


@pytest.mark.parametrize(("name", "refused", "accepted"), CASES, ids=[case[0] for case in CASES])
def test_a_rule_refuses_the_contradiction_and_nothing_near_it(
    name: str, refused: list[tuple[str, dict[str, Any]]], accepted: list[dict[str, Any]]
) -> None:
    [rule] = [rule for rule in RULES if rule.__name__ == name]
    for key, changes in refused:
        assert [found for found, _ in rule(recipe_with(changes))] == [key], changes
        assert key in violations(changes)
    for changes in accepted:
        assert not violations(changes)


def test_every_rule_is_tested_both_ways() -> None:
    assert [rule.__name__ for rule in RULES] == [case[0] for case in CASES]
    assert all(refused and accepted for _, refused, accepted in CASES)


def test_violations_of_several_rules_come_together_with_their_lines() -> None:
    changes = {"strategy": "zero3", "optimizer": "muon", "training.compile": True, "name": "a/b"}
    source = SourceMap("r.yaml", {"optimizer": 7, "training": 2, "training.compile": 3, "name": 1})
    with pytest.raises(RecipeError) as caught:
        check(recipe_with(changes), source)
    assert [(v.key, v.line) for v in caught.value.violations] == [
        ("name", 1),
        ("optimizer.kind", 7),
        ("training.compile", 3),
    ]
    assert len(str(caught.value).splitlines()) == 3


def test_more_processes_than_the_batch_can_feed_are_refused_once_their_number_is_known() -> None:
    recipe = recipe_with({"training.global_batch_size": 2})
    check_processes(recipe, 2, SourceMap("r.yaml"))
    with pytest.raises(RecipeError, match="3 processes are more than a batch of 2 examples can feed"):
        check_processes(recipe, 3, SourceMap("r.yaml"))


# DeepSpeed files

AUTOMATIC = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "weight_decay": 0}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto"}},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"},
    "wall_clock_breakdown": False,
}


def with_file(directory: Path, config: Any, **strategy: Any) -> dict[str, Any]:
    path = directory / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config, indent=1))
    return {"strategy": {"kind": "deepspeed", "config": str(path), **strategy}}


def test_a_deepspeed_file_left_to_auto_agrees_with_any_recipe(tmp_path: Path) -> None:
    for precision in ("auto", "bf16", "fp32"):
        assert not violations({**with_file(tmp_path, AUTOMATIC), "training.precision": precision})
    assert not violations(with_file(tmp_path, {}))


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        ({"train_batch_size": 64}, "train_batch_size", "`training.global_batch_size` is 32 in the recipe"),
        ({"gradient_clipping": 0.5}, "gradient_clipping", "`training.max_grad_norm` is 1.0 in the recipe"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu", 'must be "auto" or left out'),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps", 'must be "auto" or left out'),
        ({"fp16": {"enabled": True}}, "fp16.enabled", '`training.precision` is "bf16" in the recipe'),
        ({"bf16": {"enabled": False}}, "bf16.enabled", '`training.precision` is "bf16" in the recipe'),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype", "must be fp32"),
        ({"communication_data_type": "fp16"}, "communication_data_type", "must be fp32"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type", '`optimizer.kind` is "adamw" in the recipe'),
        ({"optimizer": {"params": {"lr": 1.0}}}, "optimizer.params.lr", "`optimizer.learning_rate` is 2e-05"),
        ({"optimizer": {"params": {"betas": [0.9, 0.9]}}}, "optimizer.params.betas", "is [0.9, 0.95] in the recipe"),
        ({"optimizer": {"params": {"amsgrad": True}}}, "optimizer.params.amsgrad", "has no equal in a recipe"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type", '`schedule.kind` is "cosine" in the recipe'),
        (
            {"scheduler": {"params": {"cos_min_ratio": 0}}},
            "scheduler.params.cos_min_ratio",
            "`schedule.min_ratio` is 0.1",
        ),
        ({"scheduler": {"params": {"warmup_num_steps": 9}}}, "scheduler.params.warmup_num_steps", "cannot be compared"),
    ],
)
def test_a_deepspeed_value_that_contradicts_the_recipe_is_refused(
    tmp_path: Path, config: dict[str, Any], key: str, message: str
) -> None:
    found = violations({**with_file(tmp_path, config), "training.precision": "bf16"})
    assert list(found) == [key]
    assert message in found[key]


def test_a_deepspeed_file_enables_one_precision(tmp_path: Path) -> None:
    found = violations(with_file(tmp_path, {"bf16": {"enabled": True}, "fp16": {"enabled": True}}))
    assert list(found) == ["fp16.enabled"]


def test_deepspeed_values_that_equal_the_recipe_are_accepted(tmp_path: Path) -> None:
    config = {
        "train_batch_size": 32,
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "optimizer": {"type": "Adam", "params": {"lr": 2e-5, "eps": 1e-8}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0.1, "warmup_type": "linear"}},
        "zero_optimization": {"stage": 2},
    }
    assert not violations({**with_file(tmp_path, config, stage=2), "training.precision": "bf16"})


def test_a_contradiction_names_the_line_of_the_deepspeed_file(tmp_path: Path) -> None:
    recipe = recipe_with(with_file(tmp_path, '{\n "zero_optimization": {\n  "stage": 3\n }\n}', stage=2))
    with pytest.raises(RecipeError) as caught:
        check(recipe, SourceMap("r.yaml"))
    assert str(caught.value).startswith(
        f"{tmp_path}/ds.json:3: `zero_optimization.stage` is 3 here but `strategy.stage`"
    )


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('{\n "bf16": {', 2, "not valid JSON"),
        ('{\n "bf16": true}', 2, "`bf16` must be a mapping of keys, not true"),
        ('{"zero_optimization":\n {"stage": 7}}', 2, "`zero_optimization.stage` must be 0, 1, 2 or 3, not 7"),
        ('{"zero_optimization": {"offload_param": {"device": "disk"}}}', 1, "must be none, cpu or nvme"),
        ('{"optimizer": {"params": [1]}}', 1, "`optimizer.params` must be a mapping"),
        ("[]", 1, "a DeepSpeed file is a mapping"),
        (" ", 1, "the DeepSpeed file is empty"),
    ],
)
def test_a_malformed_deepspeed_file_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    recipe = recipe_with({**with_file(tmp_path, text), "name": "a/b"})
    with pytest.raises(RecipeError) as caught:
        check(recipe, SourceMap("r.yaml"))
    of_file, of_name = caught.value.violations
    assert (of_file.file, of_file.line, of_name.key) == (str(tmp_path / "ds.json"), line, "name")
    assert message in of_file.message


def test_fields_and_file_of_a_deepspeed_strategy_merge(tmp_path: Path) -> None:
    assert effective_deepspeed(DeepSpeed()) == (2, "none", "none")
    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    strategy = recipe_with(with_file(tmp_path, config, offload_optimizer="cpu")).strategy
    assert isinstance(strategy, DeepSpeed)
    assert effective_deepspeed(strategy) == (3, "cpu", "cpu")


def test_rules_see_what_the_deepspeed_file_sets(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    found = violations({**with_file(tmp_path, config), "optimizer": "lion", "training.compile": True})
    assert set(found) == {"optimizer.kind", "strategy", "training.compile"}
    config["zero_optimization"]["offload_optimizer"]["nvme_path"] = "/nvme"  # type: ignore[index]
    assert not violations(with_file(tmp_path, config))


FILES = st.dictionaries(
    st.sampled_from(["zero_optimization", "fp16", "bf16", "optimizer", "scheduler", "train_batch_size", "data_types"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.sampled_from(["auto", "cpu", "AdamW"]),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(["stage", "device", "offload_optimizer", "type", "params", "lr", "enabled"]),
                inner,
                max_size=3,
            )
        ),
        max_leaves=6,
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=FILES)
def test_any_deepspeed_file_ends_in_sentences(tmp_path: Path, config: dict[str, Any]) -> None:
    changes = with_file(tmp_path, config)
    assert all(isinstance(message, str) for message in violations(changes).values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ds_z0_config", (0, "none", "none")),
        ("ds_z2_config", (2, "none", "none")),
        ("ds_z2_offload_config", (2, "cpu", "none")),
        ("ds_z3_config", (3, "none", "none")),
        ("ds_z3_offload_config", (3, "cpu", "cpu")),
    ],
)
def test_configurations_of_other_trainers_are_taken_as_they_are(name: str, expected: tuple[int, str, str]) -> None:
    path = FOREIGN / f"{name}.json"
    if not path.exists():
        pytest.skip("the configurations of other trainers are not beside this checkout")
    for precision in ("auto", "bf16", "fp16", "fp32"):
        changes = {"strategy": {"kind": "deepspeed", "config": str(path)}, "training.precision": precision}
        assert not violations(changes)
    assert effective_deepspeed(DeepSpeed(config=str(path))) == expected
    assert read_deepspeed_file(path) == json.loads(path.read_text())


def test_a_missing_deepspeed_file_is_refused() -> None:
    with pytest.raises(UserError, match=r"none\.json: the DeepSpeed file does not exist"):
        check(recipe_with({"strategy": {"kind": "deepspeed", "config": "none.json"}}), SourceMap("r.yaml"))
