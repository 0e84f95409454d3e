"""One check in a process of its own: `python -m understudy.diagnosis.child NAME REPORT PARENT ROOT PROCESSES`.

It writes what it found to REPORT, as JSON, and ends when PARENT does.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from understudy.diagnosis.check import Host
from understudy.diagnosis.registry import checks_named
from understudy.diagnosis.runner import find_safely
from understudy.launch.parent import die_with_parent

__all__ = ["main"]


def main(name: str, report: str, parent: str, root: str, processes: str) -> None:
    die_with_parent(int(parent))
    [check] = checks_named([name])
    finding = find_safely(check, Host(Path(root), int(processes) if processes else None))
    partial = Path(report).with_suffix(".partial")
    partial.write_text(json.dumps(asdict(finding)), encoding="utf-8")
    partial.replace(report)


if __name__ == "__main__":
    main(*sys.argv[1:])
