"""Talk with a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from understudy.cli.arguments import sampling_options
from understudy.errors import UserError

_PROMPT = "> "


@click.command
@click.argument("model", metavar="MODEL")
@click.option("--system", help="A system message that opens the conversation.")
@sampling_options
def command(
    model: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> None:
    """Talk with a model: a Hugging Face directory, a Hub id, or a run or checkpoint directory.

    It needs a chat template. /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer. On a
    pipe, each line is a turn.

    Example: understudy chat runs/alpaca-smollm2 --temperature 0.7
    """
    from understudy.training.answering import Sampling
    from understudy.training.inference import Conversation, load_model, seed_sampling

    sampling = Sampling(max_new_tokens, temperature, top_p)
    conversation = Conversation(load_model(model, lambda line: click.echo(line, err=True)), sampling, system)
    seed_sampling(seed)
    interactive = sys.stdin.isatty()
    if interactive:
        click.echo("/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer.")
    for line in _lines(interactive):
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
            continue
        try:
            answered = conversation.ask(line, lambda text: click.echo(text, nl=False))
            if answered.finish == "interrupted" and not interactive:
                raise KeyboardInterrupt
        except UserError as error:
            if not interactive:
                raise
            click.echo(f"error: {error} /reset begins anew.", err=True, nl=False)
        except KeyboardInterrupt:  # before the first word of an answer, or on a pipe, where nobody could go on
            if not interactive:
                raise
        click.echo()


def _lines(interactive: bool) -> Iterator[str]:
    """What the user types, without empty lines, until the end of input."""
    if interactive:
        import readline  # noqa: F401  # importing it gives input() its line editing
    while True:
        try:
            line = input(_PROMPT if interactive else "")
        except EOFError:
            if interactive:
                click.echo()
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text ({error}); convert it.") from error
        except KeyboardInterrupt:  # at the prompt there is no answer to stop: it drops the line
            if not interactive:
                raise
            click.echo()
            continue
        if line.strip():
            yield line.strip()
