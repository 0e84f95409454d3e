"""Reading a text file that a user named. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from understudy.errors import UserError

__all__ = ["file_named", "read_text"]

_LONGEST_PATH = 1024


def read_text(path: Path, what: str) -> str:
    """The text of a user's file, called `what` in errors. Raises `UserError` where it cannot be read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"the {what} does not exist; check the path.", file=path) from None
    except IsADirectoryError:
        raise UserError(f"the {what} is a directory; name a file in it.", file=path) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"the {what} cannot be read: {getattr(error, 'strerror', None) or error}.", file=path
        ) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"the {what} is not UTF-8 text; save it as UTF-8.", file=path, line=line) from error
    if not text.strip():
        raise UserError(f"the {what} is empty; check the path.", file=path, line=1)
    return text


def file_named(text: str) -> Path | None:
    """The file that `text` names, where a recipe takes a file or a template itself; None where it names none."""
    if "{" in text or not text or len(text) > _LONGEST_PATH:
        return None
    try:
        file = Path(text).expanduser()
        return file if file.is_file() else None
    except (OSError, RuntimeError):  # too long a name, no such user
        return None
