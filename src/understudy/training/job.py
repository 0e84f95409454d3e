"""What every process of a run is told: a resolved recipe and where the prepared things are. One JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap

__all__ = ["Job", "TeacherPlace", "read_job", "write_job"]


@dataclass(frozen=True)
class TeacherPlace:
    """What every process is told of one teacher."""

    directory: Path | None
    """Of its model, as it is loaded; None where it is the student's base or a server's."""
    cache: Path | None
    """Of what it said, where that is read in place of asking it."""
    shared_classes: int
    """The first so many tokens are the same to teacher and student; 0 where the two are aligned."""
    endpoints: tuple[str, ...] = ()
    """Of a server: those that answered."""
    classes: int = 0
    """Of a server: how many its answers are about."""
    alignment: Path | None = None
    """Of one with another tokenizer: where its reading of the data says what the student's does,"""
    examples: tuple[Path, ...] = ()
    """and that reading, of training and evaluation data: token caches."""
    parameters: int = 0
    """Of a model that these processes run."""

    def to_json(self) -> dict[str, Any]:
        places = {"directory": self.directory, "cache": self.cache, "alignment": self.alignment}
        return {name: None if path is None else str(path) for name, path in places.items()} | {
            "shared_classes": self.shared_classes,
            "endpoints": list(self.endpoints),
            "classes": self.classes,
            "examples": [str(path) for path in self.examples],
            "parameters": self.parameters,
        }

    @staticmethod
    def of_json(values: dict[str, Any]) -> TeacherPlace:
        directory, cache, alignment = (
            None if values[name] is None else Path(values[name]) for name in ("directory", "cache", "alignment")
        )
        return TeacherPlace(
            directory,
            cache,
            values["shared_classes"],
            tuple(values["endpoints"]),
            values["classes"],
            alignment,
            tuple(map(Path, values["examples"])),
            values["parameters"],
        )


@dataclass(frozen=True)
class Job:
    recipe: Recipe
    """No `auto` left that a process would have to decide."""
    sources: SourceMap
    """So that an error found by a process still names a line."""
    run_directory: Path
    model_directory: Path
    """config.json and weights, random ones materialised."""
    adapter_directory: Path | None
    """The adapter's first values."""
    tokenizer_directory: Path
    teachers: tuple[TeacherPlace, ...]
    """Of a distillation, in the recipe's order."""
    train: Path
    """Entry of the token cache."""
    evaluation: Path | None
    checkpoints: bool = True
    """Whether to write any."""
    resume: Path | None = None
    """The checkpoint to go on from."""
    token: str = ""
    """Of this run's ownership of the run directory (`launch.run_lock`)."""
    memory_predicted_bytes: int | None = None
    """What the plan says that each process takes at most; None where the planner does not know the model."""


def write_job(path: Path, job: Job) -> None:
    values = {
        "recipe": job.recipe.model_dump(mode="json"),
        "sources": {
            "file": job.sources.file,
            "lines": dict(job.sources.lines),
            "overridden": sorted(job.sources.overridden),
        },
        "run_directory": str(job.run_directory),
        "model_directory": str(job.model_directory),
        "adapter_directory": None if job.adapter_directory is None else str(job.adapter_directory),
        "tokenizer_directory": str(job.tokenizer_directory),
        "teachers": [place.to_json() for place in job.teachers],
        "train": str(job.train),
        "evaluation": None if job.evaluation is None else str(job.evaluation),
        "checkpoints": job.checkpoints,
        "resume": None if job.resume is None else str(job.resume),
        "token": job.token,
        "memory_predicted_bytes": job.memory_predicted_bytes,
    }
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def read_job(path: Path) -> Job:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    sources = values["sources"]
    return Job(
        recipe=Recipe.model_validate_json(json.dumps(values["recipe"])),
        sources=SourceMap(sources["file"], sources["lines"], frozenset(sources["overridden"])),
        run_directory=Path(values["run_directory"]),
        model_directory=Path(values["model_directory"]),
        adapter_directory=None if values["adapter_directory"] is None else Path(values["adapter_directory"]),
        tokenizer_directory=Path(values["tokenizer_directory"]),
        teachers=tuple(TeacherPlace.of_json(place) for place in values["teachers"]),
        train=Path(values["train"]),
        evaluation=None if values["evaluation"] is None else Path(values["evaluation"]),
        checkpoints=values["checkpoints"],
        resume=None if values["resume"] is None else Path(values["resume"]),
        token=values["token"],
        memory_predicted_bytes=values["memory_predicted_bytes"],
    )
