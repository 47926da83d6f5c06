"""Write `report.md` and its plots, using only the files of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy

from strategies.memory.plot import Curve, draw_step
from trainer.errors import ExperimentErrors, UserError
from trainer.experiment.objective_nodes import Objective
from trainer.experiment.plain_yaml import read_values
from trainer.experiment.scheduled import shown
from trainer.files import write_atomically
from trainer.run.classifier_report import (
    ABOUT_CLASSES,
    classes_of,
    classifier_models,
    classifier_verdict,
    confusion_section,
)
from trainer.run.cut_report import cut_section
from trainer.run.exit_report import exit_section
from trainer.run.folder import RunFolder, not_written, read_json
from trainer.run.held_out import FIGURES, compared, main_figure
from trainer.run.hints import hints
from trainer.run.markdown import block, code, plain, sentence
from trainer.run.metrics import read_lines, readable
from trainer.run.model_card import CARD, needs_its_base, write_cards
from trainer.run.quantization_loss import rises, rounding_cost
from trainer.run.report_plots import ordered, plot_confusion, plot_held_out, plot_loss, plot_size
from trainer.run.task_results import task_section

ABOUT_MODELS = (
    "Bits per byte on held-out text, lower is better; bytes of the weight files; tokens per second of a forward pass "
    "over that text, each model loaded by `transformers` in the same fresh process. Integer weights are unpacked to "
    "floating point by that runtime, so packing makes a file smaller, not faster.\n")
MEANING = {"teacher": "the large model", "student": "distilled from the teacher",
           "control": "same start, same tokens, cross-entropy only"}


def write_report(path: Path) -> Path:
    """Write `report.md` and its PNG plots into a run folder, and the model cards of its students.

    Returns:
        The path of the report.

    Raises:
        UserError: the folder does not hold a finished run, or one of its files is malformed.
    """
    folder = RunFolder(path)
    for file in (folder.experiment, folder.plan, folder.metrics, folder.comparison, folder.receipt):
        if not file.exists():
            raise UserError("", f"not a finished run: {file.name} is missing",
                            way_out="pass a run folder whose training has ended, for example runs/quickstart")
    try:
        _write(folder)
        write_cards(folder)
    except ExperimentErrors as error:
        raise UserError("", f"{error.place}: {error}", way_out=error.errors[0].way_out) from error
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        files = ", ".join(file.name for file in (folder.comparison, folder.receipt, folder.plan, folder.metrics))
        raise not_written(folder.path, f"something in one of {files} ({what})") from error
    return folder.report


def _write(folder: RunFolder) -> None:
    experiment = read_values(folder.experiment)[0]
    found, receipt, plan = (read_json(file) for file in (folder.comparison, folder.receipt, folder.plan))
    curves = {"student": read_lines(folder.metrics)}
    control = RunFolder(folder.control)
    if control.metrics.exists():
        curves["control"] = read_lines(control.metrics)
    classifies = main_figure(found["student"]) != "bits_per_byte"
    meaning = MEANING if experiment["teacher"] else {"student": "fine-tuned without a teacher"}
    if (experiment["teacher"] or {}).get("from_student"):
        meaning = {**MEANING, "teacher": "the student as it began", "student": "distilled from itself as it began"}
    if classifies:
        meaning = {**meaning, "control": MEANING["control"].replace("tokens", "rows")}
    if experiment["training"]["steps"] == 0:
        meaning = {**MEANING, "student": "exported as it is, without any training"}
    if experiment["training"]["steps"] != 0:
        plot_loss(curves, folder.path / "loss.png")
        plot_held_out(curves, found, folder.path / "held_out.png")
    plot_size(found, folder.path / "size.png")
    if classifies:
        plot_confusion(found["student"]["confusion"], classes_of(folder), folder.path / "confusion.png")
    parts = [
        f"# {plain(experiment['name'])}\n",
        classifier_verdict(found, receipt, folder) if classifies else
        _verdict(found, receipt, needs_its_base(experiment), folder), "", *_hints(folder),
        "## Models\n", classifier_models(found, meaning) if classifies else _models(found, meaning), "",
        *(["Of the student, its bytes are those of the adapter alone, its parameters those of base and adapter.\n"]
          if needs_its_base(experiment) else []),
        ABOUT_CLASSES if classifies else ABOUT_MODELS,
        *[f"![size against {FIGURES[main_figure(found['student'])].words}](size.png)\n"] * (len(ordered(found)) > 1),
        *(confusion_section(found, folder) if classifies else []),
        *exit_section(folder),
        *task_section(folder),
        *cut_section(folder, found),
        "## Training\n", *_curves(experiment), _training(curves["student"]), *_schedules(experiment),
        *_best(folder),
        *_went_on(folder),
        *(f"{'Data' if classifies else 'Text'}: {plain(note)}." for note in plan.get("text", [])), "",
        *_mixture(plan, curves["student"]),
        "## Receipt\n", _receipt(receipt), "", *_allotted(folder), *_elsewhere(folder),
        "## Bytes\n", *_memory(plan, curves["student"], folder), _ledger(plan, folder), "",
        *([] if classifies else ["## Samples\n", *_samples(found, experiment["report"])]),
        "Run it again: `accelerate launch train.py --config experiment.yaml run.folder=...` with the "
        "`experiment.yaml` in this folder.\n",
    ]
    write_atomically(folder.report, "\n".join(parts))


def _samples(found: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """What each model writes to each prompt: texts that it continues, or chats that it answers."""
    def of(name: str) -> list[dict[str, Any]]:  # earlier versions had one text of each model, and no prompt beside it
        entry = found[name]
        return entry["samples"] if "samples" in entry else [{"prompt": asked["prompt"], "text": entry["sample"]}]

    names = ordered(found)
    prompts = [one["prompt"] for one in of(names[0])]
    who = "Each model" if len(names) > 1 else f"The {names[0]}"
    chats = not all(isinstance(prompt, str) for prompt in prompts)
    parts = [f"{who} answers with its most probable tokens, up to its end token.\n" if chats else
             f"{who} continues each prompt with its most probable tokens.\n"]
    for number, prompt in enumerate(prompts):
        parts.append(f"**prompt**: {code(prompt)}\n" if isinstance(prompt, str) else
                     f"**user**\n\n{block(_said(prompt))}\n")
        parts += [f"**{name}**\n\n{block(of(name)[number]['text'])}\n" for name in names]
    return parts


def _said(messages: list[dict[str, Any]]) -> str:
    """The contents of a prompt's messages."""
    contents = [message["content"] for message in messages]
    return "\n".join(content if isinstance(content, str) else "".join(part["text"] for part in content)
                     for content in contents)


