"""docs/operations.md is up to date, and what it says was measured is within what the rules promise."""

import importlib.util
from pathlib import Path

import pytest

import adfify

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "operations.py"


@pytest.fixture(scope="module")
def operations():
    spec = importlib.util.spec_from_file_location("operations", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_registry_says(operations):
    assert operations.PAGE.read_text(encoding="utf-8") == operations.page(adfify.supported(), operations.recorded()), (
        "stale: run python benchmarks/operations.py"
    )


def test_what_is_approximate_was_measured_and_keeps_its_tolerance(operations):
    measured = operations.recorded()
    rules = operations.approximate(adfify.supported())
    assert set(measured) == {rule.name for rule in rules}
    for rule in rules:
        assert max(measured[rule.name]) <= rule.tolerance + operations.NOISE["composed" in rule.source], rule.name


def test_the_census_page_is_of_its_results():
    spec = importlib.util.spec_from_file_location("coverage", SCRIPT.with_name("coverage.py"))
    coverage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(coverage)
    census = [line.split()[0] for line in coverage.CENSUS.read_text(encoding="utf-8").splitlines()]
    found = coverage.examined()
    assert list(found) == census
    assert len(census) == 122
    assert all(coverage.meets(record) for record in found.values())
    assert coverage.RESULTS.with_suffix(".md").read_text(encoding="utf-8") == coverage.table(list(found.values()))
