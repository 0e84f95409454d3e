"""Python and packages: whether what is needed is there, in a version that is enough and that was tested."""

from __future__ import annotations

import importlib
import platform
from functools import partial
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from understudy.diagnosis.check import Finding, Host, all_of, broken, check, ok, warning
from understudy.diagnosis.installed import OURSELVES, asked_for, installed_version, tested_version, unmet

SHOWN = ("torch", "transformers", "numpy", "peft", "bitsandbytes", "deepspeed")
"""Packages with a line of their own."""
MISSING_WITHOUT = {
    "deepspeed": "strategies zero0 to zero3, and their offload",
    "peft": "adapters: LoRA and its kin",
    "bitsandbytes": "quantized models (QLoRA) and the optimizer adamw_8bit",
}
"""What cannot be done without a package that is optional."""


@check("python")
def python(host: Host) -> Finding:
    version = platform.python_version()
    needed = SpecifierSet(metadata.metadata(OURSELVES)["Requires-Python"])
    if not needed.contains(Version(version), prereleases=True):
        return broken(f"{version}; Understudy needs {needed}", f"Make an environment with Python {needed}.")
    return ok(version, version=version)


def package(name: str, host: Host) -> Finding:
    """One of the packages that Understudy asks for."""
    asked, version, tested = asked_for()[name], installed_version(name), tested_version(name)
    wanted = f"{name}{asked.versions}"
    details = {"version": str(version) if version else None, "needed": str(asked.versions), "tested": str(tested)}
    if version is None and asked.extra is not None:
        lacks = MISSING_WITHOUT.get(name, f"what the extra `{asked.extra}` is for")
        fix = f"Where you need them, run `pip install 'understudy[{asked.extra}]'`."
        return warning(f"not installed; without it there are no {lacks}", fix, **details)
    if version is None:
        return broken("not installed, and nothing trains without it", f"Run `pip install '{wanted}'`.", **details)
    if not asked.versions.contains(version, prereleases=True):
        fix = f"Run `pip install --upgrade '{wanted}'`."
        return broken(f"{version} is too old; Understudy needs {asked.versions}", fix, **details)
    if tested is not None and _series(version) > _series(tested):
        fix = f"If something fails that should not, try the tested version: `pip install '{name}=={tested}'`."
        return warning(f"{version} is newer than any that was tested ({tested})", fix, **details)
    return ok(
        f"{version}" if tested is None or version.release == tested.release else f"{version}; tested with {tested}",
        **details,
    )


for _name in SHOWN:
    check(_name)(partial(package, _name))


@check("imports", seconds=180, if_lost="Reinstall what it said last, or make a fresh environment for Understudy.")
def imports(host: Host) -> Finding:
    """Whether the packages with a line of their own can be imported, as far as they are installed. One that cannot may
    lack a library of the system, or be built for other versions of the rest."""
    there = [name for name in SHOWN if installed_version(name) is not None]
    failed: dict[str, list[str]] = {}
    for name in there:
        try:
            importlib.import_module(name)
        # Whatever it raises is what was found out, and the other packages are tried too.
        except Exception as error:  # noqa: BLE001
            words = (str(error).strip().splitlines() or [""])[0]
            failed.setdefault(f"{type(error).__name__}: {words}", []).append(name)
    if not failed:
        return ok(f"{', '.join(there)} can be imported")
    return all_of(
        [
            broken(
                f"{', '.join(names)} cannot be imported ({words})",
                # Those after the first import it.
                "If a library or another package is missing, install that; else "
                f"`pip install --force-reinstall {names[0]}`.",
            )
            for words, names in failed.items()
        ]
    )


@check("other-packages")
def other_packages(host: Host) -> Finding:
    """The packages that are always needed and have no line of their own."""
    others = [asked for asked in asked_for().values() if asked.extra is None and asked.name not in SHOWN]
    wrong = [
        f"{asked.name}{asked.versions}"
        for asked in others
        if (version := installed_version(asked.name)) is None or not asked.versions.contains(version, prereleases=True)
    ]
    if wrong:
        wanted = " ".join(f"'{each}'" for each in wrong)
        return broken(f"missing or too old: {', '.join(wrong)}", f"Run `pip install --upgrade {wanted}`.", wrong=wrong)
    return ok(f"{len(others)} that are needed too are there, new enough")


@check("package-conflicts")
def package_conflicts(host: Host) -> Finding:
    """Whether the packages that we use get what they ask for themselves."""
    conflicts = [conflict for name in asked_for() for conflict in unmet(name)]
    if conflicts:
        fix = "Install what is named, or make a fresh environment and install Understudy there first."
        return warning("; ".join(conflicts), fix, conflicts=conflicts)
    return ok("the packages get what they need of each other")


def _series(version: Version) -> tuple[int, ...]:
    """Releases of one series are meant to be compatible: those of one major version, and before 1.0 of one minor."""
    return version.release[:1] if version.major else version.release[:2]
