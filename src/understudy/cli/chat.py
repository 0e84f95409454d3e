"""Talk with a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from understudy.cli.arguments import adapter_options, sampling_options
from understudy.errors import UserError

if TYPE_CHECKING:
    from understudy.training.inference import Conversation, LoadedModel

_PROMPT = "> "


@click.command
@click.argument("model", metavar="MODEL")
@click.option("--system", help="A system message that opens the conversation.")
@adapter_options
@sampling_options
def command(
    model: str,
    system: str | None,
    base: str | None,
    adapter: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> None:
    """Talk with a model: a Hugging Face directory, a Hub id, or a run or checkpoint directory.

    Each of these may hold an adapter. Its base is found where the adapter says, or where --base does. With --adapter,
    MODEL is the base, in memory once; the first adapter answers, and `/adapter NAME` lets another one go on.

    It needs a chat template. /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer. On a
    pipe, each line is a turn.

    \b
    Example: understudy chat runs/alpaca-smollm2 --temperature 0.7
             understudy chat HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/a --adapter runs/b
    """
    from understudy.training.answering import Sampling
    from understudy.training.inference import Conversation, load_adapters, load_model, seed_sampling

    sampling = Sampling(max_new_tokens, temperature, top_p)
    models = load_adapters(model, adapter, _report) if adapter else [load_model(model, _report, base)]
    conversation = Conversation(models[0], sampling, system)
    seed_sampling(seed)
    interactive = sys.stdin.isatty()
    if interactive:
        click.echo("/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer.")
        if adapter:
            click.echo(f"/adapter NAME lets another adapter answer: {_listed(models)}. Now it is {models[0].name}.")
    for line in _lines(interactive):
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
            continue
        if adapter and line.split()[0] == "/adapter":
            try:
                _switch(conversation, models, line.removeprefix("/adapter").strip())
            except UserError as error:
                if not interactive:
                    raise
                click.echo(f"error: {error}", err=True)
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


def _switch(conversation: Conversation, models: Sequence[LoadedModel], name: str) -> None:
    chosen = next((model for model in models if model.name == name), None)
    if chosen is None:
        raise UserError(f"there is no adapter {name!r}; its name must be one of {_listed(models)}.")
    conversation.switch(chosen)


def _listed(models: Sequence[LoadedModel]) -> str:
    return ", ".join(model.name for model in models)


def _report(line: str) -> None:
    click.echo(line, err=True)


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
