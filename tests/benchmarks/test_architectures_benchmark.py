"""The types that people use most, through the benchmark of architectures: each check is right, or refused as it should.

Its own comparisons are against transformers alone, in float64 sums; here is said which checks are refused, and why.
"""

import json

import pytest

from tests.conftest import forked

CHECKS = ("causal", "loss", "packing", "memory", "layers", "quantized", "gguf")
GGUF = {"gguf": "not written for llama.cpp"}
REFUSED = {
    "llama": {}, "mistral": {"gguf": "attends to everything"}, "gemma3_text": GGUF, "gpt2": GGUF,
    "opt": {**GGUF, "packing": "would see each other"}, "qwen3_moe": GGUF, "qwen2": {}, "qwen3": {}, "phi3": GGUF,
    "mixtral": GGUF, "gpt_neox": GGUF, "deepseek_v3": GGUF,
}


def _main(*arguments: str) -> int:
    from benchmarks.architectures.__main__ import main

    return main(list(arguments))


@pytest.mark.timeout(600)
def test_types_that_people_use_most(tmp_path):
    file = tmp_path / "rows.json"
    done = forked(_main, ("--types", ",".join(REFUSED), "--checks", ",".join(CHECKS), "--json", str(file)), timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["type"]: row["checks"] for row in json.loads(file.read_text())["rows"]}
    assert set(rows) == set(REFUSED) and all(set(row) == set(CHECKS) for row in rows.values())
    for kind, row in rows.items():
        for check, found in row.items():
            said = REFUSED[kind].get(check)
            assert found["verdict"] == ("refused" if said else "right"), (kind, check, found)
            assert said is None or said in found["said"], (kind, check, found)
    assert "| llama | yes | yes | yes | yes | yes | yes |" in done.stdout


@pytest.mark.timeout(300)
def test_engines_and_what_is_known_already(tmp_path):
    """A second start does what is missing; an engine's whole student is that of one process."""
    file = tmp_path / "rows.json"
    for checks in ("causal", "causal,fsdp2,zero"):
        done = forked(_main, ("--types", "gemma2", "--checks", checks, "--json", str(file)), timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
    row, = json.loads(file.read_text())["rows"]
    assert {name: found["verdict"] for name, found in row["checks"].items()} == dict.fromkeys(
        ("causal", "fsdp2", "zero"), "right")
    assert "moved" in row["checks"]["zero"] and row["parameters"] > 1000


@pytest.mark.timeout(400)
def test_engines_on_models_unlike_llama(tmp_path):
    """Blocks that give a list, weights that no loss reaches, linear layers in a list, blocks with weights in common.

    Under DeepSpeed the first trained no block (and ended in an error on a CPU), the second decayed, the third failed;
    DDP ended the second after one step. The fourth are refused where blocks are gathered. AfMoE has parameters that are
    not trained, which transformers forgets as it loads; Dory's head has one that a plan without data does not see.
    """
    file, wanted = tmp_path / "rows.json", {"ddp": "right", "fsdp2": "right", "zero": "right"}
    done = forked(_main, ("--types", "openai-gpt,git,gemma3n_text,zamba,afmoe,dory", "--checks", ",".join(wanted),
                          "--json", str(file)), timeout=380)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["type"]: row["checks"] for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 6
    for kind, row in rows.items():
        gathered = {"fsdp2": "refused", "zero": "refused"} if kind == "zamba" else {}
        assert {name: found["verdict"] for name, found in row.items()} == {**wanted, **gathered}, (kind, row)
        for found in row.values():
            assert "said" in found or found["difference"] < 1e-2 * found["moved"], (kind, row)
    assert "model.layers.1 and model.layers.2 of the student have weights in common" in rows["zamba"]["zero"]["said"]


def test_no_such_type(tmp_path):
    file = tmp_path / "rows.json"
    assert forked(_main, ("--types", "no-such-type", "--json", str(file))).returncode == 2
