"""The model card of an exported student: `README.md` as the hub reads it, from the files of a run folder alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from safetensors import safe_open

from trainer import __version__
from trainer.experiment.objective_nodes import INSIDE
from trainer.experiment.plain_yaml import read_values
from trainer.experiment.run_paths import STUDENT, run_of
from trainer.experiment.scheduled import highest, shown
from trainer.files import write_atomically
from trainer.run.classifier_snippets import KINDS, TAGS, Classified, classifier_snippet, install
from trainer.run.cut_report import cuts_in_words
from trainer.run.exit_snippets import RUNTIME as EARLY_EXIT
from trainer.run.exit_snippets import exit_snippet
from trainer.run.folder import RunFolder, read_json
from trainer.run.held_out import FIGURES, compared, main_figure
from trainer.run.lineage import EarlierRun, earlier_runs
from trainer.run.load_snippets import INSTALL, TITLES, Prompt, snippet
from trainer.run.markdown import block, code, plain, sentence
from trainer.run.metrics import readable
from trainer.run.quantization_loss import rounding_cost
from trainer.run.task_results import evaluation_of, task_tables

CARD = "README.md"
MARK = "<!-- Written by limbeck, which writes it again; remove this line to keep what you change. -->"
LIBRARIES = {"transformers": "transformers", "onnx": "onnx", "gguf": "gguf"}  # as the hub names them
RECEIPT = {"bits_per_byte": "bits per byte of held-out text", "accuracy": "accuracy on held-out rows",
           "macro_f1": "macro F1", "calibration_error": "calibration error", "rows": "held-out rows",
           "argmax_agreement": "same most probable answer",
           "largest_difference": "largest logit difference", "largest_logit": "largest logit",
           "tokens_compared": ""}


def write_cards(folder: RunFolder) -> None:
    """Write the card of each exported student that has a receipt, except for cards that somebody has made his own."""
    for student in students(folder).values():
        card = student / CARD
        if is_ours(card):
            write_atomically(card, model_card(folder, student))


def is_ours(card: Path) -> bool:
    """Whether a card is missing, or is still as it was written here."""
    return not card.is_file() or MARK in card.read_text(encoding="utf-8", errors="replace")


def students(folder: RunFolder) -> dict[str, Path]:
    """The exported students of a run that have a receipt, by runtime."""
    found = {"transformers": folder.student, **{path.name.removeprefix("student-"): path
                                                for path in sorted(folder.path.glob("student-*"))}}
    return {runtime: path for runtime, path in found.items() if (path / "receipt.json").is_file()}


def model_card(folder: RunFolder, student: Path, repository: str | None = None, base: str | None = None) -> str:
    """The card of an exported student.

    Args:
        student: its folder.
        repository: the repository on the hub that it goes to; None for a card that is read in the folder.
        base: of an adapter alone, the id on the hub of its base, which is a folder here.
    """
    values, receipt = read_values(folder.experiment)[0], read_json(student / "receipt.json")
    before, stated = earlier_runs(folder, values), license_of(folder)
    runtime = next(name for name, path in students(folder).items() if path == student)
    size = _size(values, receipt, student)
    if base is not None:  # of the hub, whatever folders there are here
        receipt = with_base(receipt, values, base)
        values = {**values, "student": {**values["student"], "path": base, "revision": "main"}}
    parts = [f"---\n{_front_matter(values, before, runtime, stated)}---\n", f"# {plain(values['name'])}\n",
             f"{_opening(values, before, size, stated)}\n", "## Load it\n",
             *_loading(folder, values, student, repository), "## Receipt\n",
             *_receipt(receipt, folder, values, size), *_tasks(folder), "## Data\n", _data(values, folder), "",
             "## Recipe\n", _recipe(values, folder), "", *_earlier(before), MARK, ""]
    return "\n".join(parts)


def with_base(receipt: dict[str, Any], values: dict[str, Any], base: str) -> dict[str, Any]:
    """The receipt of an adapter alone, whose note names its base by the id on the hub instead of its folder here."""
    return {**receipt, "notes": [note.replace(f"for {values['student']['path']} ", f"for {base} ")
                                 for note in receipt.get("notes", [])]}


# ---- the front matter

def _front_matter(values: dict[str, Any], before: Sequence[EarlierRun], runtime: str, stated: str | None) -> str:
    first, every = _first(values, before), [values, *(run.values for run in before)]
    base, quantization = _base(first), values["student"].get("quantization")
    tags = ["limbeck", *["distillation"] * any(map(_distilled, every)), *["quantized"] * bool(quantization),
            *([] if runtime == "transformers" else [runtime])]
    paths = dict.fromkeys(path for one in every for path in _data_paths(one) if _is_hub_id(path))
    return ModelCardData(
        license=stated, base_model=base if base and _on_hub(base, first) else None, datasets=[*paths] or None,
        library_name="peft" if _adapter_base(values) else LIBRARIES.get(runtime),
        pipeline_tag=TAGS.get(_task(values), "text-generation"), tags=tags,
        metrics=["accuracy", "f1"] if _classifies(values) else None).to_yaml() + "\n"


def _first(values: dict[str, Any], before: Sequence[EarlierRun]) -> dict[str, Any]:
    """The values of the run with which it all began; an adapter alone belongs to the very base that it names."""
    return before[-1].values if before and _adapter_base(values) is None else values


def license_of(folder: RunFolder) -> str | None:
    """The license: `export.license`, or that of the base model if a local card of it names one.

    Without either it is that of the run before, whose weights these were.
    """
    values = read_values(folder.experiment)[0]
    every = [values, *(run.values for run in earlier_runs(folder, values))]
    return next(filter(None, map(_license, every)), None)


def _license(values: dict[str, Any]) -> str | None:
    if own := values["export"].get("license"):
        return str(own)
    base = _base(values)
    card = Path(base) / CARD if base else None
    try:
        found = (metadata_load(card) or {}).get("license") if card is not None and card.is_file() else None
    except (ValueError, OSError):
        return None
    return found if isinstance(found, str) else None


def _base(values: dict[str, Any]) -> str | None:
    """The path of the model that the student's weights come from."""
    if (run := values["student"].get("from_run")) is not None:
        return str(run_of(run) / STUDENT)
    from_teacher = values["student"].get("from_teacher") is not None
    model = values["teacher"] if from_teacher else values["student"]
    return None if model is None else model.get("path")


