"""Sparse students in training: zeros stay or grow, resume to the bit, and reach the file."""

import json

import pytest
import torch
from safetensors.torch import load_file

import limbeck
from strategies.pruning.unstructured.prunable_layers import prunable, weight_names
from strategies.pruning.unstructured.prune_once import one_shot
from tests.conftest import TINY, on_two_ranks
from trainer.errors import ExperimentErrors, UserError
from trainer.planning.plan import Plans
from trainer.run.metrics import read_lines
from trainer.run.model_card import _size
from trainer.student.judge_folder import _entry

GRADUAL = {"method": "magnitude", "sparsity": 0.6, "schedule": {"begin": 0.25, "end": 0.5, "every": 1}}
BROUGHT = {"data": {"tokenizer": {"train_vocabulary": None}}}
LONG = {"steps": 8, "evaluate_every": 8, "checkpoint_every": 3}


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: model.get_parameter(name).detach().clone() for name in weight_names(model, prunable(model))}


def share(weights: dict[str, torch.Tensor]) -> float:
    return sum(int((one == 0).sum()) for one in weights.values()) / sum(one.numel() for one in weights.values())


@pytest.fixture
def sparse_folder(run_experiment):
    """A student of another run, pruned once by magnitude to 2:4 and written as a plain folder."""
    def make(name: str = "before"):
        _, folder = run_experiment(name)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder.student)
        one_shot(model, None, method="magnitude", pattern="2:4")
        model.save_pretrained(folder.student)
        return folder.student
    return make


@pytest.mark.parametrize("asked", [GRADUAL, {"method": "movement", "pattern": "2:4"}], ids=str)
def test_zeros_grow_and_a_run_that_was_interrupted_ends_with_the_same_bits(train_here, asked):
    whole = train_here("whole", student={"sparsity": asked}, training=LONG, optimizer={"name": "muon"})
    train_here("cut", until=5, student={"sparsity": asked}, training=LONG, optimizer={"name": "muon"})
    again = train_here("cut", student={"sparsity": asked}, training=LONG, optimizer={"name": "muon"})
    for name, weight in weights_of(whole.unwrapped).items():
        assert torch.equal(weight, again.unwrapped.get_parameter(name)), name
    shares = [line["sparsity"] for line in read_lines(whole.folder.metrics) if "loss" in line]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == whole.sparse.weights.pattern.sparsity
    final = 0.6 if "sparsity" in asked else 0.5
    assert share(weights_of(whole.unwrapped)) == pytest.approx(final, abs=1e-3)
    assert not (whole.unwrapped.get_input_embeddings().weight == 0).any()


def test_zeros_of_a_folder_stay_in_training_and_reach_the_file(run_experiment, sparse_folder):
    before = sparse_folder()
    _, folder = run_experiment("kept", student={"architecture": None, "path": str(before), "sparsity": {
        "method": "keep"}}, optimizer={"name": "muon"}, **BROUGHT)
    then, now = (load_file(one / "model.safetensors") for one in (before, folder.student))
    names = [name for name in then if "proj" in name]
    assert len(names) == 3 * 7
    for name in names:
        assert torch.equal(then[name] == 0, now[name] == 0) and float((now[name] == 0).float().mean()) == 0.5
        assert not torch.equal(then[name], now[name])


def test_adapters_are_trained_on_a_base_that_keeps_its_zeros(train_here, sparse_folder):
    before = sparse_folder()
    loop = train_here("adapted", student={"architecture": None, "path": str(before), "sparsity": {"method": "keep"},
                                          "adapter": {"rank": 2}}, export={"adapter": "separate"}, **BROUGHT)
    then, own = load_file(before / "model.safetensors"), dict(loop.unwrapped.named_parameters())
    base = {name: weight for name, weight in own.items() if "base_layer" in name}
    assert len(base) == 3 * 7 and not loop.sparse.weights.weights
    for name, weight in base.items():
        assert torch.equal(weight, then[name.replace("base_model.model.", "").replace("base_layer.", "")])
    assert all(weight.any() for name, weight in own.items() if "lora_B" in name), "they begin at zero"


