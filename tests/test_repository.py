"""What stands around the code: the workflows run what is there, templates and pages are whole."""

from __future__ import annotations

import re
import subprocess
import tomllib
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

import jddim

yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
SECTIONS = re.search(r"^sections='(.*)'$", (ROOT / ".ci" / "run").read_text(), re.M)[1].split()


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def jobs() -> list[tuple[str, dict]]:
    return [job for path in sorted((GITHUB / "workflows").glob("*.yml")) for job in read(path)["jobs"].items()]


def commands() -> list[str]:
    return [step["run"] for _, job in jobs() for step in job["steps"] if "run" in step]


def test_workflows_parse_and_run_what_is_there() -> None:
    for path in (GITHUB / "workflows").glob("*.yml"):
        workflow = read(path)
        assert workflow["permissions"] == {"contents": "read"}
        assert workflow[True]  # `on`, which YAML 1.1 takes for a boolean
    for name, job in jobs():
        assert job["timeout-minutes"] <= 60, name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])
    named = [word for command in commands() for word in command.split() if "/" in word]
    assert named
    assert all((ROOT / word).is_file() for word in named), named


def test_the_workflow_has_every_section_of_ci_run_on_every_python() -> None:
    asked = {
        section for command in commands() if ".ci/run" in command for section in command.split(".ci/run")[1].split()
    }
    assert asked == set(SECTIONS) - {"quick"}  # which is for one machine: here the suite runs on each
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = [line.split()[-1] for line in project["classifiers"] if re.search(r"Python :: 3\.\d", line)]
    (matrix,) = [job["strategy"]["matrix"]["python-version"] for _, job in jobs() if "strategy" in job]
    assert matrix == promised


def test_ci_run_knows_its_sections() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    branches = re.search(r"^for name in \$wanted.*?^done", script, re.S | re.M)[0]
    assert re.findall(r"^    (\w+)\)", branches, re.M) == SECTIONS
    done = subprocess.run(["bash", ".ci/run", "lint", "speling"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: no section speling; there are: {' '.join(SECTIONS)}\n"
    assert not done.stdout


def test_dependabot_looks_at_what_is_used() -> None:
    said = read(GITHUB / "dependabot.yml")
    assert said["version"] == 2
    assert {update["package-ecosystem"] for update in said["updates"]} == {"pip", "github-actions"}
    assert all(update["directory"] == "/" and update["schedule"]["interval"] for update in said["updates"])


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_issue_forms_are_whole(path: Path) -> None:
    form = read(path)
    if path.name == "config.yml":
        assert form.keys() <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "body", "labels", "title"}
    assert any(part.get("validations", {}).get("required") for part in form["body"])
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "checkboxes", "dropdown")
        assert part["attributes"].get("value" if part["type"] == "markdown" else "label")


def test_pages_beside_them_lead_somewhere() -> None:
    pages = sorted(GITHUB.glob("*.md"))
    assert {"SECURITY.md", "pull_request_template.md"} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text()
        assert not re.search(r"[\w.]+@[\w.]+", text), "no address that nobody reads"
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)


def test_the_dockerfile_copies_and_runs_what_is_there() -> None:
    lines = [line for line in (ROOT / "scripts" / "Dockerfile").read_text().splitlines() if line[:1] not in ("#", "")]
    assert lines[0] in [f"FROM python:{minor}-slim" for minor in ("3.11", "3.12", "3.13")]
    named = re.findall(r"(?<![\w/])scripts/[\w./]+", "\n".join(lines))
    assert {"scripts/environment.sh", "scripts/demo"} <= set(named)
    assert all((ROOT / name).is_file() for name in named)
    assert all(re.match(r"(FROM|ENV|RUN|WORKDIR|COPY|CMD) ", line) for line in lines)


def test_the_changelog_and_the_version_are_semantic() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings[0] == "[Unreleased]"
    dated = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d", heading) for heading in headings[1:]]
    assert all(dated), headings
    versions = [tuple(map(int, match.groups())) for match in dated]
    assert versions == sorted(versions, reverse=True)
    assert ".".join(map(str, versions[0])) == jddim.__version__  # as in CITATION.cff and the package: test_cite
    assert re.fullmatch(r"\d+\.\d+\.\d+", jddim.__version__)
    kinds = set(re.findall(r"^### (.*)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_deprecations_are_dated() -> None:
    page = (ROOT / "docs" / "deprecations.md").read_text()
    rows = re.findall(r"^\|(?! what|---)(.*)\|$", page, re.M)
    assert bool(rows) != bool(re.search(r"^As of \d{4}-\d\d-\d\d: nothing\.$", page, re.M))
    for row in rows:
        _, version, since, until, instead = (cell.strip() for cell in row.split("|"))
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
        assert instead
        assert date.fromisoformat(until) - date.fromisoformat(since) >= timedelta(days=90)


def test_the_support_page_has_each_family_and_what_pyproject_promises() -> None:
    page = (ROOT / "docs" / "support.md").read_text()
    families = {path.stem for path in (ROOT / "convert" / "families").glob("*.py")}
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    assert rows <= families
    for path in (ROOT / "convert" / "families").glob("*.py"):
        if 'Family(\n    name="' in path.read_text():
            assert path.stem in rows
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["classifiers"]:
        if found := re.search(r"Python :: 3\.(\d+)", line):
            assert re.search(rf"Python [^|]*3\.{found[1]}\b", page), line
    pinned = re.search(r"^torch==(.*)$", (ROOT / "scripts" / "constraints.txt").read_text(), re.M)[1]
    assert f"{pinned} in the suite" in page
    (torch,) = [line for line in project["optional-dependencies"]["convert"] if line.startswith("torch")]
    assert f"{torch.removeprefix('torch>=')} and later" in page
