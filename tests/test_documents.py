"""What the documents promise: every file in the README's tree exists, every named test does, every dependency is explained."""

import ast
import re
from pathlib import Path

import pytest

import trfpp

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")

ROOT = Path(trfpp.__file__).parent
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="an installed package has no documents")
FOLDERS = ("trf", "data_prep", "train", "infer")


def test_the_readmes_tree_is_the_tree():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    named, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0] if line.split() else ""
        if not line.startswith(" ") and name.endswith("/"):
            folder = name
        elif line.startswith("  ") and name.endswith(".py"):
            named.add(folder + name)
    real = {f"{folder}/{path.name}" for folder in FOLDERS for path in (ROOT / folder).glob("[!_]*.py")}
    assert named == real


def test_the_table_of_defects_names_real_tests():
    text = (ROOT / "docs" / "defects.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) == 15
    for row in rows:
        tests = re.findall(r"`(tests/[\w/.]+|…)(?:::(\w+))?`", row)
        assert tests, row
        file = ""
        for path, name in tests:
            file = file if path == "…" else path
            assert (ROOT / file).exists(), row
            if name:
                functions = [n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(n, "name")]
                assert name in functions, row


def test_every_dependency_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    explained = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    for requirement in project["dependencies"]:
        name = re.match(r"[\w-]+", requirement)[0]
        assert re.search(rf"^\|.*\b{name}\b.*\|", explained, flags=re.MULTILINE), name


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for requirement in project["dependencies"]:
        assert re.match(r"[\w-]+", requirement)[0].lower() in pinned, requirement