def _verdict(found: dict[str, Any], receipt: dict[str, Any], adapter_alone: bool, folder: RunFolder) -> str:
    student, size = found["student"], readable(receipt["bytes_on_disk"])
    lines = [f"The adapter takes {size} on disk, beside its base, with which it" if adapter_alone else
             f"The student takes {size} on disk and", f"needs {student['bits_per_byte']:.4f} bits per byte of held-out "
             "text."]
    if (cost := rounding_cost(folder)) is not None:
        lines.append(f"{sentence(str(cost))}.")
    if "teacher" in found:
        ratio = found["teacher"]["bytes_on_disk"] / receipt["bytes_on_disk"]
        lines.append(f"Its teacher needs {found['teacher']['bits_per_byte']:.4f}." if adapter_alone else
                     f"It is {ratio:.1f} times smaller than its teacher, which needs "
                     f"{found['teacher']['bits_per_byte']:.4f}.")
        if student["bits_per_byte"] < found["teacher"]["bits_per_byte"]:
            lines.append("It went on learning from the text itself, and is better than its teacher here.")
    if "control" in found:
        gap = found["control"]["bits_per_byte"] - student["bits_per_byte"]
        help_ = f"the teacher's help saved {gap:.4f} bits per byte" if gap > 0 else \
            f"the teacher did not help, it cost {-gap:.4f} bits per byte"
        lines.append(f"The same student, trained from the same start on the same tokens by cross-entropy alone, needs "
                     f"{found['control']['bits_per_byte']:.4f}: {help_}, in this one run.")
    return " ".join(lines)


