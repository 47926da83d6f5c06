"""Experiment nodes for the training data: tokenizer, held-out set, fields and sequences."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from trainer.errors import UserError
from trainer.experiment.node import Node, PathName, Positive


class Tokenizer(Node):
    """The tokenizer; by default the teacher's own, or else the student's."""

    path: PathName | None = None
    """Hub id or local folder of a tokenizer."""
    revision: str | None = None
    """Branch, tag or commit of the hub id."""
    train_vocabulary: Annotated[int, Field(ge=257)] | None = None
    """Train a byte-level BPE tokenizer with this many tokens on the training text, once, and cache it."""

    @model_validator(mode="after")
    def _one_source(self) -> Tokenizer:
        if self.path and self.train_vocabulary:
            raise UserError("train_vocabulary", "the tokenizer is both loaded (`path`) and trained",
                            value=self.train_vocabulary, way_out="keep one of the two")
        return self


class Validation(Node):
    """The held-out set: documents that are never trained on, used to measure bits per byte."""

    path: PathName | None = None
    """Hub id, local folder, file or glob of held-out documents; null takes them from the training data."""
    split: str | None = None
    """Split of a hub data set to hold out, instead of a fraction of the training split."""
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Fraction of the training documents to hold out, when neither `path` nor `split` is given."""
    rows: Positive = 64
    """Maximum number of sequences per evaluation."""


class Data(Node):
    """The training data: where it is, which fields to read, and how it becomes token sequences."""

    path: PathName = "python-library"
    """Hub id, local folder, file or glob (text, JSONL, Parquet), or `python-library`, Python's own standard library."""
    name: str | None = None
    """Configuration name, for a hub data set that has several."""
    split: str = "train"
    """Split of a hub data set to train on."""
    revision: str | None = None
    """Branch, tag or commit of the hub id."""
    text: str = "text"
    """Field that holds plain text, 64 MiB at most, when neither `messages` nor `prompt` is given."""
    messages: str | None = None
    """Field that holds chat messages, a list of {role, content}; the loss covers only the assistant's messages."""
    tools: str | None = None
    """Field that holds the tools of a conversation, a list of JSON schemas; a record may have none."""
    keys: dict[str, str] = {}
    """Names of the message keys in the data, where they differ: for example {role: from, content: value}."""
    roles: dict[str, str] = {}
    """Mapping from role names in the data to standard ones, for example {human: user, gpt: assistant}."""
    prompt: str | None = None
    """Field that holds an instruction, masked out of the loss; a chat template or a line break ends it."""
    response: str | None = None
    """Field that holds the answer to `prompt`; the loss covers only the answer."""
    validation: Validation = Validation()
    """The held-out set."""
    max_documents: Positive | None = None
    """Use at most this many documents."""
    sequence_length: Annotated[int, Field(gt=1)] = 512
    """Tokens per sequence."""
    packing: bool = True
    """Pack several documents into a sequence, masked from each other; false: each gets its own padded sequence."""
    streaming: bool = False
    """Read, tokenize and pack during training, for data that does not fit in memory or on disk."""
    shuffle_buffer: Positive = 1000
    """Documents in the shuffle buffer when streaming; otherwise the whole data set is shuffled."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Data-loader processes; they do not change the order. A stream is read by the training process itself."""
    tokenizer: Tokenizer = Tokenizer()
    """The tokenizer."""

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