def _on_hub(path: str, values: dict[str, Any]) -> bool:
    return _is_hub_id(path) or any(model and model.get("path") == path and model.get("revision")
                                   for model in (values["teacher"], values["student"]))


def _is_hub_id(path: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path)) and not Path(path).exists() and \
        Path(path).suffix not in (".jsonl", ".json", ".txt", ".parquet", ".csv", ".tsv")


def _data_paths(values: dict[str, Any]) -> list[str]:
    data = values["data"]
    given = [source.get("path") for source in data.get("sources") or [data]]
    return [path for path in given if isinstance(path, str)]


def _distilled(values: dict[str, Any]) -> bool:
    return values["teacher"] is not None and (
        highest(values["objective"]["divergence"].get("weight")) != 0)


# ---- sections

def _name(path: str, values: dict[str, Any]) -> str:
    """A hub id, or only the end of a local path: a card is public, and says nothing about a machine."""
    parts = Path(path).parts[-2 if Path(path).name.startswith("student") else -1:]  # runs/NAME/student: of which run
    return code(path if _on_hub(path, values) else "/".join(parts))


def _opening(values: dict[str, Any], before: Sequence[EarlierRun], size: dict[str, int], stated: str | None) -> str:
    first, teacher = _first(values, before), values["teacher"]
    base, layers = _base(first), first["student"].get("from_teacher")
    text = _what(size, values)
    if _distilled(values):
        names = ["itself as it began" if teacher.get("from_student") else _name(teacher["path"], values)
                 if teacher.get("path") else "a teacher of its own"]
        names += [_name(one["path"], values) for one in teacher.get("others", ())]
        text += f", distilled from {' and '.join(names)}"
    if layers == "all":
        text += f", begun as {_name(base, first) if base else 'the whole of a teacher of its own'}"
    elif layers is not None:
        text += f", begun with {len(layers)} of its layers" if _distilled(values) and first is values else \
            f", begun with {len(layers)} layers of {_name(base, first) if base else 'a teacher of its own'}"
    elif base:
        text += f", begun as {_name(base, first)}"
    elif before:
        text += ", begun with random weights"
    if cuts := cuts_in_words([one.values for one in reversed(before)] + [values]):
        text += f", cut to {cuts}"
    if first is not values:
        text += f", by way of {len(before)} earlier run{'s' * (len(before) > 1)}"
    return f"{text}. License: {plain(stated) if stated else 'not stated'}. Made with Limbeck {__version__}."


