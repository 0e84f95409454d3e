"""Rules about the model and its data. Imports no torch."""

from __future__ import annotations

from itertools import pairwise

from understudy.recipe.rules.rule import Violations, rule
from understudy.recipe.schema import Recipe

_CUTTING = ("layers", "keep_layers", "keep_heads", "intermediate_size", "hidden_size")
_SIZES = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"),
    *("hidden_size", "layer_types", "vocab_size"),
)


@rule
def a_pretrained_model_has_a_path(recipe: Recipe) -> Violations:
    if recipe.model.init != "random" and not recipe.model.path:
        yield (
            "model",
            "`model.path` is missing; name a Hub id or a directory, or build a new model with `init: random`.",
        )


@rule
def a_random_model_has_an_architecture(recipe: Recipe) -> Violations:
    if recipe.model.init == "random" and not recipe.model.path and not recipe.model.config.get("model_type"):
        yield (
            "model",
            "`init: random` needs `model.config.model_type` (such as llama) or a `model.path` to take it from.",
        )


@rule
def a_random_model_has_a_tokenizer(recipe: Recipe) -> Violations:
    if recipe.model.init == "random" and not recipe.model.path and not recipe.model.tokenizer:
        yield "model", "`model.tokenizer` is missing; without a `model.path` there is none to take it from."


@rule
def a_revision_is_of_something_on_the_hub(recipe: Recipe) -> Violations:
    if recipe.model.revision is not None and not recipe.model.path:
        yield "model.revision", "`model.revision` means nothing without a `model.path`; remove it."


@rule
def new_tokens_are_different_words(recipe: Recipe) -> Violations:
    tokens = recipe.model.new_tokens
    if any(not token.strip() for token in tokens):
        yield "model.new_tokens", "`model.new_tokens` names a token of white space only; remove it."
    if twice := [token for number, token in enumerate(tokens) if token in tokens[:number]]:
        yield "model.new_tokens", f"`model.new_tokens` names {twice[0]!r:.60} twice; remove one of them."


@rule
def only_a_pruned_model_is_cut(recipe: Recipe) -> Violations:
    if recipe.model.init != "pruned":
        for name in _CUTTING:
            if getattr(recipe.model, name) is not None:
                yield f"model.{name}", f"`model.{name}` says what to cut; set `model.init` to pruned, or remove it."


@rule
def a_pruned_model_is_cut(recipe: Recipe) -> Violations:
    if recipe.model.init == "pruned" and all(getattr(recipe.model, name) is None for name in _CUTTING):
        yield (
            "model.init",
            "`init: pruned` needs what to keep: `model.layers`, `keep_heads`, `intermediate_size` or `hidden_size`.",
        )


@rule
def kept_layers_are_in_order(recipe: Recipe) -> Violations:
    layers = recipe.model.layers
    if not isinstance(layers, tuple):
        return
    for before, after in pairwise(layers):
        if before == after:
            yield "model.layers", f"`model.layers` names layer {after} twice; remove one of them."
        elif before > after:
            yield "model.layers", f"`model.layers` names layer {after} after {before}; put them in ascending order."


@rule
def a_rule_for_layers_has_a_number(recipe: Recipe) -> Violations:
    layers, count = recipe.model.layers, recipe.model.keep_layers
    if isinstance(layers, str) and count is None:
        yield "model.layers", f"`model.keep_layers` is missing; say how many layers `layers: {layers}` is to keep."
    if isinstance(layers, tuple) and count is not None:
        yield "model.keep_layers", "`model.layers` lists the layers to keep already; remove `model.keep_layers`."
    if layers is None and count is not None and recipe.model.init == "pruned":
        yield "model.keep_layers", "`model.layers` is missing; say by which rule to choose the layers, such as uniform."


@rule
def the_sizes_of_a_pruned_model_are_what_it_keeps(recipe: Recipe) -> Violations:
    if recipe.model.init == "pruned":
        for name in _SIZES:
            if name in recipe.model.config:
                yield (
                    f"model.config.{name}",
                    f"`model.config.{name}` contradicts `init: pruned`: sizes are those of what is kept; remove it.",
                )


@rule
def every_source_has_a_path(recipe: Recipe) -> Violations:
    for part, sources in (("train", recipe.data.train), ("eval", recipe.data.eval or ())):
        for number, source in enumerate(sources):
            if not source.path.strip():
                yield f"data.{part}.{number}.path", "`path` is empty; name a file, a directory, a glob or a Hub id."


@rule
def a_micro_batch_holds_the_longest_example(recipe: Recipe) -> Violations:
    tokens, longest = recipe.training.micro_batch_tokens, recipe.data.max_length
    if tokens != "auto" and tokens < longest:
        yield (
            "training.micro_batch_tokens",
            f"`training.micro_batch_tokens` is {tokens}, less than one example of `data.max_length` {longest}; "
            f"raise it to {longest} or shorten `data.max_length`.",
        )


@rule
def evaluation_data_comes_from_one_place(recipe: Recipe) -> Violations:
    if recipe.data.eval is not None and recipe.data.eval_fraction > 0:
        yield "data.eval_fraction", "`data.eval` and `data.eval_fraction` contradict each other; remove one of them."


@rule
def evaluation_has_data(recipe: Recipe) -> Violations:
    if recipe.data.eval is not None or recipe.data.eval_fraction > 0:
        return
    for name in ("every", "samples", "max_batches"):
        if getattr(recipe.evaluation, name):
            yield (
                f"evaluation.{name}",
                f"`evaluation.{name}` is set but there is nothing to evaluate on; "
                "give `data.eval` or `data.eval_fraction`.",
            )


@rule
def the_best_checkpoint_is_told_by_evaluation(recipe: Recipe) -> Violations:
    if recipe.checkpoint.keep_best and recipe.data.eval is None and recipe.data.eval_fraction == 0:
        yield (
            "checkpoint.keep_best",
            "`checkpoint.keep_best` is set but there is nothing to evaluate on; "
            "give `data.eval` or `data.eval_fraction`.",
        )


@rule
def resuming_has_a_place(recipe: Recipe) -> Violations:
    if not recipe.checkpoint.resume.strip() or "\0" in recipe.checkpoint.resume:
        yield "checkpoint.resume", "`checkpoint.resume` must be auto, never, or the path of a checkpoint."
