"""What a report says of a classifier: accuracy, F1, calibration, and which classes it takes for which."""

from __future__ import annotations

from typing import Any

from trainer.run.folder import RunFolder, read_json
from trainer.run.held_out import FIGURES
from trainer.run.markdown import code, plain, sentence
from trainer.run.metrics import readable
from trainer.run.quantization_loss import rounding_cost
from trainer.run.report_plots import ordered

MOST = 5  # pairs of classes that are taken for each other, in the report
ABOUT_CLASSES = (
    "Accuracy and the mean of the classes' F1 on held-out rows, higher is better; calibration error is by how much "
    "confidence and accuracy differ, in 15 intervals of confidence (Guo et al. 2017); bytes of the weight files; rows "
    "per second of a forward pass. Each model was loaded by `transformers` in the same fresh process. Integer weights "
    "are unpacked to floating point by that runtime, so packing makes a file smaller, not faster.\n")


def classes_of(folder: RunFolder) -> list[str]:
    """Names of the classes in the exported configuration."""
    names = read_json(folder.student / "config.json")["id2label"]
    return [str(names[key]) for key in sorted(names, key=int)]


def classifier_verdict(found: dict[str, Any], receipt: dict[str, Any], folder: RunFolder) -> str:
    """The result of a run in a few sentences."""
    student, size = found["student"], readable(receipt["bytes_on_disk"])
    share = FIGURES["accuracy"].shown
    lines = [f"The student takes {size} on disk and is right in {share(student['accuracy'])} of {student['rows']:,} "
             f"held-out rows (macro F1 {share(student['macro_f1'])}, calibration error "
             f"{share(student['calibration_error'])})."]
    if (cost := rounding_cost(folder)) is not None:
        lines.append(f"{sentence(str(cost))}.")
    if "teacher" in found:
        ratio = found["teacher"]["bytes_on_disk"] / receipt["bytes_on_disk"]
        lines.append(f"It is {ratio:.1f} times smaller than its teacher, which is right in "
                     f"{share(found['teacher']['accuracy'])}.")
    if "control" in found:
        gap = 100 * (student["accuracy"] - found["control"]["accuracy"])
        lines.append(f"The same student, trained from the same start on the same rows by cross-entropy alone, is right "
                     f"in {share(found['control']['accuracy'])}: the teacher's help "
                     + (f"gained {gap:.2f} points" if gap > 0 else f"cost {-gap:.2f} points") + ", in this one run.")
    return " ".join(lines)


def classifier_models(found: dict[str, Any], meaning: dict[str, str]) -> str:
    """Table of the models."""
    rows = ["| model | | accuracy | macro F1 | calibration error | bytes | parameters | rows/s |",
            "|---|---|---:|---:|---:|---:|---:|---:|"]
    for name in ordered(found):
        entry = found[name]
        figures = " | ".join(FIGURES[one].shown(entry[one]) for one in ("accuracy", "macro_f1", "calibration_error"))
        rows.append(f"| {name} | {meaning[name]} | {figures} | {entry['bytes_on_disk']:,} | {entry['parameters']:,} | "
                    f"{entry['rows_per_second']:,.0f} |")
    return "\n".join(rows)


def confusion_section(found: dict[str, Any], folder: RunFolder) -> list[str]:
    """The picture of the student's answers, and the classes that it takes for others most often."""
    names, table = classes_of(folder), found["student"]["confusion"]
    pairs = sorted(((count, row, column) for row, counts in enumerate(table) for column, count in enumerate(counts)
                    if count and row != column), key=lambda one: (-one[0], one[1:]))[:MOST]
    said = [f"- {code(names[row])} for {code(names[column])}, {count} times of {sum(table[row])}"
            for count, row, column in pairs]
    return ["![answers by true class](confusion.png)\n",
            *(["Most often it takes\n", *said, ""] if said else [f"{plain('It makes no mistake on these rows.')}\n"])]
