"""The nodes of the experiment tree that say what is trained on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from trainer.errors import UserError
from trainer.experiment.node import Node, PathName, Positive


class Tokenizer(Node):
    """How text becomes tokens. By default the teacher's own tokenizer, or else the student's."""

    path: PathName | None = None
    """Hub id or local folder of a tokenizer."""
    revision: str | None = None
    """Branch, tag or commit of the hub id."""
    train_vocabulary: Annotated[int, Field(ge=257)] | None = None
    """Train a byte-level BPE of this many tokens on the training text, once, and cache it."""

    @model_validator(mode="after")
    def _one_source(self) -> Tokenizer:
        if self.path and self.train_vocabulary:
            raise UserError("train_vocabulary", "the tokenizer is both loaded (`path`) and trained",
                            value=self.train_vocabulary, way_out="keep one of the two")
        return self


class Validation(Node):
    """Held-out documents, never trained on, that bits per byte is measured on."""

    path: PathName | None = None
    """Where they are; null takes them from the training data."""
    split: str | None = None
    """Split of a hub data set to hold out, instead of a share of the training split."""
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of training documents held out, when neither `path` nor `split` is given."""
    rows: Positive = 64
    """At most this many sequences are evaluated each time."""


class Data(Node):
    """The text that is trained on: where it is, which fields hold it, and how it becomes sequences."""

    path: PathName = "python-library"
    """Hub id, local folder, file or glob (text, JSONL, Parquet), or `python-library`: this interpreter's own source."""
    name: str | None = None
    """Configuration of a hub data set that has several."""
    split: str = "train"
    """Split of a hub data set that is trained on."""
    revision: str | None = None
    """Branch, tag or commit of the hub id."""
    text: str = "text"
    """Field that holds plain text, 64 MiB at most, when neither `messages` nor `prompt` is given."""
    messages: str | None = None
    """Field that holds chat messages, a list of {role, content}; only the assistant's are learned."""
    tools: str | None = None
    """Field that holds the tools of a conversation, a list of JSON schemas; a record may have none."""
    keys: dict[str, str] = {}
    """What the data calls the keys of a message, for example {role: from, content: value}."""
    roles: dict[str, str] = {}
    """What roles in the data mean, for example {human: user, gpt: assistant}."""
    prompt: str | None = None
    """Field that holds an instruction; it is read but not learned."""
    response: str | None = None
    """Field that holds the answer to `prompt`; only it is learned."""
    validation: Validation = Validation()
    """Held-out documents."""
    max_documents: Positive | None = None
    """Use only this many documents."""
    sequence_length: Annotated[int, Field(gt=1)] = 512
    """Tokens per sequence."""
    packing: bool = True
    """Put several documents into a sequence, blind to each other; false gives each its own padded sequence."""
    streaming: bool = False
    """Read, tokenize and pack while training, for data that does not fit in memory or on disk."""
    shuffle_buffer: Positive = 1000
    """Documents held for shuffling when streaming; otherwise the whole data set is shuffled."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that prepare batches (a stream is read by the training process); they do not change the order."""
    tokenizer: Tokenizer = Tokenizer()
    """How text becomes tokens."""

    @model_validator(mode="after")
    def _fields(self) -> Data:
        if (self.prompt is None) != (self.response is None):
            raise UserError("prompt" if self.prompt else "response", "`prompt` and `response` belong together",
                            way_out="name both fields, or neither")
        if self.messages and self.prompt:
            raise UserError("messages", "a record is either chat messages or a prompt and a response",
                            value=self.messages, way_out="remove `messages`, or `prompt` and `response`")
        for name in ("tools", "keys", "roles"):
            if getattr(self, name) and not self.messages:
                raise UserError(name, "this is for chat messages, and `messages` is not given",
                                value=getattr(self, name),
                                way_out=f"name their field in `messages`, or remove `{name}`")
        return self
