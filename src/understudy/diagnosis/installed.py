"""Which packages are installed, against what Understudy asks for and what it is tested with. Imports none of them.

What is asked for is read from Understudy's own metadata. `tested_versions.json` is made from constraints.txt by
docs/make_tested_versions.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

__all__ = ["Asked", "asked_for", "installed_version", "tested_version", "unmet"]

OURSELVES = "understudy"
_TESTED = Path(__file__).with_name("tested_versions.json")
_FOR_DEVELOPMENT = ("test", "dev")


@dataclass(frozen=True)
class Asked:
    """A package that Understudy asks for."""

    name: str
    versions: SpecifierSet
    extra: str | None
    """The extra that asks for it; None for what is always needed."""


@cache
def asked_for() -> dict[str, Asked]:
    """By normalised name, those of this platform and Python, but not those for development."""
    provided = metadata.metadata(OURSELVES).get_all("Provides-Extra") or []
    found: dict[str, Asked] = {}
    for extra in (None, *(extra for extra in provided if extra not in _FOR_DEVELOPMENT)):
        for requirement in map(Requirement, metadata.requires(OURSELVES) or []):
            name = canonicalize_name(requirement.name)
            if name != OURSELVES and _applies(requirement, extra):
                found.setdefault(name, Asked(name, requirement.specifier, extra))
    return found


def installed_version(name: str) -> Version | None:
    """None where the package is not installed, or its version is none."""
    try:
        return Version(metadata.version(name))
    except (metadata.PackageNotFoundError, InvalidVersion, TypeError):  # a broken installation has a version of None
        return None


def tested_version(name: str) -> Version | None:
    """The version of the tested set; None for a package that is not in it."""
    tested: dict[str, str] = _tested()
    return Version(tested[name]) if name in tested else None


def unmet(name: str) -> Iterator[str]:
    """What the installed package `name` asks for itself and does not get, each as part of a sentence."""
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, requirements):
        if not _applies(requirement, None):
            continue
        version = installed_version(requirement.name)
        if version is None:
            yield f"{name} needs {requirement.name}, which is not installed"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{name} needs {requirement.name}{requirement.specifier}, and {version} is installed"


@cache
def _tested() -> dict[str, str]:
    tested: dict[str, str] = json.loads(_TESTED.read_text(encoding="utf-8"))
    return tested


def _applies(requirement: Requirement, extra: str | None) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""})
