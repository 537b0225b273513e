"""Docstrings as a documentation tool reads them (`pip install "tcsp_hf[docs]"`, `pdoc --docformat google tcsp_hf`)."""

import ast
import inspect
import re
from pathlib import Path

import tcsp_hf

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):\s*$")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def test_sections_are_indented_and_stand_apart() -> None:
    """A section whose first line opens the docstring, or that follows a text without a blank line, renders as one."""
    wrong, seen = [], 0
    for path in sorted(Path(tcsp_hf.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            lines = (ast.get_docstring(node) or "").split("\n") if isinstance(node, DOCUMENTED) else []
            for i, line in enumerate(lines):
                if SECTION.match(line):
                    seen += 1
                    if i + 1 == len(lines) or not lines[i + 1].startswith("    ") or (i and lines[i - 1].strip()):
                        wrong.append(f"{path.name}: {getattr(node, 'name', 'module')}, {line}")
    assert wrong == [] and seen > 100


def test_every_public_name_is_documented() -> None:
    for name in tcsp_hf.__all__:
        if name != "__version__":
            found = getattr(tcsp_hf, name)
            assert inspect.getdoc(found) and inspect.getdoc(found) != inspect.getdoc(type(found).__base__), name
