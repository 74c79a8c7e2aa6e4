"""What a newcomer meets first says what is true: README, docs, workflows."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# CHANGELOG.md tells of what was
PRESENT = [page for page in PAGES if page.name != "CHANGELOG.md"]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def known_settings() -> set[str]:
    from c4c.config import Config, to_dict

    return {f"{group}.{key}" for group, keys in to_dict(Config()).items() for key in keys}


# docs/architecture.md names attributes of objects
@pytest.mark.parametrize("page", [page for page in PRESENT if page.stem != "architecture"], ids=named)
def test_settings_exist(page):
    groups = "run|data|cache|clips|model|train|engine|checkpoint"
    named_in_page = re.findall(rf"(?<=[\s`[])(?:{groups})\.[a-z]\w*(?=[=`])", page.read_text())
    assert set(named_in_page) - {"data.key"} <= known_settings()


@pytest.mark.parametrize("page", PRESENT, ids=named)
def test_files_and_make_targets_exist(page):
    text = page.read_text()
    for name in re.findall(r"(?<![\w/.-])((?:launch|c4c|pipelines|shards|tests|bench|examples)/[\w/.-]*\w)", text):
        assert "NAME" in name or (ROOT / name).exists(), name
    for target in re.findall(r"(?:^    |`)make ([a-z][\w-]*)", text, re.MULTILINE):
        assert target in make_targets(), target


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert set(re.findall(r"[\w-]+\.md", str(nav))) == {page.name for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=named)
def test_workflows_run_make(workflow):
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    for job in jobs:
        targets = job.get("strategy", {}).get("matrix", {}).get("target", [])
        for step in job["steps"]:
            if command := step.get("run"):
                wanted = targets if "matrix.target" in command else [command.removeprefix("make ")]
                assert wanted and set(wanted) <= make_targets(), command
            else:
                assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]), step["uses"]
