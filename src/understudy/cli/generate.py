"""Let a model answer a prompt."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from understudy.cli.arguments import adapter_options, sampling_options
from understudy.errors import UserError

if TYPE_CHECKING:
    from understudy.training.answering import Answered


@click.command
@click.argument("model", metavar="MODEL")
@click.option("--prompt", required=True, help="The text to answer; - reads it from standard input.")
@click.option("--system", help="A system message before it.")
@click.option("--raw", is_flag=True, help="Complete the text as it is, without the chat template.")
@adapter_options
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of streaming text.")
def command(
    model: str,
    prompt: str,
    system: str | None,
    raw: bool,
    base: str | None,
    adapter: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """Let a model answer a prompt: a Hugging Face directory, a Hub id, or a run or checkpoint directory.

    Each of these may hold an adapter. Its base is found where the adapter says, or where --base does. With --adapter,
    MODEL is the base, in memory once, and each adapter answers in turn, under its name.

    Without a chat template the text is completed as it is.

    \b
    Example: understudy generate runs/alpaca-smollm2 --prompt "Name three primary colours."
             understudy generate HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/a --adapter runs/b --prompt Hello
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
    from understudy.training.inference import load_adapters, load_model, seed_sampling

    models = load_adapters(model, adapter, _report) if adapter else [load_model(model, _report, base)]
    sampling = Sampling(max_new_tokens, temperature, top_p)
    results = []
    for loaded in models:
        if raw or (system is None and not loaded.has_chat_template):
            tokens = loaded.tokenizer.encode(text)
        else:
            opening = [] if system is None else [{"role": "system", "content": system}]
            tokens = loaded.prompt_of([*opening, {"role": "user", "content": text}])
        seed_sampling(seed)
        if adapter and not as_json:
            click.echo(f"{loaded.name}:")
        answered = loaded.answer(tokens, sampling, _ignore if as_json else _show)
        results.append(_values(answered, len(tokens)) | ({"adapter": loaded.name} if adapter else {}))
        if not as_json:
            click.echo()
        if answered.finish == "interrupted":
            break
    if as_json:
        asked = {"model": model, "prompt": text}
        click.echo(json.dumps({**asked, **({"answers": results} if adapter else results[0])}, ensure_ascii=False))
    if answered.finish == "interrupted":
        raise KeyboardInterrupt


def _values(answered: Answered, prompt_tokens: int) -> dict[str, Any]:
    return {
        "text": answered.text,
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(answered.tokens),
        "finish": answered.finish,
    }


def _report(line: str) -> None:
    click.echo(line, err=True)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text ({error}); convert it.") from error


def _show(text: str) -> None:
    click.echo(text, nl=False)


def _ignore(text: str) -> None:
    pass
