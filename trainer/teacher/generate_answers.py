"""`limbeck generate`: a teacher answers prompts once, and its answers become a data set for students."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from strategies.common.progress import report
from strategies.distillation.sequence_level import Decoding, decode_answers
from trainer import __version__
from trainer.data.encoding import Encoder
from trainer.data.provenance import DATA_FILE, PROVENANCE, described, name_of, said_of
from trainer.data.tokenizers import load_tokenizer
from trainer.errors import RunFailed, UserError, error_context
from trainer.experiment.data_nodes import Data
from trainer.experiment.load import mistakes
from trainer.experiment.model_nodes import Teacher
from trainer.models.build import DTYPES, load_frozen
from trainer.models.configs import teacher_config
from trainer.run.working import working
from trainer.teacher.answer_folder import Answer, AnswerFolder
from trainer.teacher.prompts import Prompt, check_lengths, digest_of, fields_of, read_prompts

MOST_PARTS = 2000  # files that the work is cut into; a part is at least one batch
NAMED = {"teacher.path": "TEACHER", "data.tokenizer.path": "TEACHER", "data.path": "--prompts",
         "data.messages": "--messages", "data.prompt": "--prompt", "data.response": "--prompt", "data.text": "--text",
         "data.tools": "--tools", "data.system": "--system", "data.split": "--split", "data.keys": "--messages",
         "data.roles": "--messages", "system": "--system", "tools": "--tools", "teacher.architecture": "TEACHER"}
NAMED_WORDS = re.compile(r"`?((?:data|teacher)\.[a-z_.]+)`?")
LIBRARIES = ("torch", "transformers", "tokenizers")
TAIL = 16  # tokens of the prompt that an answer is decoded after, since some tokenizers strip what a text begins with


@dataclass(frozen=True)
class Generation:
    """What is to be generated.

    Attributes:
        teacher: a model with a `path`; its dtype is used only if it is given.
        prompts: path of the prompts, as `data.path`.
        folder: where the data set goes.
        decoding: how answers are decoded.
        kind, field: what the records are (messages, prompt or text), and the field with it; see `fields_of`.
        tools: field with the tools of conversations.
        system: system prompt of conversations without one.
        split: split of a hub data set.
        limit: at most this many prompts; None for all.
        first_tokens: of plain texts, how many tokens of each are the prompt; None for all.
        batch_size: sequences that are decoded at a time.
        seed: of the samples.
        unfinished: whether answers that were cut off are kept; None keeps those that go on with plain texts.
    """

    teacher: Teacher
    prompts: str
    folder: Path
    decoding: Decoding = Decoding()
    kind: str | None = None
    field: str | None = None
    tools: str | None = None
    system: str | None = None
    split: str = "train"
    limit: int | None = None
    first_tokens: int | None = None
    batch_size: int = 16
    seed: int = 0
    unfinished: Literal["keep", "drop"] | None = None


@dataclass(frozen=True)
class _Work:
    """A generation with all that it needs but the weights.

    Attributes:
        batches: indices of prompts, the longest first, so that too little memory shows at once.
        each: batches in a part.
    """

    asked: Generation
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    prompts: list[Prompt]
    batches: list[list[int]]
    each: int

    @property
    def parts(self) -> int:
        return -(-len(self.batches) // self.each)

    @property
    def keeps_unfinished(self) -> bool:
        return (self.asked.unfinished or ("keep" if "text" in self.prompts[0].record else "drop")) == "keep"


def generate(asked: Generation) -> str:
    """Let a teacher answer prompts, and return a line on the data set of its answers.

    Several processes, of one launcher or not, may work on one folder. After a stop or a kill the same call goes on.

    Raises:
        UserError: a mistake in the prompts, the settings or the folder; nothing has been generated then.
        RunFailed: the memory of the device does not suffice for a batch.
    """
    folder = AnswerFolder(asked.folder)
    folder.check()
    with working("generate", f"reading {name_of(asked.prompts)}"), \
            tempfile.TemporaryDirectory(prefix="limbeck-") as cache:  # several processes read at a time
        work = _prepared(asked, Path(cache))
    with working("generate", "hashing the teacher's weights"):
        identity = _identity(work)
    if folder.begin(identity):
        folder.clean()
        return f"{asked.folder} is finished: {described(folder.found)}"
    if folder.done < work.parts:
        _make_parts(work, folder)
    with folder.merging() as mine:
        if mine and folder.done < work.parts:
            return f"{asked.folder}: other processes are at the rest, and the last of them puts it together"
        if mine:
            _finish(work, folder, identity)
    folder.clean()
    return f"{asked.folder}: {described(folder.found)}{_left_out(folder.found)}"


def _prepared(asked: Generation, cache: Path) -> _Work:
    config = teacher_config(asked.teacher, None)
    tokenizer = load_tokenizer("teacher.path", asked.teacher.path, asked.teacher.revision)
    data = fields_of(asked.prompts, asked.kind, asked.field, cache, tools=asked.tools, system=asked.system,
                     split=asked.split, max_documents=asked.limit)
    prompts, encoder = read_prompts(data, tokenizer, cache, asked.first_tokens)
    check_lengths(prompts, config, asked.decoding.new_tokens)
    order = sorted(range(len(prompts)), key=lambda at: (-len(prompts[at].ids), at))
    size = max(1, asked.batch_size // asked.decoding.width)
    batches = [order[at:at + size] for at in range(0, len(order), size)]
    return _Work(asked, config, tokenizer, encoder, prompts, batches, -(-len(batches) // MOST_PARTS))


def _identity(work: _Work) -> dict[str, Any]:
    """What the answers depend on, as plain data."""
    asked, first = work.asked, work.prompts[0].record
    commit = getattr(work.config, "_commit_hash", None)
    return {
        "teacher": {"path": asked.teacher.path, "commit": commit,
                    "weights": None if commit else _weights_digest(Path(asked.teacher.path)),
                    "dtype": _dtype(work)},
        "prompts": {"path": asked.prompts, "count": len(work.prompts), "sha256": digest_of(work.prompts),
                    "as": "messages" if "messages" in first else "text" if "text" in first else "prompt",
                    "by_template": work.encoder.chat is not None, "system": asked.system,
                    "first_tokens": asked.first_tokens},
        "decoding": {**asdict(asked.decoding), "seed": asked.seed, "batch_size": asked.batch_size,
                     "unfinished": "keep" if work.keeps_unfinished else "drop"}}


def _dtype(work: _Work) -> str:
    """The dtype of the weights: as asked, or as they are stored."""
    if "dtype" in work.asked.teacher.model_fields_set:
        return work.asked.teacher.dtype
    stored = getattr(work.config, "dtype", None)
    return next((name for name, dtype in DTYPES.items() if dtype == stored), "float32")


def _weights_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of a folder's weight files."""
    known = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            known.update(f"{file.name} {hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return known.hexdigest()


def decoding_of(options: Namespace) -> Decoding:
    """How answers are decoded, by the options of the command line.

    Raises:
        UserError: a number is out of range, or does not go with another.
    """
    for name in ("new_tokens", "batch_size", "limit", "first_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}", "this is a number from 1 on", value=value,
                            way_out="give one, or leave it out")
    with error_context("", way_out="see limbeck generate --help"):
        return Decoding(options.new_tokens, options.temperature, options.top_p, options.beams, options.answers)


@contextmanager
def named_options() -> Iterator[None]:
    """Name options of the command line in errors that name keys of an experiment."""
    try:
        with _by_pydantic():
            yield
    except UserError as error:
        if error.key in ("data.keys", "data.roles"):
            error.way_out = f"rename them in the records ({error.way_out.removeprefix('add to data: ')})"
        error.key = NAMED.get(error.key, error.key)
        error.way_out = NAMED_WORDS.sub(lambda word: NAMED.get(word[1], word[0]), error.way_out)
        raise


@contextmanager
def _by_pydantic() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise mistakes(error, Data)[0] from error


# ---- the work

def _make_parts(work: _Work, folder: AnswerFolder) -> None:
    """Generate the parts that no process has made or is making."""
    device = _device()
    with working("generate", "loading the teacher"):
        teacher = work.asked.teacher.model_copy(update={"dtype": _dtype(work)})
        model = load_frozen(teacher, "teacher", work.config, DTYPES[teacher.dtype]).to(device)
    with working("generate", f"answering {len(work.prompts):,} prompts, {said_of(asdict(work.asked.decoding))}",
                 at_once=True):
        for number in range(work.parts):
            done = folder.done * work.each * len(work.batches[0])
            report("prompts", min(done, len(work.prompts)), len(work.prompts))
            with folder.claimed(number) as mine:
                if mine:
                    begin = number * work.each
                    folder.write(number, [answer for batch in work.batches[begin:begin + work.each]
                                          for answer in _answers(work, model, batch)])


def _device() -> torch.device:
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else \
        torch.device("cpu")


def _answers(work: _Work, model: nn.Module, batch: Sequence[int]) -> list[Answer]:
    ends = _ends(work, model)
    seeds = [f"{work.asked.seed} {at}" for at in batch]
    try:
        found = decode_answers(model, [work.prompts[at].ids for at in batch], work.asked.decoding, ends=ends,
                               padding=work.tokenizer.pad_token_id, seeds=seeds)
    except torch.OutOfMemoryError as error:
        raise RunFailed(f"the memory of the device does not suffice for {work.asked.batch_size} sequences at a time\n"
                        f"  -> --batch-size {max(1, work.asked.batch_size // 2)}, in a new folder if this one has "
                        "answers already; or fewer --new-tokens") from error
    return [_answer(work, at, ids, ends) for at, answers in zip(batch, found, strict=True) for ids in answers]


def _ends(work: _Work, model: nn.Module) -> set[int]:
    """Tokens that end an answer: those of the model and its tokenizer, and the one that closes a turn of a chat."""
    own = (model.generation_config or GenerationConfig()).eos_token_id
    closing = None if work.encoder.chat is None else work.encoder.chat.end
    return {one for one in (*(own if isinstance(own, list) else [own]), work.tokenizer.eos_token_id, closing)
            if one is not None}


def _answer(work: _Work, prompt: int, ids: list[int], ends: set[int]) -> Answer:
    ended = bool(ids) and ids[-1] in ends
    said = ids[:-1] if ended else ids
    before = work.prompts[prompt].ids[-TAIL:]
    head, whole = (work.tokenizer.decode(one, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                   for one in (before, before + said))
    text = whole[len(head):] if whole.startswith(head) else work.tokenizer.decode(
        said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if not ended:
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the last token may be a part of a character
    return Answer(prompt, text, len(ids), ended, bool(set(said) & set(work.tokenizer.all_special_ids)))


# ---- the data set

def _finish(work: _Work, folder: AnswerFolder, identity: dict[str, Any]) -> None:
    """Put the parts together."""
    answers = folder.answers(work.parts)
    kept = [one for one in answers if not one.is_empty and (one.ended or work.keeps_unfinished)]
    if not kept:
        unfinished = sum(not one.ended for one in answers)
        raise RunFailed(f"no answer is left: {unfinished:,} of {len(answers):,} were cut off at "
                        f"{work.asked.decoding.new_tokens:,} tokens, the others are empty\n"
                        "  -> --unfinished keep takes them as they are; or more --new-tokens, in a new folder")
    counts = {"answers": len(answers), "written": len(kept), "empty": sum(one.is_empty for one in answers),
              "cut_off": sum(not one.ended for one in answers), "tokens": sum(one.tokens for one in answers),
              "with_special_tokens": sum(one.special for one in answers),
              "prompts_without_answer": len(work.prompts) - len({one.prompt for one in kept})}
    more = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "counts": counts,
            "versions": {"limbeck": __version__, **{name: version(name) for name in LIBRARIES}}}
    folder.finish([work.prompts[one.prompt].with_answer(one.text) for one in kept],
                  _card(work, {**identity, **more}), more)


def _left_out(found: dict[str, Any]) -> str:
    """A line on answers that are not in the data set, with what would keep those that were cut off; "" without any."""
    counts, decoding = found["counts"], found["decoding"]
    left_out = counts["answers"] - counts["written"]
    if not left_out:
        return ""
    cut = left_out - counts["empty"]
    what = [f"{cut:,} were cut off at {decoding['new_tokens']:,} tokens"] * bool(cut) + \
        [f"{counts['empty']:,} are empty"] * bool(counts["empty"])
    return f"\n  {left_out:,} more are left out: {', '.join(what)}" + (
        "\n  -> more --new-tokens let them end, and --unfinished keep takes them as they are; both in a new folder"
        if cut else "")


def _card(work: _Work, found: dict[str, Any]) -> str:
    """The data set's card, as the hub reads it."""
    counts = Counter(found["counts"])
    fields = {"messages": "messages: messages", "prompt": "prompt: prompt, response: response", "text": "text: text"}[
        found["prompts"]["as"]]
    left_out = counts["answers"] - counts["written"]
    return "\n".join([
        "---", "configs:", "- config_name: default", "  data_files:", "  - split: train", f"    path: {DATA_FILE}",
        "task_categories:", "- text-generation", "tags:", "- synthetic", "- distillation", "- limbeck", "---", "",
        f"# Answers of {name_of(found['teacher']['path'])}", "",
        f"{described(found)}.", "",
        f"Of {counts['answers']:,} answers with {counts['tokens']:,} tokens {left_out:,} are left out: "
        f"{counts['empty']:,} empty, {counts['cut_off']:,} cut off at the limit"
        f"{' (kept)' if found['decoding']['unfinished'] == 'keep' else ''}. `{PROVENANCE}` has all settings, versions "
        "and digests.", "",
        "```yaml", f"data: {{path: THIS_FOLDER, {fields}}}", "```", "",
        "The license of the teacher may say what its answers may be used for.", ""])
