"""The public face as a script of one's own uses it: mypy checks this file, and here it runs."""

from __future__ import annotations

import ast
from typing import assert_type

import torch

import limbeck
from limbeck import Divergence, Lamb, ResponseObjective, WeightQuantizer, parameter_groups, prepare_qat
from tests.conftest import ROOT


def test_a_quantized_student_learns_from_logits_in_a_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 8))
    names = prepare_qat(model, WeightQuantizer(bits=4, group_size=16), ignore=())
    assert_type(names, list[str])
    optimizer: torch.optim.Optimizer = Lamb(parameter_groups(model, weight_decay=0.1), lr=1e-2)
    objective = ResponseObjective(cross_entropy=0.3, divergences=(Divergence(name="forward_kl", weight=0.7),))
    inputs, teacher, targets = torch.randn(2, 3, 32), torch.randn(2, 3, 8), torch.randint(0, 8, (2, 3))
    losses = []
    for _ in range(8):
        loss, terms = objective(model(inputs), teacher, targets)
        assert_type(loss, torch.Tensor)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert names == ["0", "1"] and losses[-1] < losses[0] and terms["forward_kl"] > 0


def test_an_experiment_is_read_in_a_script() -> None:
    source = limbeck.read_experiment(ROOT / "configs" / "quickstart.yaml", ["optimizer.lr=1e-4"])
    assert_type(source.experiment, limbeck.Experiment)
    assert_type(source.experiment.optimizer.lr, float)
    assert source.experiment.optimizer.lr == 1e-4


def test_what_type_checkers_see_is_what_is_imported() -> None:
    tree = ast.parse((ROOT / "limbeck" / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname or alias.name: (node.module, alias.name) for node in guarded.body
            if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == limbeck._PUBLIC