def _size(values: dict[str, Any], receipt: dict[str, Any], student: Path) -> dict[str, int]:
    """Parameters and bytes on disk; of an adapter alone its own, and those of its base as far as its files are here."""
    if _adapter_base(values) is None:
        return {"bytes on disk": receipt["bytes_on_disk"], "parameters": receipt["parameters"]}
    file = student / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as weights:
        own = sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118 - no dictionary
    found = {"parameters of the adapter": own, "bytes of the adapter on disk": file.stat().st_size,
             "parameters of its base": receipt["parameters"] - own}
    base = student / "base" if _adapter_base(values) == "quantized" else Path(str(values["student"]["path"]))
    if (cut := student.parent / "cut").is_dir():  # then the adapter is for what was left
        base = cut
    size = sum(one.stat().st_size for one in base.glob("*.safetensors"))
    return {**found, **({"bytes of its base on disk": size} if size else {})}


def _what(size: dict[str, int], values: dict[str, Any]) -> str:
    if "parameters" in size:
        return (f"{KINDS.get(_task(values), 'A causal language model')} of {size['parameters']:,} parameters in "
                f"{readable(size['bytes on disk'])}")
    beneath = size.get("bytes of its base on disk")
    return (f"An adapter of {size['parameters of the adapter']:,} parameters in "
            f"{readable(size['bytes of the adapter on disk'])}, for a causal language model of "
            f"{size['parameters of its base']:,} parameters{f' in {readable(beneath)}' if beneath else ''}")


def _loading(folder: RunFolder, values: dict[str, Any], student: Path, repository: str | None) -> list[str]:
    """How to load the student: in its own runtime, and beside it in the folder, those for others."""
    every, prompt = students(folder), _prompt(values, folder)
    trust = any(model and model.get("trust_remote_code") for model in (values["student"], values["teacher"]))
    parts = []
    for runtime in sorted(every, key=lambda name: every[name] != student):
        own = every[runtime] == student
        path = repository or ("." if own else f"../{every[runtime].name}")
        hub = repository is not None
        given = Classified.of(values["data"]) if _classifies(values) else None
        if runtime == EARLY_EXIT:
            shown = exit_snippet(path, given or prompt, hub=hub)
        elif given is not None:
            shown = classifier_snippet(runtime, path, given, hub=hub, trust=trust)
        else:
            shown = snippet(runtime, path, prompt, hub=hub, trust=trust, base=_adapter_base(values))
        if shown is None or (repository is not None and not own):
            continue
        where = "" if own else f", exported beside this folder in {code(every[runtime].name)}"
        install = f" ({code(_install(runtime, values))})" if runtime in INSTALL else ""
        parts += [f"With {TITLES[runtime]}{install}{where}:\n", block(shown[1].rstrip("\n"), shown[0]), ""]
    return parts


def _task(values: dict[str, Any]) -> str:
    return values["data"].get("task", "causal_lm")


