"""Answers on their way to a file: what was answered so far, in a directory beside it, until all are there.

    FILE.parts/
      settings.yaml                       who answers what, and how; JSON, which is YAML
      answers-of-process-0.jsonl.part     a line an answer, in the order in which they came
      lock

A line counts once it is whole. No name in here ends like data, since FILE may lie in a directory that a recipe names.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from understudy.errors import UserError, is_full_disk

__all__ = ["ABOUT", "Answer", "AnswerFile", "AnswerKey", "AnswerParts", "require_new_file"]

ABOUT = "about"
"""The one of the settings that is there for whoever looks into the file."""
SUFFIXES = (".jsonl", ".ndjson")
_IDENTITIES = {"teacher": "another teacher", "data": "other data"}
"""Settings that are digests."""


class AnswerKey(NamedTuple):
    """The example that was answered."""

    source: int
    """Its number in the recipe, from 0."""
    row: int
    """In the source, from 0."""


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    """With the one that ended it."""
    finished: bool
    """Ended by who answered, not cut off."""


def require_new_file(output: Path) -> None:
    """Raises `UserError` where `output` could not be written in the end: it is there, or is not named like what it will
    be."""
    if output.suffix not in SUFFIXES:
        raise UserError(f"{output} will hold JSON lines; let its name end in .jsonl, so that recipes can read it.")
    parts = AnswerParts(output).directory
    if output.exists() or output.is_symlink():
        left = f" What is left of the run that wrote it, {parts}, can go too." if parts.exists() else ""
        raise UserError(f"{output} is there already, and is never written over; remove it, or name another file.{left}")
    if parts.exists() and not parts.is_dir():
        raise UserError(f"{parts} is in the way of what is answered on the way; remove it, or name another file.")


class AnswerParts:
    """The directory beside `output`. One process of the command holds it, see `claimed`; others add to it."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.directory = output.with_name(f"{output.name}.parts")

    @contextmanager
    def claimed(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Makes the directory for answers under `settings`, or goes on with the one that is there.

        Raises `UserError` when it holds answers under other settings, when another process holds it, and when nothing
        can be written there.
        """
        with _writing(self.output):
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.directory / "lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise UserError(
                    f"another command is writing {self.output} now; wait for it, or name another file."
                ) from None
        try:
            with _writing(self.output):
                self._require_settings(settings)
            yield
        finally:
            lock.release()

    def answers(self) -> dict[AnswerKey, Answer]:
        """All that is there; of an example that was answered twice, the first."""
        found: dict[AnswerKey, Answer] = {}
        for path in sorted(self.directory.glob("answers-*.part")):
            for line in path.read_bytes().splitlines():
                if (read := _read(line)) is not None:
                    found.setdefault(*read)
        return found

    def finish(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Writes `output`, whole or not at all, a line a row, and removes the directory. Returns the lines written."""
        whole, count = self.directory / "whole.part", 0
        with _writing(self.output):
            with whole.open("w", encoding="utf-8", newline="\n") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    count += 1
                file.flush()
                os.fsync(file.fileno())
            if self.output.exists():
                raise UserError("has come to be there meanwhile; move it, and run the same command.", file=self.output)
            whole.replace(self.output)
            _sync_directory(self.output.parent)
            shutil.rmtree(self.directory)
        return count

    def _require_settings(self, settings: Mapping[str, Any]) -> None:
        file = self.directory / "settings.yaml"
        try:
            known = json.loads(file.read_bytes())
        except FileNotFoundError:
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(dict(settings), indent=1, ensure_ascii=False), encoding="utf-8")
            partial.replace(file)
            return
        except ValueError:
            known = None
        if not isinstance(known, dict):
            raise UserError(
                f"is not the settings that were written; remove {self.directory}, or name another file with -o.",
                file=file,
            )
        if differing := _differences(settings, known):
            raise UserError(
                f"{self.directory} holds answers that were begun with {', '.join(differing)}; go on with these "
                "settings, or remove it, or name another file with -o."
            )


class AnswerFile:
    """The answers of one process, to be added to."""

    def __init__(self, parts: AnswerParts, process: int) -> None:
        path = parts.directory / f"answers-of-process-{process}.jsonl.part"
        self._output = parts.output
        with _writing(self._output):
            self._file = path.open("ab+")
            if self._file.tell():
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":  # a process was killed as it wrote
                    self._file.write(b"\n")

    def add(self, answers: Mapping[AnswerKey, Answer]) -> None:
        """Returns once the disk has them."""
        lines = "".join(_line(key, answer) for key, answer in answers.items())
        with _writing(self._output):
            self._file.write(lines.encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _line(key: AnswerKey, answer: Answer) -> str:
    values = {**key._asdict(), "answer": answer.text, "tokens": answer.tokens, "finished": answer.finished}
    return json.dumps(values, ensure_ascii=False) + "\n"


def _read(line: bytes) -> tuple[AnswerKey, Answer] | None:
    """None for a line that was cut off."""
    try:
        values = json.loads(line)
        key = AnswerKey(values["source"], values["row"])
        return key, Answer(values["answer"], values["tokens"], values["finished"])
    except (ValueError, TypeError, KeyError):
        return None


def _differences(settings: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """What `known` says otherwise. Where it took other rows, the data differ too."""
    names = [name for name, value in settings.items() if name != ABOUT and known.get(name) != value]
    if "max_samples" in names and "data" in names:
        names.remove("data")
    return [
        _IDENTITIES.get(name) or f"{name} {_shown(known.get(name))} instead of {_shown(settings[name])}"
        for name in names
    ]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Inside, a disk that is full or cannot be written to raises `UserError`."""
    try:
        yield
    except OSError as error:
        if is_full_disk(error):
            message = "no space is left on the disk; free some, and run the same command again to go on."
        else:
            message = f"nothing can be written there ({error.strerror or error}); name another file with -o."
        raise UserError(message, file=output) from error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
