"""What the documents promise: links lead somewhere, the README's tree and named tests exist, dependencies are explained."""

import ast
import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

import trfpp

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")

ROOT = Path(trfpp.__file__).parent
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="an installed package has no documents")
FOLDERS = ("trf", "data_prep", "train", "infer", "study")
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(path for folder in ("bench", "docs", "tests", "trf") for path in ROOT.glob(f"{folder}/**/*.md")),
]
FENCED = re.compile(r"^( *)```.*?^\1```", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"""\]\(<?([^)>\s]+)|^\[[^]]+\]:\s*(\S+)|\b(?:href|src)="([^"]+)\"""", flags=re.MULTILINE)


def anchors(document):
    """Of the headings, by GitHub's rule: small letters, no punctuation, hyphens for spaces; a number after the first."""
    seen, text = {}, FENCED.sub("", document.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#{1,6} +(.*?)[ #]*$", text, flags=re.MULTILINE):
        words = re.sub(r"\]\([^)]*\)", "", heading)  # of a link its words only
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        number = seen[anchor] = seen.get(anchor, -1) + 1
        yield f"{anchor}-{number}" if number else anchor


def broken(document):
    """The links within the repository that lead nowhere."""
    text = re.sub(r"`[^`]*`", "", FENCED.sub("", document.read_text(encoding="utf-8")))
    for link in ("".join(groups) for groups in LINK.findall(text)):
        file, _, anchor = unquote(link).partition("#")
        target = document.parent / file if file else document
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    assert not list(broken(document))


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# Twice\n## Twice\n```\n# no heading\n```\n")
    (tmp_path / "some.md").write_text(
        "# Of `trf++`: a [name](other.md) or two #\n"
        "[1](other.md#twice-1) [2](#of-trf-a-name-or-two) [`3`](other.md) [4](https://example.org/none#none) ![5](.)\n"
        "[6](none.md) [7](#none) ![8](none.png 'title') [9](other.md#twice-2) [`10`](other.md#no-heading)\n"
        'and `[a](code)`, [11], <a href="none.html">12</a>\n\n[11]: none.txt\n```\n[b](code)\n```\n'
    )
    nowhere = ["none.md", "#none", "none.png", "other.md#twice-2", "other.md#no-heading", "none.html", "none.txt"]
    assert list(broken(tmp_path / "some.md")) == nowhere


def test_what_came_out_of_the_study_is_what_its_report_says():
    came_out = (ROOT / "docs" / "study.md").read_text(encoding="utf-8").split("\n## Method")[0]
    report = (ROOT / "docs" / "study" / "report.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in came_out.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert [row for row in rows if row not in report] == []


@pytest.mark.parametrize("document", ["docs/miniature.md", "trf/miniature_svd/README.md"])
def test_what_is_told_of_the_miniature_was_measured(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    told = json.loads((ROOT / "docs" / "figures" / "miniature" / "appraisal.json").read_text(encoding="utf-8"))
    head, _, *rows = text[text.index("| | base | linear |") :].split("\n\n")[0].splitlines()
    worlds = [cell.strip() for cell in head.split("|")[2:-1]]
    for row, which in zip(rows, ("mean", "worst")):
        values = [float(cell) for cell in row.split("|")[2:-1]]
        assert values == [round(told["autoencoder_psnr"][world][which], 1) for world in worlds]
    assert f"{told['things']['kept']:.0%}".replace("%", " %") in text
    assert f"{told['things_beyond']['kept']:.0%}".replace("%", " %") in text


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
