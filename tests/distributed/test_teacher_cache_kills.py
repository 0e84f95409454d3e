"""A teacher's cache that was killed again and again while it was built is the one that was built in one go."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.distributed import small_run
from tests.distributed.started_commands import DEADLINE_SECONDS, StartedCommand, start

pytestmark = pytest.mark.distributed

WORDS = [f"word{i}" for i in range(1100)]
EXAMPLES = 1056
SHARDS = EXAMPLES // 8
"""With a thousand tokens kept a position, shards are as small as they may be."""
SEED = 11


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With recipe.yaml."""
    work = tmp_path_factory.mktemp("work")
    recipe = small_run.small_recipe(work)
    for name in ("tokenizer", "teacher"):
        small_run.write_tokenizer(work / name, WORDS)
    recipe["model"]["config"]["vocab_size"] = len(WORDS) + 20
    sizes = {name: value for name, value in recipe["model"]["config"].items() if name != "model_type"}
    torch.manual_seed(7)
    config = LlamaConfig(**{**sizes, "num_hidden_layers": 4, "hidden_size": 64, "initializer_range": 0.3})
    AutoModelForCausalLM.from_config(config).save_pretrained(work / "teacher")
    rows = [
        {"instruction": f"{WORDS[i]} {WORDS[5 * i % 997]}", "output": f"{WORDS[3 * i % 997]} {WORDS[7 * i % 997]}"}
        for i in range(EXAMPLES)
    ]
    (work / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    del recipe["data"]["eval"], recipe["evaluation"]
    # One step meets every shard.
    recipe["training"] = {"max_steps": 1, "global_batch_size": EXAMPLES, "precision": "fp32"}
    teacher = {"kind": "cache", "path": str(work / "teacher"), "k": 1024}
    small_run.write({**recipe, "objective": {"kind": "distillation", "teacher": teacher}}, work)
    return work


class Build:
    """Of a cache of its own."""

    def __init__(self, work: Path, name: str) -> None:
        self.root = work / name
        self.root.mkdir()
        self._recipe = work / "recipe.yaml"
        self._attempts = 0

    def start(self, command: str, *overrides: str) -> StartedCommand:
        self._attempts += 1
        environment = {"UNDERSTUDY_CACHE": str(self.root), "OMP_NUM_THREADS": "1"}
        arguments = [*command.split(), str(self._recipe), *overrides]
        return start(arguments, self.root / f"scratch-{self._attempts}", environment)

    def shards(self) -> int:
        return len(list(self.root.glob("teachers/*/part-*/shard-*.safetensors")))

    def contents(self) -> dict[str, bytes]:
        teachers = self.root / "teachers"
        files = (path for path in sorted(teachers.rglob("*")) if path.is_file() and path.suffix != ".lock")
        return {str(path.relative_to(teachers)): path.read_bytes() for path in files}


def killed(build: Build, how: str, instants: random.Random) -> None:
    """One attempt that is ended while it writes."""
    command = build.start("teacher cache", "cluster.processes=2")
    wanted = build.shards() + instants.randrange(SHARDS // 10)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while build.shards() <= wanted and command.process.is_alive():
        assert time.monotonic() < deadline, "the build wrote nothing"
        time.sleep(0.002)
    time.sleep(instants.uniform(0.0, 0.02))
    if how == "group":
        os.killpg(command.pid, signal.SIGKILL)
    elif how == "worker":
        os.kill(instants.choice(command.workers()), signal.SIGKILL)
    else:
        os.kill(command.pid, signal.SIGTERM)
    status, said = command.status(), command.errors()
    command.wait_for_workers_to_end()
    if how == "group":
        assert status == -signal.SIGKILL, said
    elif how == "worker":
        assert (status, "was killed by SIGKILL" in said, "run the same command again to go on" in said) == (
            5,
            True,
            True,
        )
    else:
        assert (status, said) == (75, "stopped by SIGTERM; run the same command again to go on.\n")
    assert build.shards() < SHARDS


def test_kills_change_nothing_and_what_was_damaged_is_refused_by_name(work: Path) -> None:
    instants = random.Random(SEED)
    whole, build = Build(work, "whole"), Build(work, "killed")
    going = [whole.start("teacher cache", "cluster.processes=1")]
    for how in instants.sample(["group", "worker", "request"], 3):
        killed(build, how, instants)
    going.append(build.start("teacher cache", "cluster.processes=2"))
    for command in going:
        assert command.status() == 0, command.errors()
        command.wait_for_workers_to_end()
    expected = whole.contents()
    assert len(expected) == 2 * SHARDS + 3  # notes of the shards, and the description, an index and a marker
    assert build.contents() == expected
    refuse_damage(work, build.root, instants)


def refuse_damage(work: Path, cache: Path, instants: random.Random) -> None:
    """Trains from copies of the cache in which a shard was flipped a byte of, or cut off."""
    going = []
    for name in ("flipped", "cut"):
        build = Build(work, name)
        shutil.copytree(cache, build.root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("scratch-*"))
        shard = instants.choice(sorted(build.root.glob("teachers/*/part-*/shard-*.safetensors")))
        content = bytearray(shard.read_bytes())
        if name == "flipped":
            content[instants.randrange(len(content))] ^= 1 << instants.randrange(8)
        else:
            del content[instants.randrange(len(content)) :]
        shard.write_bytes(content)
        command = build.start("train", f"output_dir={build.root}/run", "cluster.processes=1")
        going.append((command, shard))
    for command, shard in going:
        said = "is not what was written: its SHA-256 differs; remove it and run `understudy teacher cache RECIPE`"
        assert command.status() == 2, command.errors()
        assert re.match(re.escape(f"error: {shard}: {said}"), command.errors()), command.errors()
        assert command.errors().count("\n") == 1
