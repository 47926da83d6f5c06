"""What a project has beside its code says what is so."""

import re
import sys
import tomllib
import types

import pytest
import torch
import yaml

from strategies import optimizers
from tests.conftest import ROOT
from trainer import __version__

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)


@pytest.fixture
def lion(tmp_path, monkeypatch):
    """The strategy of CONTRIBUTING.md, where it would be."""
    (tmp_path / "lion.py").write_text(EXAMPLES[0])
    monkeypatch.setattr(optimizers, "__path__", [*optimizers.__path__, str(tmp_path)])
    yield
    sys.modules.pop("strategies.optimizers.lion", None)


def test_the_strategy_that_contributing_adds_passes_its_test(lion):
    strategy, _, test = EXAMPLES
    assert 30 <= len(strategy.splitlines()) <= 50
    scope: dict = {}
    exec(compile(test, "test_lion.py", "exec"), scope)
    for name in [name for name in scope if name.startswith("test_")]:
        scope[name]()


def test_the_strategy_that_contributing_adds_is_built_by_its_name(lion):
    source = (ROOT / "strategies" / "optimizers" / "by_name.py").read_text()
    *body, error = source.rstrip().split("\n")
    assert "there is no optimizer" in error
    by_name = types.ModuleType("by_name_with_lion")
    exec(compile("\n".join([*body, EXAMPLES[1].rstrip(), error]), "by_name.py", "exec"), by_name.__dict__)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = by_name.build(model, "lion", lr=1e-3, betas=(0.9, 0.99), eps=None, weight_decay=0.1)
    before = [weight.detach().clone() for weight in model.parameters()]
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    assert type(optimizer).__name__ == "Lion"
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert '"lamb", "adafactor"' in (ROOT / "trainer" / "experiment" / "nodes.py").read_text()


def test_license_version_and_citation_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    license = (ROOT / "LICENSE").read_text()
    assert "Apache License" in license and "Copyright 2026 Limbeck contributors" in license
    assert citation["cff-version"] == "1.2.0" and citation["license"] == project["license"] == "Apache-2.0"
    assert citation["version"] == __version__ and {"message", "title", "authors"} <= set(citation)
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"What will be {__version__}" in changes or f"## [{__version__}]" in changes
    kinds = set(re.findall(r"^### (\w+)$", changes, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_contributing_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)", text)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in set(re.findall(r"`((?:[\w.]+/)+[\w.]*)`", text)) - {
            "strategies/optimizers/lion.py", "tests/strategies/optimizers/test_lion.py"}:
        assert (ROOT / path).exists(), path
