"""The entry point: finds commands without importing them, and turns every failure into an exit status.

A command is a module of this package whose top level defines `command: click.Command`; it is called after its file
(`import_` for a name that Python keeps), and the first line of its docstring is what `understudy --help` shows. Only
the module of the command asked for is imported, so help and errors answer at once. A command's function returns its
exit status, None for 0.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import keyword
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from understudy.errors import StoppedError, UnderstudyError, is_full_disk

__all__ = ["exit_status", "main", "program"]


class Program(click.Group):
    """A group whose commands are the modules beside this one."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(_summaries())

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _summaries():
            return None
        module = importlib.import_module(f"understudy.cli.{_module(name)}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if arguments and not arguments[0].startswith("-") and arguments[0] not in _summaries():
            near = difflib.get_close_matches(arguments[0], _summaries(), n=1)
            hint = f"did you mean {near[0]}?" if near else "`understudy --help` lists them."
            raise click.UsageError(f"there is no command {arguments[0]!r}; {hint}")
        return super().resolve_command(context, arguments)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_summaries().items()))


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="understudy")
# The deepspeed launcher puts it before our own arguments; LOCAL_RANK says the same.
@click.option("--local_rank", type=int, hidden=True, expose_value=False)
def program() -> None:
    """Fine-tune and distil language models: one recipe, any strategy, any number of devices, the same result.

    Example: understudy train recipes/quickstart.yaml training.epochs=1
    """


def main() -> None:
    """Runs the command line of this process and exits with its status."""
    sys.exit(exit_status(sys.argv[1:]))


def exit_status(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit status; a failure's sentence goes to stderr."""
    try:
        status = program.main(list(arguments), prog_name="understudy", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.UsageError as error:
        return _fail(_usage(error), 2)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 1)
    except StoppedError as error:  # as asked: no error
        click.echo(str(error), err=True)
        return error.exit_status
    except UnderstudyError as error:
        return _fail(str(error), error.exit_status)
    # The outermost frame: nothing may pass it without a status, and nothing is hidden.
    except Exception as error:  # noqa: BLE001
        if path := _full_disk(error):
            return _fail(f"{path}: no space is left on the disk; free some, or choose another `output_dir`.", 2)
        _fail(_first_line(error), 1)
        click.echo(traceback.format_exc(), err=True, nl=False)
        return 1
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    for line in message.splitlines():
        click.echo(f"error: {line}", err=True)
    return status


def _usage(error: click.UsageError) -> str:
    message = " ".join(error.format_message().split())
    if error.ctx is None:
        return message
    stop = "" if message.endswith((".", "?")) else "."
    return f"{message}{stop} See `{error.ctx.command_path} --help`."


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _full_disk(error: BaseException | None) -> str | None:
    """The path whose disk is full, if that is what lies under the failure."""
    while error is not None:
        if is_full_disk(error):
            return str(getattr(error, "filename", None) or "output")
        error = error.__cause__ or error.__context__
    return None


def _module(name: str) -> str:
    module = name.replace("-", "_")
    return f"{module}_" if keyword.iskeyword(module) else module


@functools.cache
def _summaries() -> dict[str, str]:
    """Each command's name and one-line help, read from the sources: importing all of them would be felt."""
    found = {}
    for path in Path(__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_bytes())
        if any(_defines_command(node) for node in tree.body):
            lines = (ast.get_docstring(tree) or "").splitlines()
            found[path.stem.rstrip("_").replace("_", "-")] = lines[0] if lines else ""
    return found


def _defines_command(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name == "command"
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(target, ast.Name) and target.id == "command" for target in targets)