def _hints(folder: RunFolder) -> list[str]:
    found = [f"- {plain(hint)}" for hint in hints(folder)]
    return ["Hints:\n", *found, ""] if found else []


def _models(found: dict[str, Any], meaning: dict[str, str]) -> str:
    rows = ["| model | | bits per byte | bytes | parameters | tokens/s |", "|---|---|---:|---:|---:|---:|"]
    for name in ordered(found):
        entry = found[name]
        rows.append(f"| {name} | {meaning[name]} | {entry['bits_per_byte']:.4f} | {entry['bytes_on_disk']:,} | "
                    f"{entry['parameters']:,} | {entry['tokens_per_second']:,.0f} |")
    return "\n".join(rows)


def _curves(experiment: dict[str, Any]) -> list[str]:
    """The pictures of a training and their caption; nothing where nothing was trained."""
    if experiment["training"]["steps"] == 0:
        return []
    return ["![training loss](loss.png)\n", "Thin lines are single steps, thick ones a moving average over a thirtieth "
            "of the run, which lags where the loss falls fast.\n", "![on held-out data](held_out.png)\n"]


def _went_on(folder: RunFolder) -> list[str]:
    """Where the run went on for longer than it was first to."""
    return [f"The run went on at step {one['step']:,}: " + ", ".join(
        f"{plain(key)} {plain(then)} → {plain(now)}" for key, (then, now) in sorted(
            one["changed"].items(), reverse=True)) + "." for one in folder.extensions()]


def _training(lines: list[dict[str, Any]]) -> str:
    steps = [line for line in lines if "loss" in line]
    skipped = [line["step"] for line in steps if "nonfinite" in line]
    seconds = sum(line["seconds"] for line in steps)
    of = "rows" if steps and "rows" in steps[0] else "tokens"
    count = sum(line[of] for line in steps)
    what = "rows" if of == "rows" else "target tokens"
    text = f"{len(steps):,} steps, {count:,} {what}, {seconds:.0f} s of training steps."
    if steps and steps[-1]["loss_scale"] != 1:
        text += (f" Loss scale {steps[-1]['loss_scale']:g} at the end; {steps[-1]['skipped']} steps skipped for "
                 f"overflow, {steps[-1]['growths']} growths.")
    if empty := sum("empty" in line for line in steps):
        text += f" {empty:,} of the steps had no target token and taught nothing."
    return text + (f" Steps skipped because loss or gradient was not finite: {skipped}." if skipped else "")


def _schedules(experiment: dict[str, Any]) -> list[str]:
    """What of the objective moved during the run."""
    objective = Objective.model_validate(experiment["objective"])
    moved = [f"{key} {shown(objective.value(key))}" for key in objective.scheduled]
    return [f"During the run: {plain(', '.join(moved))}."] if moved else []


def _best(folder: RunFolder) -> list[str]:
    """Which step is exported, if not simply the last one."""
    found = {"Student": folder, "Control": RunFolder(folder.control)}
    return [f"{name}: {plain(read_json(one.best)['outcome'])}." for name, one in found.items() if one.best.exists()]


def _mixture(plan: dict[str, Any], lines: list[dict[str, Any]]) -> list[str]:
    """Table of the sources of a mixture, with what the student needs for the held-out text of each at the end."""
    if "mixture" not in plan:
        return []
    last: dict[str, Any] = next((line["held_out"].get("sources", {}) for line in reversed(lines)
                                 if "held_out" in line), {})
    rows = ["| source | weight | of the trained tokens | tokens | learned of them | seen | held-out bits per byte |",
            "|---|---:|---:|---:|---:|---:|---:|"]
    for one in plan["mixture"]:
        known = ["streamed", "", "", ""] if one["tokens"] is None else [
            f"{one['share']:.2%}", f"{one['tokens']:,}", f"{one['learned'] / one['tokens']:.0%}",
            f"{one['trained'] / one['tokens']:.2g} times"]
        held_out = f"{last[one['name']]:.4f}" if one["name"] in last else ""
        rows.append(f"| {code(one['name'])} | {one['weight']:.2%} | {' | '.join(known)} | {held_out} |")
    return [*rows, ""]


