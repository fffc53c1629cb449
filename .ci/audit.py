"""Says what a report of pip-audit means: `make audit`, or python .ci/audit.py REPORT.json.

A package that no advisories could be had for was not audited, which is not the same as having none.
Exit status: 0 if every package was audited and none has a known vulnerability, 1 if one has, 2 if some or all were not
audited.
"""

import json
import sys
from pathlib import Path


def main(report: str) -> int:
    """Read a report, write a summary to standard output, return the exit status."""
    try:
        packages = json.loads(Path(report).read_text())["dependencies"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.stdout.write(f"NOT AUDITED: pip-audit left no report in {report} ({error!r})\n")
        return 2
    skipped = [package for package in packages if "skip_reason" in package]
    vulnerable = [package for package in packages if package.get("vulns")]
    for package in vulnerable:
        for found in package["vulns"]:
            fixed = ", ".join(found.get("fix_versions", ())) or "no release yet"
            sys.stdout.write(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}\n")
    for package in skipped:
        sys.stdout.write(f"NOT AUDITED {package['name']}: {package['skip_reason']}\n")
    count = len(packages) - len(skipped)
    what = f"{count} of {len(packages)} packages audited, {len(vulnerable)} of them vulnerable"
    sys.stdout.write(f"{what}, {len(skipped)} not audited\n")
    return 1 if vulnerable else 2 if skipped or not packages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
