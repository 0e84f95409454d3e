"""What a distillation asks of its teacher before training."""

from __future__ import annotations

from pathlib import Path

import click

from understudy.cli.arguments import recipe_arguments, sampling_options


@click.group
def command() -> None:
    """Ask a teacher once, and keep what it says for any number of runs.

    Example: understudy teacher cache recipe.yaml
    """


@command.command
@recipe_arguments
def cache(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Keep what the recipe's teacher says of its data: of a recipe with `objective.teacher: {kind: cache, …}`.

    The cache is found by what is in it: teacher, tokenizer, temperature and targets name it, and tokens name each
    example, so that another order, batch size, number of processes or epoch uses the same one. Run it again after it
    was interrupted, or when data were added: what is there stays.

    Example: understudy teacher cache recipe.yaml cluster.processes=2
    """
    from understudy.recipe.load import load_recipe

    loaded, sources = load_recipe(recipe, overrides)  # before the imports that take seconds

    from understudy.training.teacher_cache_build import build_teacher_caches

    build_teacher_caches(loaded, sources, click.echo)


@command.command
@recipe_arguments
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    required=True,
    help="Where the answers go: JSON lines (.jsonl). It must not be there yet.",
)
@sampling_options
@click.option("--max-samples", type=click.IntRange(min=1), help="Answer only the first so many prompts.")
@click.option("--drop-unfinished", is_flag=True, help="Leave out answers that were cut off at --max-new-tokens.")
def generate(
    recipe: Path,
    overrides: tuple[str, ...],
    output: Path,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    max_samples: int | None,
    drop_unfinished: bool,
) -> None:
    """Have the recipe's teacher answer the prompts of its training data, and write the answers as data to train on.

    Each line of FILE has the messages of a row before its last answer, and the teacher's answer in place of that. Name
    FILE as `data.train` of another recipe. The teacher may have another tokenizer than the student; it answers in its
    own chat template. Draws are seeded by --seed, or else by training.seed, and by the example.

    Until all are there, answers are kept in FILE.parts; run the same command again after it was interrupted.

    \b
    Example: understudy teacher generate recipe.yaml -o answers.jsonl
             understudy teacher generate recipe.yaml -o answers.jsonl --temperature 0.7 --top-p 0.95 cluster.processes=2
    """
    from understudy.recipe.load import load_recipe
    from understudy.training.answer_parts import require_new_file

    loaded, sources = load_recipe(recipe, overrides)  # before the imports that take seconds
    require_new_file(output)

    from understudy.training.answering import Sampling
    from understudy.training.teacher_answers import AnswersWanted, generate_answers

    sampling = Sampling(max_new_tokens, temperature, top_p)
    generate_answers(loaded, sources, output, AnswersWanted(sampling, seed, max_samples, drop_unfinished), click.echo)
