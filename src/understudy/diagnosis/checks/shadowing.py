"""Files of the working directory that Python would take for packages."""

from __future__ import annotations

import sys
from pathlib import Path

from understudy.diagnosis.check import Finding, Host, check, ok, warning
from understudy.diagnosis.installed import asked_for


@check("shadowed-modules")
def shadowed_modules(host: Host) -> Finding:
    """Processes of a run are started with `python -m`, which looks for modules in the working directory first."""
    names = {name.replace("-", "_") for name in asked_for()} | set(sys.stdlib_module_names) | {"yaml"}
    here = Path.cwd()
    wrong = sorted(
        path.name
        for path in here.iterdir()
        if (path.suffix == ".py" and path.stem in names) or (path.name in names and (path / "__init__.py").is_file())
    )
    if wrong:
        return warning(
            f"{', '.join(wrong)} in {here} will be imported in place of what has that name",
            "Rename what is named, or run from another directory.",
            files=wrong,
        )
    return ok("nothing here stands in for a package")