def _classifies(values: dict[str, Any]) -> bool:
    return _task(values) != "causal_lm"


def _rows(values: dict[str, Any]) -> str:
    return "rows" if _classifies(values) else "sequences"


def _adapter_base(values: dict[str, Any]) -> str | None:
    """The numbers that the base was held in, of an adapter that is exported alone."""
    return values["student"]["adapter"]["base"] if values["export"].get("adapter") == "separate" else None


def needs_its_base(values: dict[str, Any]) -> bool:
    """Whether what is exported is an adapter alone, for a base that is elsewhere."""
    return _adapter_base(values) not in (None, "quantized")


def _install(runtime: str, values: dict[str, Any]) -> str:
    if _classifies(values):
        return install(runtime, Classified.of(values["data"]))
    base = _adapter_base(values) if runtime == "transformers" else None
    return INSTALL[runtime] + " peft" * (base is not None) + " bitsandbytes" * (base == "nf4")


def _prompt(values: dict[str, Any], folder: RunFolder) -> Prompt:
    """The first prompt of the report, as a chat if the student learned chats."""
    sampled = read_json(folder.comparison).get("student", {}).get("samples")
    return sampled[0]["prompt"] if sampled else values["report"]["prompt"]


def _receipt(receipt: dict[str, Any], folder: RunFolder, values: dict[str, Any], size: dict[str, int]
             ) -> list[str]:
    """What the fresh process found that loaded this folder, and what the other models of the run need."""
    rows = [*(f"| {what} | {count:,} |" for what, count in size.items()),
            *(f"| {what or compared(receipt)} | {_figure(name, receipt[name])} |" for name, what in RECEIPT.items()
              if receipt.get(name) is not None)]
    versions = ", ".join(f"{library} {number}" for library, number in receipt["versions"].items())
    found = read_json(folder.comparison)
    cost = rounding_cost(folder, values)
    of = main_figure(found["student"])
    others = [f"{name} {FIGURES[of].shown(found[name][of])}" for name in ("teacher", "control") if name in found]
    return ["A fresh process loaded the exported file and compared it with the model in training; differences are "
            "between logits.\n", "| | |", "|---|---:|", *rows, f"| loaded by | {plain(versions)} |", "",
            *([f"{sentence(str(cost))}.\n"] if cost is not None else []),
            *([f"On the same {'text' if of == 'bits_per_byte' else 'rows'}, {FIGURES[of].words} of others: "
               f"{', '.join(others)}.\n"] if others else []),
            *(f"{plain(_public(note, values))}.\n" for note in receipt.get("notes", []))]


def _tasks(folder: RunFolder) -> list[str]:
    """Section on tasks that the student for transformers was judged on; nothing without them."""
    found = evaluation_of(folder)
    return [] if found is None else ["## Tasks\n", "With 95% intervals; judged in transformers, with greedy answers.\n",
                                     *task_tables(found)]


def _public(note: str, values: dict[str, Any]) -> str:
    """A note with only the end of local paths: a card is public, and says nothing about a machine."""
    held_out = [(part.get("validation") or {}).get("path")
                for part in (values["data"], *(values["data"].get("sources") or ()))]
    given = {*_data_paths(values), *filter(None, [_base(values), *held_out])}
    for path in sorted(given, key=len, reverse=True):
        if not _on_hub(path, values):
            note = note.replace(path, Path(path).name)
    return note


def _figure(name: str, value: float) -> str:
    if name == "argmax_agreement" or (name in FIGURES and FIGURES[name].share):
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _data(values: dict[str, Any], folder: RunFolder) -> str:
    data, plan = values["data"], read_json(folder.plan)
    trained = plan["steps"] > 0
    parts = [data, *(data.get("sources") or ())]
    if _classifies(values):
        return _classified(data, plan, values)
    form = "chats" if any(part.get("messages") for part in parts) else \
        f"prompts and their answers, of which the answers {'were learned' if trained else 'count'}" \
        if any(part.get("prompt") for part in parts) else "text"
    return (f"{_trained_on(plan, values)} ({form}), in sequences of {data['sequence_length']:,} tokens."
            f"{_notes(plan, values)}")


