"""Encoders of many families through a whole run: taught for two steps, exported, loaded by two runtimes.

    python -m benchmarks.tasks.encoders [--types bert,roberta] [--tasks texts,pairs,words] [--json FILE]

For each family, at tiny dimensions: a classifier of texts, of pairs of texts, and of words, with random weights and a
teacher of the same family. A row says whether each was trained and its exported files reproduce it (the receipts of
transformers and of ONNX Runtime hold), or the first line of what went wrong.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

import limbeck
from benchmarks.quickstart import machine, show
from trainer.models.task_heads import AUTO
from trainer.run.folder import RunFolder, read_json

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
POSITIONS = {"max_position_embeddings": 64}
TYPES: dict[str, dict[str, Any]] = {
    "bert": WIDTH | POSITIONS,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, **POSITIONS},
    "modernbert": WIDTH | POSITIONS,
    "roberta": WIDTH | POSITIONS,
    "xlm-roberta": WIDTH | POSITIONS,
    "camembert": WIDTH | POSITIONS,
    "electra": WIDTH | POSITIONS | {"embedding_size": 16},
    "deberta-v2": WIDTH | POSITIONS | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                                       "position_biased_input": False},
    "albert": WIDTH | POSITIONS | {"embedding_size": 16},
    "mpnet": WIDTH | POSITIONS,
    "mobilebert": WIDTH | POSITIONS | {"embedding_size": 16, "intra_bottleneck_size": 16,
                                       "num_feedforward_networks": 1},
    "squeezebert": WIDTH | POSITIONS | {"embedding_size": 32},
    "nomic_bert": WIDTH | POSITIONS,
    "eurobert": WIDTH | POSITIONS | {"num_key_value_heads": 2},
    "ernie": WIDTH | POSITIONS,
    "llama": WIDTH | POSITIONS | {"num_key_value_heads": 1},
    "qwen3": WIDTH | POSITIONS | {"num_key_value_heads": 1, "head_dim": 16},
}
TASKS = {"texts": "sequence_classification", "pairs": "sequence_classification", "words": "token_classification"}
WORDS = ("cat", "dog", "bird", "sees", "likes", "bread", "milk")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
RUNTIMES = {"transformers": "student", "onnx": "student-onnx"}


def main(arguments: list[str] | None = None) -> int:
    """Run every family on every task, print the table, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(TYPES), help="families, separated by commas")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of texts, pairs and words")
    parser.add_argument("--json", type=Path, help="where to write the results")
    chosen = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        _write_data(Path(folder))
        for name in chosen.types.split(","):
            for kind in chosen.tasks.split(","):
                rows.append({"type": name, "task": kind, **_examined(Path(folder), name, kind)})
                print(rows[-1], flush=True)
    show(table(rows), {"machine": machine(), "rows": rows}, chosen.json)
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Families by task and runtime."""
    kinds = list(dict.fromkeys(row["task"] for row in rows))
    lines = ["| | " + " | ".join(f"{kind}: {runtime}" for kind in kinds for runtime in RUNTIMES) + " |",
             "|---|" + "---|" * (len(kinds) * len(RUNTIMES))]
    for name in dict.fromkeys(row["type"] for row in rows):
        cells = [row.get(runtime, row.get("failed", "")) for kind in kinds
                 for row in rows if (row["type"], row["task"]) == (name, kind) for runtime in RUNTIMES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _examined(folder: Path, name: str, kind: str) -> dict[str, str]:
    """What became of one run, by runtime; or what failed."""
    try:
        values = _experiment(folder, name, kind)
        (folder / "e.yaml").write_text(yaml.safe_dump(values))
        run = RunFolder(limbeck.run(limbeck.read_experiment(folder / "e.yaml")))
        return {runtime: _said(run.path / place / "receipt.json") for runtime, place in RUNTIMES.items()}
    except Exception as error:  # whatever a foreign model does
        if not isinstance(error, ValueError | RuntimeError):
            traceback.print_exc()
        return {"failed": (str(error).splitlines() or [type(error).__name__])[0][:200]}


def _said(receipt: Path) -> str:
    if not receipt.exists():
        return "not written"
    found = read_json(receipt)
    return f"{found['largest_difference'] / found['largest_logit']:.0e}" if found["holds"] else "differs"


def _experiment(folder: Path, name: str, kind: str) -> dict[str, Any]:
    """A run of two steps with a teacher of the same family."""
    teacher = folder / f"{name}-{kind}"
    words, names = kind == "words", ("O", "THING") if kind == "words" else ("no", "yes")
    shape = AutoConfig.for_model(name, **TYPES[name], vocab_size=len(SPECIAL) + len(WORDS), pad_token_id=0,
                                 id2label=dict(enumerate(names)), label2id={one: at for at, one in enumerate(names)})
    torch.manual_seed(1)
    AUTO[TASKS[kind]].from_config(shape).save_pretrained(teacher)
    return {
        "name": f"{name}-{kind}", "student": {"architecture": {"model_type": name, **TYPES[name]}},
        "teacher": {"path": str(teacher)},
        "data": {"task": TASKS[kind], "path": str(folder / "train.jsonl"), "sequence_length": 16,
                 "validation": {"path": str(folder / "test.jsonl")}, "label": "tags" if words else "label",
                 "text_pair": "other" if kind == "pairs" else None,
                 "tokenizer": {"path": str(folder / "tokenizer")}},
        "training": {"steps": 2, "batch_size": 8, "micro_batch": 4, "evaluate_every": 2},
        "export": {"to": ["onnx"]}, "report": {"control": False},
        "run": {"folder": str(folder / "runs" / f"{name}-{kind}"), "cache": str(folder / "cache"), "threads": 1}}


def _write_data(folder: Path) -> None:
    """Records for all tasks, and a tokenizer for them."""
    draw = torch.Generator().manual_seed(0)
    for file, count in (("train", 64), ("test", 16)):
        lines = []
        for _ in range(count):
            first, second = ([WORDS[int(at)] for at in torch.randint(len(WORDS), (int(size),), generator=draw)]
                             for size in torch.randint(2, 7, (2,), generator=draw))
            lines.append(json.dumps({
                "text": " ".join(first), "other": " ".join(second), "label": "yes" if first[0] == "cat" else "no",
                "tokens": first, "tags": ["THING" if word in WORDS[:3] else "O" for word in first]}))
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    numbers = {token: number for number, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, numbers[name]) for name in ("[CLS]", "[SEP]")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                            sep_token="[SEP]", mask_token="[MASK]").save_pretrained(folder / "tokenizer")


if __name__ == "__main__":
    raise SystemExit(main())
