"""What a checkpoint and the package may do: parsed from their sources, so that nothing unforeseen slips in."""

import ast
from pathlib import Path

import pytest

import tcsp_hf

PACKAGE = Path(tcsp_hf.__file__).parent
REMOTE = sorted([*PACKAGE.glob("configuration_*.py"), *PACKAGE.glob("modeling_*.py")])
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALLOWED = {"torch", "transformers", "collections", "copy", "difflib", "inspect", "math", "os", "types", "typing"}
OF_OS = {"PathLike", "path"}
FORBIDDEN_CALLS = {"open", "exec", "eval", "compile", "__import__", "input", "breakpoint"}
FORBIDDEN_METHODS = {"write_text", "write_bytes", "read_text", "read_bytes", "unlink", "system", "load", "hub"}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of what is imported; relative ones as `.name`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(f".{node.module}" if node.level else str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("path", REMOTE, ids=lambda path: path.name)
def test_code_beside_a_checkpoint_touches_nothing(path: Path) -> None:
    """It imports torch, transformers, its neighbours and harmless standard modules; no file, no network, no process."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = imports(tree)
    assert {name for name in found if name.startswith(".")} <= {f".{other.stem}" for other in REMOTE}
    assert {name for name in found if not name.startswith(".")} <= ALLOWED
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr in OF_OS, (path.name, node.lineno)
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            forbidden = FORBIDDEN_CALLS if isinstance(node.func, ast.Name) else FORBIDDEN_METHODS
            assert name not in forbidden, (path.name, node.lineno)


def test_there_is_code_to_look_at() -> None:
    assert len(REMOTE) == 6 or len(REMOTE) == 5
    assert len(SOURCES) > 80


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_unpickled_and_no_foreign_code_runs(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not imports(tree) & UNPICKLERS
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        named = {word.arg: word.value for word in node.keywords}
        trusted = named.get("trust_remote_code")
        assert not (isinstance(trusted, ast.Constant) and trusted.value), f"line {node.lineno} trusts remote code"
        pickled = named.get("allow_pickle")
        assert not (isinstance(pickled, ast.Constant) and pickled.value), f"line {node.lineno} allows pickles"
        of_torch = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
        if of_torch and node.func.value.id == "torch" and node.func.attr == "load":
            safe = named.get("weights_only")
            assert isinstance(safe, ast.Constant) and safe.value is True, f"line {node.lineno} unpickles"
        if isinstance(node.func, ast.Name):
            assert node.func.id not in {"exec", "eval", "__import__"}, f"line {node.lineno} runs text"
