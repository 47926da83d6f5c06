"""The classes of a data set: their names, in order, and the number of each record's class."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import datasets

from strategies.distillation.losses.tiled_loss import IGNORED
from trainer.data.image_files import VERSION
from trainer.data.missing_fields import no_such_field
from trainer.data.sources import Documents
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data

SHOWN = 8  # class names in a message


def classes_of(data: Data, documents: Documents) -> tuple[str, ...]:
    """The names of all classes in their order: as given, as the data set names them, or the sorted labels.

    Args:
        documents: the training records.

    Raises:
        UserError: a label is missing, or there are fewer than two classes.
    """
    named = _named(documents, data)
    found = set(_labels(documents, data, named, "data.path"))
    if data.class_names is not None:
        names = data.class_names
    elif named is not None:
        names = tuple(named)
    else:
        numbers = all(label.isdecimal() for label in found)
        names = tuple(sorted(found, key=lambda label: (int(label), label) if numbers else (0, label)))
    if len(found) < 2 and VERSION in (documents.column_names or ()) and os.path.isdir(data.path):
        raise UserError("data.path", f"all images are in the folder {next(iter(found))!r}, and each folder is a class: "
                        "there is nothing to tell apart", value=data.path,
                        way_out="put the images of at least two classes into a folder each")
    if len(found) < 2:
        raise UserError("data.label", "the training data has one class only, "
                        f"{next(iter(found))!r}: there is nothing to tell apart", value=data.label,
                        way_out="name data with at least two classes, or another field")
    return names


class ClassNumbers:
    """Turns the labels of records into class numbers from 0 on.

    Args:
        data: names the field of the label.
        documents: the records, whose features may name the classes.
        classes: names of all classes in their order.
        key: key of the experiment that names these records.
    """

    def __init__(self, data: Data, documents: Documents, classes: Sequence[str], key: str) -> None:
        self.data, self.key, self.classes = data, key, classes
        self.named = _named(documents, data)
        self._numbers = {name: number for number, name in enumerate(classes)}
        self._numbered = data.class_names is not None and not any(name.isdecimal() for name in classes)

    def __call__(self, label: Any) -> int:
        """The number of a class by the label of a record.

        Raises:
            UserError: there is no label, or no class of this name.
        """
        name = _name(label, self.data, self.named, self.key)
        if name in self._numbers:
            return self._numbers[name]
        if self._numbered and name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        raise self._unknown(name)

    def _unknown(self, name: str) -> UserError:
        near = difflib.get_close_matches(name, self.classes, 1)
        meant = f"did you mean {near[0]!r}? Mend" if near else "mend"
        problem = f"{_whose(self.key)} has the label {name!r}, which"
        if self.data.class_names is not None:
            return UserError("data.class_names", f"{problem} is none of these", value=list(self.classes[:SHOWN]),
                             way_out=f"{meant} the record, or add the class")
        shown = ", ".join(self.classes[:SHOWN]) + (", ..." if len(self.classes) > SHOWN else "")
        return UserError(self.key, f"{problem} no training record has: {shown}", value=name,
                         way_out=f"{meant} the record, or name all classes in data.class_names")

    def of_words(self, labels: Sequence[Any]) -> list[int]:
        """The number of each word's class; a word without one (null, or -100) is left out of the loss."""
        return [IGNORED if label is None or label in (IGNORED, str(IGNORED)) else self(label) for label in labels]


def _named(documents: Documents, data: Data) -> list[str] | None:
    """The class names that a data set brings along; None without."""
    feature: Any = (documents.features or {}).get(data.label)
    if data.label not in (documents.features or {data.label: None}):
        raise no_such_field("label", data.label, dict.fromkeys(documents.column_names or []))
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _labels(documents: Documents, data: Data, named: list[str] | None, key: str) -> Iterable[str]:
    """The name of each record's class, of each word where these have one."""
    for label in documents.select_columns([data.label])[:][data.label]:
        if data.task != "token_classification":
            yield _name(label, data, named, key)
            continue
        for one in label or ():
            if one is not None and one not in (IGNORED, str(IGNORED)):
                yield _name(one, data, named, key)


def _whose(key: str) -> str:
    return "a held-out record" if "validation" in key else "a training record"


def _name(label: Any, data: Data, named: list[str] | None, key: str) -> str:
    """The name of a class by the label of a record."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if data.class_names is not None and str(label) in data.class_names:
        return str(label)
    if not isinstance(label, (str, int)) or label == "" or str(label).startswith("-") and _is_number(label):
        raise _no_class(label, data, key)
    if isinstance(label, (str, bool)) or named is None:
        return str(label)
    if label >= len(named):
        raise UserError("data.label", f"{_whose(key)} has class {label}, and the data set names {len(named)}",
                        value=data.label, way_out="mend the record")
    return named[label]


def _no_class(label: Any, data: Data, key: str) -> UserError:
    number = _is_number(label)
    found = f"no label, but {label}," if number else "no label" if label in (None, "") else repr(label)[:60]
    return UserError("data.label", f"{_whose(key)} has {found} where the name or number of a class is expected",
                     value=data.label, way_out=f"remove it from {key}" + (
                         ", as test sets of the hub have -1 for labels that are kept secret; or list it with all other "
                         "classes in data.class_names" if number else ""))


def _is_number(label: Any) -> bool:
    try:
        return int(label) is not None
    except (TypeError, ValueError):
        return False
