"""Rules about the run as a whole. Imports no torch."""

from __future__ import annotations

from understudy.recipe.rules.rule import Violations, rule
from understudy.recipe.schema import Recipe
from understudy.recipe.sizes import is_limit

__all__ = ["process_violations"]


def process_violations(recipe: Recipe, processes: int) -> Violations:
    """Why the run cannot be split over so many processes."""
    batch, replicate = recipe.training.global_batch_size, recipe.parallel.replicate
    if processes > batch:
        yield (
            "training.global_batch_size",
            f"{processes} processes are more than a batch of {batch} examples can feed; "
            f"raise `training.global_batch_size` to {processes} or start at most {batch} processes.",
        )
    if processes % replicate:
        yield (
            "parallel.replicate",
            f"{processes} processes cannot be split into {replicate} equal groups; "
            f"`parallel.replicate` must divide the number of processes.",
        )


@rule
def a_name_is_one_part_of_a_path(recipe: Recipe) -> Violations:
    if not recipe.name.strip(". ") or any(mark in recipe.name for mark in "/\\\0"):
        yield "name", f"`name` is {recipe.name!r}; it names the run's directory, so it must be a word without slashes."


@rule
def the_output_directory_has_a_name(recipe: Recipe) -> Violations:
    if not recipe.output_dir.strip() or "\0" in recipe.output_dir:
        yield "output_dir", "`output_dir` must name a directory; leave it out for runs/<name>."


@rule
def the_batch_feeds_every_process(recipe: Recipe) -> Violations:
    if recipe.cluster.processes != "auto":
        yield from process_violations(recipe, recipe.cluster.processes)


@rule
def a_memory_limit_is_a_fraction_or_a_size(recipe: Recipe) -> Violations:
    if not is_limit(recipe.training.memory_limit):
        yield (
            "training.memory_limit",
            f"`training.memory_limit` is {recipe.training.memory_limit!r}; write a fraction of the device's memory, "
            "above 0 and at most 1, such as 0.9, or a size with its unit, such as 20GiB.",
        )
