"""What the project's .venv holds. For scripts/environment.sh: standard library only, run by .venv's Python.

    python -I environment_state.py check ROOT EXTRA
        exit 0: complete, nothing to install
        exit 3: something is to be installed; prints the extras, those asked for before included
        exit 4: cannot be used; prints why
    python -I environment_state.py write ROOT EXTRAS
        records what has been installed

The state is out of date when pyproject.toml or the constraints change, when the checkout is moved (an
editable install remembers where it was), or when .venv gets another Python. Distributions are looked up as
well, so that one removed by hand is put back.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

STATE = "jddim-state.json"


def installed_by(project: dict[str, Any], extras: list[str]) -> tuple[list[str], list[str]]:
    """Returns the extras with those they contain (`test = ["jddim[convert]", ...]`), and the requirements."""
    optional = project.get("optional-dependencies", {})
    todo, found, requirements = list(extras), [], list(project.get("dependencies", []))
    while todo:
        extra = todo.pop(0)
        if extra in found:
            continue
        found.append(extra)
        for requirement in optional.get(extra, []):
            if itself := re.match(rf"{re.escape(project['name'])}\s*\[([^]]*)\]", requirement):
                todo += [name.strip() for name in itself[1].split(",")]
            else:
                requirements.append(requirement)
    return found, requirements


def key(root: Path) -> str:
    """What the installed packages depend on, as a hash."""
    digest = hashlib.sha256()
    for part in (
        str(root).encode(),
        "{}.{}".format(*sys.version_info).encode(),
        (root / "pyproject.toml").read_bytes(),
        (root / "scripts" / "constraints.txt").read_bytes(),
    ):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def missing(requirements: list[str]) -> bool:
    """Whether a requirement's distribution, or a package of it, is not there. Conditional ones are not looked at."""
    for requirement in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name and ";" not in requirement:
            try:
                distribution = importlib.metadata.distribution(name[0])
            except importlib.metadata.PackageNotFoundError:
                return True
            packages = re.findall(r"^([\w.-]+/__init__\.py),", distribution.read_text("RECORD") or "", re.MULTILINE)
            if not all(Path(str(distribution.locate_file(package))).is_file() for package in packages):
                return True  # its metadata is there, its code is not
    return False


def check(root: Path, extra: str) -> int:
    venv = root / ".venv"
    if sys.prefix == sys.base_prefix or not os.path.samefile(sys.prefix, venv):
        print("it is not a virtual environment")
        return 4
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    try:
        state = json.loads((venv / STATE).read_text(encoding="utf-8"))
        before, unchanged = [str(name) for name in state["extras"]], state["key"] == key(root)
    except FileNotFoundError:  # an environment that the user made: installed into, not replaced
        before, unchanged = [], False
    except (ValueError, KeyError, TypeError):
        print(f"{STATE} in it cannot be read")
        return 4
    before = [name for name in before if name in project.get("optional-dependencies", {})]
    _, requirements = installed_by(project, before)
    if unchanged and extra in before and not missing([project["name"], *requirements]):
        return 0
    # Only what the rest does not contain: "test", not "test,convert".
    extras = list(dict.fromkeys([*before, extra]))
    print(",".join(e for e in extras if not any(e in installed_by(project, [o])[0] for o in extras if o != e)))
    return 3


def write(root: Path, extras: list[str]) -> int:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    state = {"key": key(root), "extras": installed_by(project, extras)[0], "python": sys.version}
    path = root / ".venv" / STATE
    part = path.with_suffix(".part")
    part.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
    return 0


if __name__ == "__main__":
    command, root_argument, names = sys.argv[1:]
    if command == "check":
        sys.exit(check(Path(root_argument), names))
    sys.exit(write(Path(root_argument), names.split(",")))