def _receipt(receipt: dict[str, Any]) -> str:
    rows = ["| | |", "|---|---:|"]
    for name, value in receipt.items():
        if value is None or value in ([], {}):  # not asked for, and nothing to note
            continue
        name = compared(receipt) if name == "tokens_compared" else name
        if name == "versions":
            value = ", ".join(f"{library} {number}" for library, number in value.items())
        elif isinstance(value, list):
            value = "; ".join(map(str, value))
        if isinstance(value, float):
            value = f"{value:,.0f}" if value >= 1000 else f"{value:.6g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        rows.append(f"| {plain(name.replace('_', ' '))} | {plain(value)} |")
    meaning = ("Largest and mean difference are between logits of the reloaded file and of the student in the dtype of "
               "the export; the difference from training is from the fake-quantized student in fp32.")
    return "\n".join([*rows, "", meaning])


def _allotted(folder: RunFolder) -> list[str]:
    """Section on the bits of each layer, if they were chosen within a budget; else nothing."""
    if not folder.allocation.exists():
        return []
    found = read_json(folder.allocation)
    layers: dict[str, list[str]] = {}
    for name, quantizer in found["chosen"]["choice"].items():
        layers.setdefault(f"{quantizer['bits']}", []).append(name)
    rows = [f"| {bits} | {len(names)} | {plain(', '.join(names[:4]))}{' ...' if len(names) > 4 else ''} |"
            for bits, names in sorted(layers.items(), reverse=True)]
    size = read_json(folder.receipt)["bytes_on_disk"]
    beside = sum(file.stat().st_size for file in folder.student.iterdir() if file.is_file()
                 and file.suffix != ".safetensors" and file != folder.receipt and file.name != CARD)
    fits = (f"{size:,} bytes of weights on disk, {'within' if size <= found['budget'] else 'ABOVE'} the budget of "
            f"{found['budget']:,}. {found['rest']:,} of them are not quantized, and at most {found.get('header', 0):,} "
            f"name the tensors. Beside them, not counted: tokenizer and configuration, {beside:,} bytes.")
    rise = [f"| {what} | {nats:.3g} | {bits:.3g} |" for what, nats, bits in rises(folder)]
    return ["## Bits\n", "| bits | layers | |", "|---:|---:|---|", *rows, "", fits + "\n",
            "Chosen for the least sum of what quantizing each layer alone does to the predictions on rows that "
            f"calibrated them; no choice has less by more than {found['chosen']['gap']:.3g} nats a token. A sum of "
            "rises says which choice is best, not how good it is.\n",
            *(["| rise | nats a token | bits a byte |", "|---|---:|---:|", *rise, ""] if rise else []),
            "Predictions are divergences from the student before it was quantized; measured is "
            "how many more bits the text needs. A byte of held-out text has "
            f"{found.get('tokens_per_byte', 0):.3g} tokens.\n",
            "![bits and bytes](allocation.png)\n"]


def _elsewhere(folder: RunFolder) -> list[str]:
    """Table of the receipts for other runtimes that exist at the time of this report."""
    rows = []
    for file in sorted(folder.path.glob("student-*/receipt.json")):
        found = read_json(file)
        of = "accuracy" if "accuracy" in found else "bits_per_byte"
        speed = found["rows_per_second" if of == "accuracy" else "tokens_per_second"]
        rows.append(f"| {code(file.parent.name + '/')} | {found['bytes_on_disk']:,} | {FIGURES[of].shown(found[of])} | "
                    f"{found['largest_difference']:.2g} | {found['argmax_agreement']:.1%} | {speed:,.0f} |")
    if not rows:
        return []
    return ["In other runtimes, each loaded by it in a fresh process:\n",
            f"| | bytes | {FIGURES[of].words} | largest logit difference | same "
            + ("class | rows/s |" if of == "accuracy" else "token | tokens/s |"),
            "|---|---:|---:|---:|---:|---:|", *rows, "", *_readers(folder)]


