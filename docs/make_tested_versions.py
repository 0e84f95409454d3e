"""Writes the versions that `understudy doctor` compares with from constraints.txt, so that they cannot drift.

python docs/make_tested_versions.py            # rewrites the file in the package
python docs/make_tested_versions.py --check    # exit status 1 when it is not up to date
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PACKAGED = ROOT / "src" / "understudy" / "diagnosis" / "tested_versions.json"


def tested_versions(constraints: str) -> str:
    """JSON text: the version that each package is pinned to, by the package's normalised name (PEP 503)."""
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", constraints, re.MULTILINE)
    versions = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}
    return json.dumps(dict(sorted(versions.items())), indent=1) + "\n"


def main() -> None:
    made = tested_versions(CONSTRAINTS.read_text(encoding="utf-8"))
    if sys.argv[1:] == ["--check"]:
        if PACKAGED.read_text(encoding="utf-8") != made:
            sys.exit(f"error: {PACKAGED} is not up to date; run `python docs/make_tested_versions.py`.")
    else:
        PACKAGED.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
