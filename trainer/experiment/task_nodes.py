"""Experiment nodes for tasks other than text generation: what a record holds, and how its image becomes numbers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainer.errors import UserError
from trainer.experiment.node import Node, Positive

TaskName = Literal["causal_lm", "sequence_classification", "token_classification", "image_classification"]
# The keys of `data` that name the fields of a record, by task; those that a record may lack are None by default.
FIELDS = {"sequence_classification": ("text", "text_pair", "label"), "token_classification": ("words", "label"),
          "image_classification": ("image", "label")}
OWN = ("text_pair", "words", "image", "label", "class_names", "images")  # keys of `data` for these tasks alone
OF_LANGUAGE = ("sources", "messages", "tools", "keys", "roles", "prompt", "response", "input_ids", "labels", "system",
               "streaming")  # keys of `data` for language models alone
Fraction01 = Annotated[float, Field(gt=0, le=1)]


class Images(Node):
    """How an image becomes the input of a model."""

    size: Positive = 224
    """Height and width in pixels; images of another size are scaled to it, whatever their shape."""
    channels: Literal[1, 3] = 3
    """Channels: 3 for color, 1 for gray."""
    mean: tuple[float, ...] = (0.5,)
    """Mean to subtract from values between 0 and 1: one for all channels, or one for each."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)
    """Standard deviation to divide by, after that: one for all channels, or one for each."""
    flip: bool = False
    """Mirror half of the training images, left to right, in each epoch anew."""
    shift: Annotated[int, Field(ge=0)] = 0
    """Move training images by up to this many pixels in each direction, in each epoch anew; what comes in is black."""

    @model_validator(mode="after")
    def _per_channel(self) -> Images:
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise UserError(name, f"there are {self.channels} channels", value=list(getattr(self, name)),
                                way_out=f"give one number, or {self.channels}")
        if self.shift >= self.size:
            raise UserError("shift", f"an image of {self.size} pixels would be moved out of sight", value=self.shift,
                            way_out="use a few pixels, such as an eighth of `size`")
        return self


def check_task(data: Any) -> None:
    """Raise `UserError` for keys of the node `data` that do not belong to its task."""
    given = {name for name in (*OWN, *OF_LANGUAGE) if getattr(data, name) != type(data).model_fields[name].default}
    if data.task == "causal_lm":
        if foreign := next((name for name in OWN if name in given), None):
            near = "image_classification" if foreign == "images" else next(
                (task for task, keys in FIELDS.items() if foreign in keys), "sequence_classification")
            raise UserError(foreign, "this is for classification, and the task is causal_lm", value=_plain(
                getattr(data, foreign)), way_out=f"set `task: {near}`, or remove `{foreign}`")
        return
    if foreign := next((name for name in OF_LANGUAGE if name in given), None):
        raise UserError(foreign, f"this is for language models, and the task is {data.task}",
                        value=_plain(getattr(data, foreign)), way_out="name the field in `label`" if
                        foreign == "labels" else f"remove `{foreign}`, or set `task: causal_lm`")
    own = {*FIELDS[data.task], "class_names", *(("images",) if data.task == "image_classification" else ())}
    if foreign := next((name for name in OWN if name in given and name not in own), None):
        near = "image_classification" if foreign == "images" else next(
            task for task, keys in FIELDS.items() if foreign in keys)
        raise UserError(foreign, f"this is for {near}, and the task is {data.task}",
                        value=_plain(getattr(data, foreign)), way_out=f"remove `{foreign}`, or set `task: {near}`")
    names = data.class_names
    if names is not None and (len(names) < 2 or len(set(names)) < len(names)):
        raise UserError("class_names", "a classifier has at least two classes, each with a name of its own",
                        value=list(names), way_out="list each class once, or leave it out to take them from the data")


def _plain(value: object) -> object:
    return value.model_dump() if isinstance(value, Node) else value
