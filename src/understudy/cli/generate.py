"""Let a model answer a prompt."""

from __future__ import annotations

import json
import sys

import click

from understudy.cli.arguments import sampling_options
from understudy.errors import UserError


@click.command
@click.argument("model", metavar="MODEL")
@click.option("--prompt", required=True, help="The text to answer; - reads it from standard input.")
@click.option("--system", help="A system message before it.")
@click.option("--raw", is_flag=True, help="Complete the text as it is, without the chat template.")
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of streaming text.")
def command(
    model: str,
    prompt: str,
    system: str | None,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """Let a model answer a prompt: a Hugging Face directory, a Hub id, or a run or checkpoint directory.

    Without a chat template the text is completed as it is.

    Example: understudy generate runs/alpaca-smollm2 --prompt "Name three primary colours."
    """
    if raw and system is not None:
        raise UserError("--raw completes the text as it is, so there is no place for --system; drop one of them.")
    text = _standard_input() if prompt == "-" else prompt
    if not text.strip():
        raise UserError("the prompt is empty; give a text with --prompt, or with --prompt - on standard input.")
    for name, given in (("--prompt", text), ("--system", system or "")):
        if any("\ud800" <= character <= "\udfff" for character in given):
            raise UserError(f"{name} holds bytes that are not UTF-8 text; convert it.")

    from understudy.training.answering import Sampling
    from understudy.training.inference import load_model, seed_sampling

    loaded = load_model(model, lambda line: click.echo(line, err=True))
    if raw or (system is None and not loaded.has_chat_template):
        tokens = loaded.tokenizer.encode(text)
    else:
        opening = [] if system is None else [{"role": "system", "content": system}]
        tokens = loaded.prompt_of([*opening, {"role": "user", "content": text}])
    seed_sampling(seed)
    sampling = Sampling(max_new_tokens, temperature, top_p)
    answered = loaded.answer(tokens, sampling, _ignore if as_json else _show)
    if as_json:
        result = {
            "model": model,
            "prompt": text,
            "text": answered.text,
            "prompt_tokens": len(tokens),
            "new_tokens": len(answered.tokens),
            "finish": answered.finish,
        }
        click.echo(json.dumps(result, ensure_ascii=False))
    else:
        click.echo()
    if answered.finish == "interrupted":
        raise KeyboardInterrupt


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text ({error}); convert it.") from error


def _show(text: str) -> None:
    click.echo(text, nl=False)


def _ignore(text: str) -> None:
    pass
