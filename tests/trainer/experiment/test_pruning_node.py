"""The node `student.prune`: mistakes are answered with their key and a way out, before anything runs."""

import pytest
import yaml

from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.load import read_experiment
from trainer.experiment.pruning_nodes import Prune, pruning_errors


@pytest.fixture
def experiment(tmp_path):
    """Reads an experiment whose student is pruned so."""
    def read(prune, **student):
        file = tmp_path / "e.yaml"
        file.write_text(yaml.safe_dump({
            "student": {**(student or {"path": "some/model"}), "prune": prune},
            "data": {"path": "text.txt"}, "training": {"steps": 2, "batch_size": 4, "micro_batch": 4}}))
        return read_experiment(file, []).experiment
    return read


def test_fractions_stay_fractions_and_counts_counts(experiment):
    prune = experiment({"heads": 6, "mlp": 0.5, "width": 0.75, "width_by": "rotation", "multiple_of": 16}).student.prune
    cut = prune.build()
    assert (cut.heads, cut.mlp, cut.width, cut.width_by, cut.multiple_of) == (6, 0.5, 0.75, "rotation", 16)
    assert isinstance(cut.heads, int) and isinstance(cut.mlp, float) and cut.layers is None


@pytest.mark.parametrize("prune, student, parts", [
    ({}, {}, ["student.prune", "nothing is cut", "give at least one of heads"]),
    ({"multiple_of": 8}, {}, ["student.prune", "nothing is cut"]),
    ({"mlp": 1.0}, {}, ["student.prune.mlp = 1.0", "keeps all of them, so that nothing is cut"]),
    ({"mlp": 2.5}, {}, ["student.prune.mlp = 2.5", "neither a fraction between 0 and 1 nor a count"]),
    ({"layers": 0}, {}, ["student.prune.layers = 0", "neither a fraction"]),
    ({"width": float("nan")}, {}, ["student.prune.width", "neither a fraction"]),
    ({"channels": 8}, {}, ["student.prune.channels = 8", "no fraction"]),
    ({"mlp": 0.5, "width_by": "rotation"}, {}, ["student.prune.width_by = 'rotation'", "needs a `width`"]),
    ({"mpl": 0.5}, {}, ["student.prune.mpl", "did you mean `student.prune.mlp`?"]),
    ({"mlp": 0.5}, {"architecture": {"model_type": "llama"}}, ["student.prune", "random weights", "give it a `path`"]),
])
def test_a_cut_that_is_none_is_refused(experiment, prune, student, parts):
    with pytest.raises(ExperimentErrors) as caught:
        experiment(prune, **student)
    (error,) = caught.value.errors
    said = f"{error.key} = {error.value!r}: {error.problem}; {error.way_out}" if error.has_value else \
        f"{error.key}: {error.problem}; {error.way_out}"
    assert all(part in said for part in parts), said
    assert error.way_out


def test_errors_of_a_cut_are_for_the_key_that_they_begin_with():
    prune = Prune(heads=6)
    with pytest.raises(UserError) as caught, pruning_errors(prune):
        raise ValueError("heads: 6 cannot be shared; the nearest that can: 8")
    error = caught.value
    assert (error.key, error.value, error.problem, error.way_out) == (
        "student.prune.heads", 6, "6 cannot be shared", "the nearest that can: 8")
    with pytest.raises(UserError) as caught, pruning_errors(prune):
        raise ValueError("heads of a such model cannot be cut")
    assert (caught.value.key, caught.value.value) == ("student.prune", {"heads": 6})
