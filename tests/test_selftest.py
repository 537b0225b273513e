"""`tcsp selftest`, at a size of seconds: every kind of round runs, and a failure makes the command exit with 1."""

import json

import pytest
from typer.testing import CliRunner

from tcsp_hf.cli.main import app
from tcsp_hf.selftest import configs


def run(*more: object) -> tuple[int, dict]:
    sizes = {"--kills": 2, "--faults": 1, "--configs": 400, "--files": 40, "--cycles": 2, "--seed": 0}
    arguments = ["selftest", "--json", *(str(part) for pair in sizes.items() for part in pair), *map(str, more)]
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.slow
def test_every_kind_of_round() -> None:
    status, found = run()
    assert status == 0
    tried = {row["what"]: row["tried"] for row in found["results"]}
    assert len(tried) == 9 and all(tried.values())
    assert not any(row["failed"] for row in found["results"])


def test_a_failure_is_shown_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_unnamed", lambda message, fields: "made to fail")
    status, found = run("--kills", 0, "--faults", 0, "--configs", 50, "--files", 0, "--cycles", 0)
    assert status == 1
    (row,) = (row for row in found["results"] if row["failed"])
    assert row["what"] == "configurations" and "seed 0, configuration" in str(found)