def _readers(folder: RunFolder) -> list[str]:
    """A line for each further runtime that has read those files."""
    lines = []
    for file in sorted(folder.path.glob("student-*/receipt-*.json")):
        found = read_json(file)
        lines.append(f"- {plain(found['reader'])} reads {code(file.parent.name + '/')} too: largest difference of "
                     f"{plain(found['compares'])} {found['largest_difference']:.2g} of {found['largest_value']:.3g}, "
                     f"same token at {found['argmax_agreement']:.1%} of {found['tokens_compared']} places in "
                     f"{found['tokens']:,} tokens")
    return [*lines, ""] if lines else []


def _ledger(plan: dict[str, Any], folder: RunFolder) -> str:
    """Planned resident memory, if the peak was not planned, and the memory measured over the whole run."""
    rows = []
    if plan.get("memory") is None:
        rows = ["| part | planned bytes per process |", "|---|---:|"]
        rows += [f"| {plain(name.replace('_', ' '))} | {count:,} |"
                 for name, count in plan["ledger"].items() if count]
    # Earlier versions kept what was measured in the plan.
    measured = read_json(folder.measured) if folder.measured.exists() else plan.get("measured")
    if measured:
        what = {"rss": "resident set of the process at its largest: libraries and data included, not comparable with "
                       "the plan on CPU", "cuda": "allocated by CUDA at its largest"}[measured["kind"]]
        rows += ["", f"Over the whole run: {measured['memory_peak']:,} bytes ({what})."]
    return "\n".join(rows)


def _memory(plan: dict[str, Any], lines: list[dict[str, Any]], folder: RunFolder) -> list[str]:
    """Planned and measured memory at the peak of a training step, and the plot of memory over the step."""
    memory = plan.get("memory")
    measured = next((line for line in reversed(lines) if "memory" in line), None)
    if memory is None or measured is None:
        return []
    found = measured["memory"]
    rows = [f"| at the peak ({plain(memory['moment'])}) | planned bytes per process |", "|---|---:|"]
    rows += [f"| {plain(name)} | {count:,} |"
             for name, count in sorted(memory["parts"].items(), key=lambda part: -part[1]) if count]
    rows += [f"| **planned peak** | {memory['peak']:,} |", f"| **measured peak**, step {measured['step']} | "
                                                           f"{found['peak']:,} |"]
    if found["reserved"] is not None:
        rows.append(f"| reserved by the allocator | {found['reserved']:,} |")
    if memory["budget"] is not None:
        above = found["peak"] - memory["budget"]
        rows.append(f"| **budget**{f', exceeded by {above:,} bytes' if above > 0 else ''} | {memory['budget']:,} |")
        rows += ["", f"Keeping everything would have needed {memory['keep_all']:,} bytes. Recomputation takes "
                     f"{memory['recomputed']:.1%} of the blocks' forward and backward time by prediction; a better "
                     f"schedule of the blocks could save at most {memory['gap']:.1%} of it."]
    if not any("rows" in line for line in lines):
        rows += ["", "Planned for a micro-batch whose rows hold several documents each and in which every token is "
                     "learned. Rows of one document need no mask, and tokens that are not learned no logits."]
    rows += [f"\nNot planned: {plain(text)}." for text in memory["unplanned"]]
    draw_step(Curve(numpy.array(memory["curve"]), tuple(map(tuple, memory["marks"]))),
              Curve(numpy.array(found["curve"]), tuple(map(tuple, found["marks"]))), memory["budget"],
              folder.path / "memory.png")
    return [*rows, "", "![memory over one step](memory.png)", "", "One micro-batch from its forward to the update, "
            "allocation by allocation; the square and the circle are the peaks."]