def test_a_student_is_pruned_once_trained_quantized_and_still_sparse(run_experiment):
    _, before = run_experiment("before")
    asked = {"method": "sparsegpt", "pattern": "2:4", "calibration_rows": 16}
    experiment, folder = run_experiment(
        "once", student={"architecture": None, "path": str(before.student), "sparsity": asked,
                         "quantization": {"method": "gptq", "bits": 4, "calibration_rows": 16}},
        optimizer={"name": "muon"}, **BROUGHT)
    record = json.loads((folder.cut / "prune.json").read_text())["sparsity"]
    assert record["sparsity"] == pytest.approx(0.5) and record["method"] == "sparsegpt"
    assert all(layer["error"] > 0 for layer in record["layers"].values())
    cut = load_file(folder.cut / "model.safetensors")
    checkpoint = load_file(sorted(folder.checkpoints.glob("step-*"))[-1] / "model.safetensors")
    for name in (name for name in cut if "proj" in name):
        assert torch.equal(cut[name] == 0, checkpoint[name] == 0)
        assert not torch.equal(cut[name], checkpoint[name])


def test_an_adapter_alone_is_judged_on_the_base_that_was_pruned_for_it(run_experiment):
    _, before = run_experiment("before")
    experiment, folder = run_experiment("adapted", **BROUGHT, export={"adapter": "separate"}, student={
        "architecture": None, "path": str(before.student), "adapter": {"rank": 2},
        "prune": {"mlp": 0.5, "importance": "magnitude"}, "sparsity": {"method": "magnitude", "sparsity": 0.5}})
    entry = _entry(folder, folder.path, trust=False)
    assert entry["path"] == str(folder.cut) == json.loads(
        (folder.student / "adapter_config.json").read_text())["base_model_name_or_path"]
    size = (folder.cut / "model.safetensors").stat().st_size
    card = _size(experiment.model_dump(mode="json"), json.loads(folder.receipt.read_text()), folder.student)
    assert card["bytes of its base on disk"] == size != (before.student / "model.safetensors").stat().st_size


