"""The documentation says what the program does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from understudy.cli.main import program
from understudy.recipe.load import load_recipe

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^\s*(?:\$ )?understudy ((?:[a-z]+ ?)+)|`understudy ((?:[a-z]+ ?)+)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_the_tables_of_fields_are_those_of_the_schema() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_reference.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_named_exists(page: Path) -> None:
    context = click.Context(program)
    for words in COMMAND.findall(page.read_text(encoding="utf-8")):
        names = "".join(words).split()
        command = program.get_command(context, names[0])
        assert command is not None, names
        if isinstance(command, click.Group):
            assert command.get_command(context, names[1]) is not None, names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_whole_recipe_loads(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for number, block in enumerate(blocks):
        if "model:" in block and "data:" in block:
            file = tmp_path / f"{number}.yaml"
            file.write_text(block, encoding="utf-8")
            load_recipe(file, ())
