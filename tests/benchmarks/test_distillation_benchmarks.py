"""The benchmarks of distillation run from end to end on small models, and write the rows they promise."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import limbeck
from benchmarks.distillation import cached, peers_quality, students
from strategies.distillation.losses.response import Divergence, ResponseObjective
from trainer.run.metrics import read_lines


@pytest.fixture
def questions(tmp_path):
    """A folder with sums to do, under the names and in the fields that the benchmark reads."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part, numbers in (("train", range(40)), ("test", range(40, 50))):
        lines = [{"question": f"What is {number} and {number % 7}?", "answer": f"It is {number + number % 7}."}
                 for number in numbers]
        (folder / f"gsm8k_{part}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


SMALL = ["--seeds", "1", "--teacher-steps", "2", "--steps", "2", "--documents", "20", "--vocabulary", "280",
         "--length", "48", "--batch", "2", "--held-out", "4"]


def test_students_of_a_small_teacher(questions, tmp_path, capsys):
    file = tmp_path / "students.json"

    asked = [str(questions), *SMALL, "--taught", "features", "samples", "--json", str(file), "--folder", str(tmp_path)]

    assert students.main(asked) == 0

    assert str(questions) not in file.read_text(), "where the data is belongs to a machine"
    found = json.loads(file.read_text())
    assert [row["student"] for row in found["rows"]] == ["teacher", "no teacher", "equal compute", "features",
                                                         "samples"]
    for row in found["rows"]:
        assert 0 < row["bits_per_byte"] < 12 and row["seconds_per_step"] > 0
        assert row["cross_entropy"] < 2 * math.log(280)
    size = {row["student"]: row["bytes_on_disk"] for row in found["rows"]}
    assert size["samples"] == size["features"] == size["no teacher"] < size["teacher"]
    bits = {row["student"]: row["bits_per_byte"] for row in found["rows"]}
    assert len(set(bits.values())) == 5, "each learns something else"
    for student in ("features", "samples"):
        assert found["summary"][student]["saved"]["mean"] == pytest.approx(bits["no teacher"] - bits[student])
    assert students.table(found) in capsys.readouterr().out
    assert read_lines(tmp_path / "features-0" / "metrics.jsonl")[0]["features"] > 0
    assert students.main(asked) == 0, "what is finished is not trained again"
    again = json.loads(file.read_text())["rows"]
    assert [row["bits_per_byte"] for row in again] == list(bits.values())


def test_every_student_is_an_experiment(questions, tmp_path):
    chosen = students.parser().parse_args([str(questions), *SMALL])
    asked = {}
    for student in (students.CONTROL, *students.TAUGHT):
        file = tmp_path / "student.yaml"
        file.write_text(yaml.safe_dump(students.experiment(student, 3, chosen, tmp_path)))
        asked[student] = limbeck.read_experiment(file).experiment

    control = asked.pop(students.CONTROL)
    assert control.teacher is None and control.objective.cross_entropy == 1
    for experiment in asked.values():
        assert (experiment.seed, experiment.data, experiment.student, experiment.training) == (
            3, control.data, control.student, control.training), "the same student on the same tokens"
        assert experiment.objective.cross_entropy + experiment.objective.divergence.weight == 1
    sources = [experiment.teacher.targets.source for experiment in asked.values()]
    assert sources == [*["live"] * 8, "hidden", "samples", "top_k"]
    assert [name for name, experiment in asked.items() if experiment.objective.features is not None] == [
        "features", "kl_features_start", "jsd_features_start"]


def test_steps_of_equal_compute(questions, tmp_path):
    """Against operations counted by torch: 2 for each multiplication, of forward and backward."""
    chosen = students.parser().parse_args([str(questions), *SMALL, "--size", "tiny", "--vocabulary", "1024"])
    torch.manual_seed(0)
    teacher, student = (AutoModelForCausalLM.from_config(AutoConfig.for_model(
        **shape, vocab_size=1024, attn_implementation="eager")) for shape in students.SIZES["tiny"][:2])
    ids = torch.zeros(1, 8, dtype=torch.long)
    with FlopCounterMode(display=False) as own:
        student(input_ids=ids, labels=ids).loss.backward()
    with FlopCounterMode(display=False) as more, torch.no_grad():
        teacher(input_ids=ids)
    ratio = 1 + more.get_total_flops() / own.get_total_flops()
    assert students.compute_ratio(chosen) == pytest.approx(ratio, rel=0.1)
    asked = students.experiment(students.LONGER, 0, chosen, tmp_path)
    assert asked["training"]["steps"] == round(2 * students.compute_ratio(chosen)) and "teacher" not in asked


def test_losses_of_peers_are_what_their_names_say(monkeypatch):
    """Against our own, which have tests of their own; top-k over all tokens is KL, and over fewer leaves some out."""
    student, teacher = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(7)
    ours = ResponseObjective(0.5, (Divergence("forward_kl", 0.5, 2.0),))(student, teacher, targets)[0] / 7
    assert float(peers_quality.hf_kl(student, teacher, targets)) == pytest.approx(float(ours), rel=1e-5)
    monkeypatch.setattr(peers_quality, "TOP", 20)
    assert float(peers_quality.distillkit_top_k(student, teacher, targets)) == pytest.approx(float(ours), rel=1e-5)
    monkeypatch.setattr(peers_quality, "TOP", 3)
    assert float(peers_quality.distillkit_top_k(student, teacher, targets)) != pytest.approx(float(ours), rel=1e-3)


def test_peers_are_compared_with_our_best_of_the_same_seed():
    rows = [{"seed": seed, "method": method, "cross_entropy": loss + seed} for seed in (0, 1)
            for method, loss in (("forward_kl", 3.0), ("jsd", 3.5), ("hf_kl", 3.25))]
    said = peers_quality.table({"rows": rows})
    assert "| HF Trainer, KL by hand | 3.7500 (0.7071) | +0.2500 (0.0000) |" in said
    assert "| Limbeck, forward KL | 3.5000 (0.7071) | +0.0000 (0.0000) |" in said


def test_summary_compares_each_seed_with_its_own_control():
    def row(student: str, seed: int, bits: float) -> dict:
        return {"student": student, "seed": seed, "bits_per_byte": bits, "cross_entropy": 2 * bits,
                "bytes_on_disk": 100 if student == "teacher" else 20, "seconds_per_step": 0.5}

    rows = [row("teacher", 0, 0.9), row("no teacher", 0, 1.0), row("jsd", 0, 0.9), row("no teacher", 1, 2.0),
            row("jsd", 1, 2.3)]
    found = students.summary(rows)
    assert found["jsd"]["saved"] == {"mean": pytest.approx(-0.1), "sd": pytest.approx(0.08**0.5)}
    assert found["no teacher"]["cross_entropy"] == {"mean": pytest.approx(3), "sd": pytest.approx(2**0.5)}
    said = students.table({"rows": rows, "summary": found, "settings": {"seeds": 2, "steps": 7}})
    assert "| JSD as it is | 1.6000 (0.9899) | 3.2000 (1.9799) | -0.1000 (0.2828) |" in said
    assert "2 seeds; 7 steps of a student that is 5.0 times smaller" in said


def test_cached_targets_of_a_small_teacher(tmp_path, capsys):
    file = tmp_path / "cached.json"

    assert cached.main(["--vocabularies", "300", "500", "--width", "32", "--rows", "8", "--length", "16", "--rounds",
                        "2", "--positions", "16", "--repeats", "36", "--json", str(file)]) == 0

    found = json.loads(file.read_text())
    kinds = [("hidden", "bfloat16"), ("hidden", "float32"), ("samples", "float32"), ("top_k", "float32")]
    assert [(row["kind"], row["dtype"]) for row in found["rows"]] == 2 * kinds
    for row in found["rows"]:
        assert row["bytes_stated"] <= row["bytes_on_disk"] < row["bytes_stated"] + 12, "headers and the manifest"
        assert row["written_per_second"] > 0 and row["read_per_second"] > 0
    half, whole, samples, top = found["rows"][:4]
    assert whole["bytes_at_most"] == 2 * half["bytes_at_most"] == 4 * 32
    assert 1 < samples["distinct"] < 50 and samples["bytes_stated"] < samples["bytes_at_most"]
    assert whole["far"]["one"] < 1e-5 < half["far"]["one"] < 1e-2
    for distance in ("far", "near"):
        assert samples[distance]["mean"] < 1.5 * samples[distance]["unbiased"], "draws have no bias"
        assert top[distance]["mean"] == pytest.approx(top[distance]["one"]) and top[distance]["one"] > 1e-4
    assert cached.table(found) in capsys.readouterr().out


def test_errors_of_gradients_are_those_of_the_definition():
    torch.manual_seed(0)
    teacher = cached.random_teacher(8, 16, 100)
    student = cached.student_far(teacher)
    identity = cached.Identity("top_k", rows=1, sequence_length=8, teacher="", tokenizer="", data="", vocabulary=100,
                               k=cached.K, temperature=1.0)
    p, q = ((logits.double()).softmax(-1) for logits in (teacher.hidden @ teacher.head.T, student))
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.topk(cached.K).indices, True)
    # Tokens that are not kept are one event of K + 1: of its mass each is given the share that the student gives it.
    rest_p, rest_q = ((one * ~kept).sum(-1, keepdim=True) for one in (p, q))
    wrong = torch.where(kept, p, rest_p * q / rest_q) - p

    found = cached.gradient_errors(identity, teacher, {"far": student}, repeats=5)["far"]

    assert found["one"] == pytest.approx(float(wrong.norm() / (q - p).norm()), rel=1e-3)
    assert found["mean"] == pytest.approx(found["one"]) == found["unbiased"]
