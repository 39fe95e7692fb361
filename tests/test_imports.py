"""Imports go one way, analysis -> train -> extract; lazy imports inside functions count too."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = {"extract": 0, "train": 1, "analysis": 2, "demo": 3}
ANALYSIS_ORDER = ("firings", "examples", "latents", "llm", "annotate", "taxonomy", "compare", "scoring", "report")
ABOVE_THE_PARTS = ("agreement", "discover", "expenses", "steps", "sweep", "sweep_rows", "tracking")


def imported_packages(source: str) -> set[str]:
    """Top-level names that a module imports, anywhere in it, literal importlib calls included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {str(a.value).split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return found


@pytest.mark.parametrize("package", ORDER)
def test_no_package_imports_one_above_it(package: str):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} has no modules"
    for file in files:
        above = [name for name in imported_packages(file.read_text()) if ORDER.get(name, -1) > ORDER[package]]
        assert not above, f"{file.relative_to(ROOT)} imports {above}"


def test_the_check_sees_every_form_of_import():
    source = (
        "def f():\n import train.data\n from analysis import x\n import importlib\n importlib.import_module('demo.y')"
    )
    assert {"train", "analysis", "demo"} <= imported_packages(source)


@pytest.mark.parametrize("part", ANALYSIS_ORDER)
def test_no_part_of_the_analysis_imports_a_later_one(part: str):
    """Nor the commands, the dashboard and the table of steps, which stand above them all."""
    later = {*ANALYSIS_ORDER[ANALYSIS_ORDER.index(part) + 1 :], "dashboard", *ABOVE_THE_PARTS}
    files = sorted((ROOT / "analysis" / part).glob("*.py"))
    assert len(files) > 1, f"analysis/{part} has no modules"
    for file in files:
        imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
        parts = {name.split(".")[1] for name in names if name.startswith("analysis.")}
        assert not parts & later, f"{file.relative_to(ROOT)} imports {parts & later}"


def test_every_module_is_on_the_map():
    """ARCHITECTURE.md names every module, and only modules that exist."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    parts = [f"analysis/{part}" for part in (*ANALYSIS_ORDER, "dashboard")]
    for package in ("extract", "train", "analysis", *parts):
        section = text.split(f"### {package}\n")[1].split("\n### ")[0].split("\n## ")[0]
        rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
        named = {name.strip().strip("`") for row in rows for name in row.split(",")}
        there = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__", "__main__"}
        assert named == there, f"{package}: only on the map {named - there}, not on the map {there - named}"


def test_the_readme_says_where_things_are():
    """Its table names every folder of the top level, and nothing that does not exist."""
    table = (ROOT / "README.md").read_text().split("## Where things are")[1].split("\n## ")[0]
    named = {line.split("`")[1].rstrip("/") for line in table.splitlines() if line.startswith("| `")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {path.split("/")[0] for path in tracked if "/" in path and not path.startswith(".")}
    assert folders <= named and all((ROOT / name).exists() for name in named)