def test_a_winning_ticket_is_the_early_step_without_the_smallest_of_the_trained(run_experiment):
    _, first = run_experiment("first", training={"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 10})
    early = first.checkpoints / "step-00000001"
    _, second = run_experiment("second", **BROUGHT, training={"steps": 0}, student={
        "architecture": None, "from_run": str(early),
        "sparsity": {"method": "lottery", "sparsity": 0.5, "trained": str(first.student)}})
    rewound, trained = load_file(early / "model.safetensors"), load_file(first.student / "model.safetensors")
    ticket = load_file(second.cut / "model.safetensors")
    for name in (name for name in ticket if "proj" in name):
        kept = ticket[name] != 0
        assert float(kept.float().mean()) == pytest.approx(0.5, abs=1e-3)
        assert torch.equal(ticket[name][kept], rewound[name][kept])
        assert trained[name][kept].abs().min() >= trained[name][~kept].abs().max()


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("ddp", marks=pytest.mark.long)])
def test_two_ranks_prune_the_same_weights_as_one(write_experiment, train_here, engine):
    asked = {"method": "movement" if engine == "fsdp2" else "magnitude", "sparsity": 0.6,
             "schedule": {"begin": 0.25, "end": 0.5, "every": 1}}
    how = {"student": {"sparsity": asked}, "training": {**LONG, "micro_batch": 4}, "optimizer": {"name": "muon"}}
    one = train_here("one", **how)
    file = write_experiment("two", **how, sharding={"engine": engine}, report={"control": False})
    done = on_two_ranks("--config", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    exported = load_file(file.parent / "two" / "student" / "model.safetensors")
    for name, weight in weights_of(one.unwrapped).items():
        assert int((exported[name] == 0).sum()) == int((weight == 0).sum()) == round(0.6 * weight.numel())
        assert float(((exported[name] == 0) == (weight == 0)).float().mean()) > 0.995, "but for rounding"


def test_the_best_evaluation_is_one_with_all_zeros(train_here):
    loop = train_here("best", student={"sparsity": {**GRADUAL, "schedule": {"begin": 0.0, "end": 0.75, "every": 1}}},
                      training={**LONG, "evaluate_every": 1, "checkpoint_every": 1, "keep_best": "bits_per_byte"},
                      optimizer={"lr": 1e-6})
    assert loop.exported >= 7 and share(weights_of(loop.unwrapped)) == pytest.approx(0.6, abs=1e-3)


def test_masks_and_scores_are_planned_and_measured(train_here, write_experiment):
    loops = {method: train_here(method, student={"sparsity": {"method": method, "sparsity": 0.5, **(
        {"schedule": {}} if method == "magnitude" else {})}}) for method in ("magnitude", "movement")}
    dense = train_here("dense")
    weights = sum(one.numel() for one in weights_of(dense.unwrapped).values())
    for method, bytes_ in (("magnitude", 1), ("movement", 5)):
        assert loops[method].plan.memory.parts["masks"] == bytes_ * weights
        assert loops[method].plan.memory.peak - dense.plan.memory.peak == bytes_ * weights
        held = [one for one in loops[method].engine.resident() if isinstance(one, torch.Tensor)]
        assert sum(one.nbytes for one in held) == bytes_ * weights


def refusal(write_experiment, **changes) -> UserError:
    with pytest.raises((UserError, ExperimentErrors)) as found:
        source = limbeck.read_experiment(write_experiment(**changes))
        from trainer.early_checks import check_early

        check_early(source.experiment, plans=Plans())
    error = found.value
    return error.errors[0] if isinstance(error, ExperimentErrors) else error


PATHLESS = {"architecture": TINY}


@pytest.mark.parametrize(("sparsity", "more", "key", "message"), [
    ({"sparsity": 0.5, "pattern": "2:4"}, {}, "pattern", "give either a sparsity"),
    ({}, {}, "sparsity", "give either a sparsity"),
    ({"sparsity": 1.0}, {}, "sparsity", "between 0 and 1"),
    ({"sparsity": 0.0}, {}, "sparsity", "between 0 and 1"),
    ({"pattern": "4:2"}, {}, "pattern", "such as 2:4"),
    ({"method": "movement", "pattern": "2:5"}, {}, "pattern", "do not divide into groups of 5"),
    ({"method": "movement", "sparsity": 0.5, "ignore": ["no_such"]}, {}, "ignore", "matches no layer"),
    ({"method": "wanda", "sparsity": 0.5, "schedule": {}}, {}, "schedule", "wanda prunes once"),
    ({"method": "keep", "sparsity": 0.5}, {}, "sparsity", "keep leaves the zeros"),
    ({"method": "keep", "schedule": {}}, {}, "schedule", "keep leaves the zeros"),
    ({"method": "movement", "sparsity": 0.5, "schedule": {"begin": 0.5, "end": 0.2}}, {}, "end", "begins at 0.5"),
    ({"method": "lottery", "sparsity": 0.5}, {}, "trained", "lottery prunes by the weights"),
    ({"method": "movement", "sparsity": 0.5, "trained": "x"}, {}, "trained", "lottery prunes by the weights"),
    ({"sparsity": 0.5}, {}, "method", "the student has random weights, and sparsegpt prunes"),
    ({"method": "keep"}, {}, "method", "the student has random weights, and keep keeps zeros"),
    ({"method": "movement", "sparsity": 0.5}, {"training": {"steps": 0}}, "steps", ""),
    ({"method": "movement", "sparsity": 0.5}, {"sharding": {"engine": "zero"}}, "engine", "ZeRO holds weights in flat"),
    ({"method": "movement", "sparsity": 0.5}, {"optimizer": {"in_backward": True}, "training": {"clip": None}},
     "in_backward", "weights are updated before the zeros"),
    ({"method": "movement", "sparsity": 0.5}, {"student": {"quantization": {"kind": "binary"}}}, "sparsity",
     "binary weights are -1 and 1"),
    ({"sparsity": 0.5}, {"student": {"architecture": None, "path": "hub/id", "adapter": {}}}, "student.sparsity",
     "an adapter that is merged fills the zeros"),
    ({"method": "movement", "sparsity": 0.5}, {"student": {"architecture": None, "path": "hub/id", "adapter": {}}},
     "method", "frozen, and none is pruned in training"),
], ids=str)
def test_nonsense_is_refused_with_a_way_out(write_experiment, sparsity, more, key, message):
    student = {**more.get("student", {}), "sparsity": sparsity}
    error = refusal(write_experiment, **{**more, "student": student})
    assert error.key.endswith(key) and message in error.problem and error.way_out


def test_what_only_weights_and_rows_tell_is_refused_before_training(run_experiment):
    _, before = run_experiment("before")
    for asked, key, message in (
            ({"method": "keep"}, "student.sparsity.method", "there is nothing to keep"),
            ({"sparsity": 0.5, "calibration_rows": 1}, "student.sparsity", "1 rows|tokens, and model.layers"),
            ({"method": "lottery", "sparsity": 0.5, "trained": "no/such"}, "student.sparsity.trained", "no/such")):
        with pytest.raises(UserError, match=message) as found:
            run_experiment("kept", student={"architecture": None, "path": str(before.student), "sparsity": asked},
                           **BROUGHT)
        assert found.value.key == key and found.value.way_out