def _trained_on(plan: dict[str, Any], values: dict[str, Any]) -> str:
    did = "Trained" if plan["steps"] > 0 else "This run trained nothing. It compared the model"
    return f"{did} on {', '.join(_name(path, values) for path in _data_paths(values))}"


def _notes(plan: dict[str, Any], values: dict[str, Any]) -> str:
    return "".join(f"\n\n{plain(_public(note, values))}." for note in plan.get("text", []))


def _classified(data: dict[str, Any], plan: dict[str, Any], values: dict[str, Any]) -> str:
    """Section on the data of a classifier."""
    size = data["images"]["size"]
    form = f"images of {size} x {size} pixels" if data["task"] == "image_classification" else (
        ("words of texts" if data["task"] == "token_classification" else "pairs of texts" if data["text_pair"] else
         "texts") + f" of at most {data['sequence_length']:,} tokens")
    return f"{_trained_on(plan, values)}, {form}, each with its class.{_notes(plan, values)}"


def _recipe(values: dict[str, Any], folder: RunFolder) -> str:
    training, optimizer, schedule = values["training"], values["optimizer"], values["schedule"]
    steps = read_json(folder.plan)["steps"]
    rows = {} if steps == 0 else {
        "training": f"{steps:,} steps of {training['batch_size']} {_rows(values)}, seed "
                    f"{values['seed']}",
        "objective": _objective(values),
        "optimizer": f"{optimizer['name']}, learning rate {optimizer['lr']:g} ({schedule['shape']}), weight decay "
                     f"{optimizer['weight_decay']:g}",
        "precision": f"{values['precision']['dtype']} forward and backward, fp32 weights and updates"}
    rows |= {"quantization": _quantization(values["student"].get("quantization")),
            "exported weights": values["export"]["dtype"]}
    if folder.best.exists():
        rows["exported step"] = read_json(folder.best)["outcome"]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {plain(value)} |" for name, value in rows.items())])


def _earlier(before: Sequence[EarlierRun]) -> list[str]:
    """Section on the runs that the weights come from, in the order in which they ran."""
    if not before:
        return []
    rows = []
    for run in reversed(before):
        values, optimizer = run.values, run.values["optimizer"]
        paths = ", ".join(_name(path, values) for path in _data_paths(values))
        did = [paths, f"{run.steps:,}", f"{optimizer['lr']:g} ({plain(values['schedule']['shape'])})",
               plain(_objective(values))] if run.steps else ["", "0", "", "none: exported as it was"]
        rows.append(f"| {code(run.name)} | {' | '.join(did)} |")
    return ["## Earlier runs\n", "What the weights learned before this run, the first run first.\n",
            "| run | trained on | steps | learning rate | objective |", "|---|---|---:|---:|---|", *rows, ""]


def _objective(values: dict[str, Any]) -> str:
    objective, terms = values["objective"], []
    if objective["cross_entropy"]:
        terms.append(f"{shown(objective['cross_entropy'])} cross-entropy")
    if _distilled(values):
        asked = objective["divergence"]
        weight = 1.0 if asked["weight"] is None else asked["weight"]
        terms.append(f"{shown(weight)} {asked['name']} from the teacher at temperature {shown(asked['temperature'])}")
    return " + ".join(terms + [name for name in (*INSIDE, "on_policy") if objective.get(name)])


def _quantization(asked: dict[str, Any] | None) -> str:
    if asked is None:
        return "none"
    size = "within a budget of bytes" if asked.get("budget") else (
        f"{asked['bits'] or 4} bits" if asked["kind"] == "int" else asked["kind"])
    groups = f", groups of {asked['group_size']}" if asked.get("group_size") else ""
    return f"{asked['method']}, {size}{groups}{', embeddings too' if asked.get('embeddings') else ''}"
