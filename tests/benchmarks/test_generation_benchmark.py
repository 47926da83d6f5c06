"""The benchmark of generation, on a model of one layer, in this process."""

import json
from importlib.util import find_spec

from benchmarks import generation
from tests.strategies.export.onnx.onnx_models import build, tokenizer


def test_a_small_student_says_the_same_in_every_runtime(tmp_path, monkeypatch, capsys):
    build("llama", max_position_embeddings=128).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(generation, "measured", generation.generated)
    code = generation.main(["--model", str(tmp_path / "model"), "--bits", "4", "--tokens", "24", "--repeats", "2",
                            "--threads", "1", "--prompt", "w3 w14 w15", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {row["runtime"]: row for row in found["rows"]}
    assert code == 0 and {"transformers", "onnx", "onnx, no cache"} <= set(rows)
    assert all(row["equal"] == 24 and len(row["seconds"]) == 2 for row in rows.values())
    for name, package in (("llama.cpp", "xllamacpp"), ("onnxruntime-genai", "onnxruntime_genai")):
        assert name in rows or find_spec(package) or found["skipped"][name] == f"{package} is not installed"
    assert "| onnx, no cache |" in capsys.readouterr().out and found["settings"]["bits"] == 4
