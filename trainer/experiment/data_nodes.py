"""Experiment nodes for the training data: tokenizer, held-out set, sources, fields and sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from trainer.errors import UserError
from trainer.experiment.node import Node, PathName, Positive
from trainer.experiment.task_nodes import FIELDS, Images, TaskName, check_task


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




def _system(value: str | bool | None) -> str | bool | None:
    if value is True:
        raise UserError("", "true is no system prompt", value=True,
                        way_out="write the prompt, false for none, or null for what the chat template adds by itself")
    return value


System = Annotated[str | bool | None, AfterValidator(_system)]
KINDS = ("text", "messages", "prompt", "input_ids")  # keys that say what a record is
OF_KIND = {"text": ("text",), "messages": ("messages", "tools", "keys", "roles"), "prompt": ("prompt", "response"),
           "input_ids": ("input_ids", "labels")}
DEFAULT_PATH = "python-library"


class DataSource(Node):
    """One source of a mixture; what is not given here is as in `data`."""

    path: PathName
    """Hub id, local folder, file or glob, or `python-library`, as `data.path`."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of the trained tokens, relative to the other sources: weights 7 and 3 are 70% and 30%."""
    name: str | None = None
    """Configuration name, for a hub data set that has several."""
    split: str | None = None
    """Split to train on."""
    revision: str | None = None
    """Branch, tag or commit of the hub id."""
    text: str | None = None
    """Field that holds plain text."""
    messages: str | None = None
    """Field that holds chat messages."""
    tools: str | None = None
    """Field that holds the tools of a conversation."""
    keys: dict[str, str] | None = None
    """Names of the message keys in this source, where they differ."""
    roles: dict[str, str] | None = None
    """Mapping from role names in this source to standard ones."""
    prompt: str | None = None
    """Field that holds an instruction."""
    response: str | None = None
    """Field that holds the answer to `prompt`."""
    input_ids: str | None = None
    """Field that holds token ids."""
    labels: str | None = None
    """Field that holds the labels of `input_ids`."""
    system: System = None
    """System prompt of conversations without one; false: none."""
    max_documents: Positive | None = None
    """Use at most this many documents."""
    validation: Validation | None = None
    """The held-out set of this source."""


