"""Where in a user's files each key of a recipe stands, so that errors found much later still name a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from understudy.errors import UserError, Violation

__all__ = ["SourceMap"]


@dataclass(frozen=True)
class SourceMap:
    """`file` is the recipe as the user named it; `lines` maps dotted keys (`data.train.0.path`) to lines from 1."""

    file: str | None = None
    lines: Mapping[str, int] = field(default_factory=dict)
    overridden: frozenset[str] = frozenset()
    """Keys given on the command line: they have no line."""

    def locate(self, key: str) -> tuple[str | None, int | None]:
        """File and line of `key`, or of the nearest mapping around it that stands in the file."""
        if key not in self.lines and any(given.startswith(f"{key}.") for given in self.overridden):
            return "command line", None  # a mapping that an override made
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            prefix = ".".join(parts[:end])
            if prefix in self.overridden:
                return "command line", None
            if prefix in self.lines:
                return self.file, self.lines[prefix]
        return self.file, 1 if self.file else None

    def violation(self, key: str, message: str) -> Violation:
        file, line = self.locate(key)
        return Violation(key, message, file, line)

    def error(self, key: str, message: str) -> UserError:
        file, line = self.locate(key)
        return UserError(message, file=file, line=line)

    @contextmanager
    def placing(self, key: str) -> Iterator[None]:
        """Gives an error raised inside, which `key` is to blame for unless it names a key itself, the place where that
        stands in the recipe; one that has a place keeps it."""
        try:
            yield
        except UserError as error:
            if error.file is not None:
                raise
            raise self.error(error.key or key, error.message) from error