class Data(Node):
    """The training data: where it is, which fields to read, and how it becomes token sequences."""

    task: TaskName = "causal_lm"
    """What the models are for: text generation, or classes of whole texts, of the words of a text, or of images."""
    path: PathName = DEFAULT_PATH
    """Hub id, local folder, file or glob (text, JSONL, CSV, Parquet), or `python-library`: Python's own library."""
    sources: tuple[DataSource, ...] | None = None
    """Several sources in the place of `path`, mixed by weight: each has `path`, `weight` and what differs here."""
    name: str | None = None
    """Configuration name, for a hub data set that has several."""
    split: str = "train"
    """Split of a hub data set to train on."""
    revision: str | None = None
    """Branch, tag or commit of the hub id."""
    text: str = "text"
    """Field that holds plain text, 64 MiB at most, when none of `messages`, `prompt` and `input_ids` is given."""
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
    input_ids: str | None = None
    """Field that holds token ids of the tokenizer, for text that is tokenized already; nothing is added to them."""
    labels: str | None = None
    """Field that holds a label for each of `input_ids`: the same id, or -100 where it is not learned. Not shifted."""
    system: System = None
    """System prompt of conversations without one; null: what the chat template adds by itself; false: none."""
    text_pair: str | None = None
    """Field that holds a second text, for the classification of pairs."""
    words: str = "tokens"
    """Field that holds the list of words of a text, for `token_classification`."""
    image: str = "image"
    """Field that holds an image: a file beside the data's own, or, in Parquet, its bytes or an array."""
    label: str = "label"
    """Field that holds the class, a name or a number; for `token_classification` a list with one for each word."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in their order; null: as the data say, or else sorted. Numbered labels count from 0."""
    images: Images = Images()
    """How an image becomes the input of a model."""
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
        check_task(self)
        if self.sources is None:
            self._check_fields()
            return self
        if not self.sources:
            raise UserError("sources", "there is no source in this list", value=[],
                            way_out="write sources: [{path: PATH, weight: 1}, ...], or `path` alone")
        if self.path != DEFAULT_PATH:
            raise UserError("path", "the data is either one `path` or several `sources`", value=self.path,
                            way_out=f"keep one of the two, for example `sources: [{{path: {self.path}}}, ...]`")
        for number, part in enumerate(self.parts):
            with of_source(number, ""):
                part._check_fields()
        return self

    def _check_fields(self) -> None:
        """Raise `UserError` for keys that do not go together; each source of a mixture is checked by itself."""
        if (self.prompt is None) != (self.response is None):
            raise UserError("prompt" if self.prompt else "response", "`prompt` and `response` belong together",
                            way_out="name both fields, or neither")
        if self.messages and self.prompt:
            raise UserError("messages", "a record is either chat messages or a prompt and a response",
                            value=self.messages, way_out="remove `messages`, or `prompt` and `response`")
        if self.input_ids and (self.messages or self.prompt):
            other = "messages" if self.messages else "prompt"
            raise UserError("input_ids", f"a record is either token ids or {other}", value=self.input_ids,
                            way_out=f"remove `input_ids`, or `{other}`")
        for name in ("tools", "keys", "roles"):
            if getattr(self, name) and not self.messages:
                raise UserError(name, "this is for chat messages, and `messages` is not given",
                                value=getattr(self, name),
                                way_out=f"name their field in `messages`, or remove `{name}`")
        if self.labels and not self.input_ids:
            raise UserError("labels", "these are labels of token ids, and `input_ids` is not given", value=self.labels,
                            way_out="name the field of the ids in `input_ids`, or remove `labels`")
        if self.system is not None and not (self.messages or self.prompt):
            raise UserError("system", "only conversations have a system prompt", value=self.system,
                            way_out="name their field in `messages`, or `prompt` and `response`; or remove `system`")

    @property
    def parts(self) -> tuple[Data, ...]:
        """The data of each source, with what it takes over from this node; this node itself if there is only one."""
        return (self,) if self.sources is None else tuple(self._with(one) for one in self.sources)

    @property
    def is_language(self) -> bool:
        """Whether models predict the next token of text."""
        return self.task == "causal_lm"

    @property
    def packs(self) -> bool:
        """Whether several documents share a row; classified texts never do."""
        return self.packing and self.is_language

    @property
    def read(self) -> tuple[str, ...]:
        """For classification: the keys that name the fields to read."""
        return tuple(key for key in FIELDS[self.task] if getattr(self, key) is not None)

    @property
    def kind(self) -> str:
        """What a record is: one of `KINDS`."""
        return next((name for name in KINDS[1:] if getattr(self, name)), "text")

    @property
    def is_plain(self) -> bool:
        """Whether documents are used to their end, row by row; where only answers are learned, they end with a row."""
        return self.kind == "text" or self.kind == "input_ids" and not self.labels

    def _with(self, source: DataSource) -> Data:
        given = {name: value for name in DataSource.model_fields if name != "weight"
                 and (value := getattr(source, name)) is not None}
        if any(name in given for name in KINDS):  # another kind of record than that of `data`
            kinds = {name for name in KINDS if name in given}
            blank = {name: Data.model_fields[name].default for kind in KINDS if kind not in kinds
                     for name in OF_KIND[kind]}
            if not {"messages", "prompt"} & kinds:
                blank["system"] = None
            given = {**blank, **given}
        return self.model_copy(update={"sources": None, **given})


@contextmanager
def of_source(number: int | None, node: str = "data") -> Iterator[None]:
    """Name the keys of one source, counted from 0, in errors that name those of the node `data`; None: only one."""
    try:
        yield
    except UserError as error:
        name = error.key.removeprefix(f"{node}.")
        if number is not None and name.split(".")[0] in DataSource.model_fields:
            error.key = ".".join(part for part in (node, "sources", str(number), name) if part)
        raise


def source_names(data: Data) -> list[str]:
    """A name for each source: its path, with its configuration and its number where several have the same."""
    names = [part.path + (f" ({part.name})" if part.name else "") for part in data.parts]
    return [f"{name} #{number}" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]


def weights_of(data: Data) -> list[float]:
    """The share of tokens of each source; they sum to 1."""
    weights = [1.0] if data.sources is None else [one.weight for one in data.sources]
    return [weight / sum(weights) for weight in weights]
