"""Load a tokenizer, or train one on the training data, and check it against the models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.data.messages import texts_of
from trainer.data.sources import fields
from trainer.errors import UserError, error_context
from trainer.experiment.data_nodes import Data
from trainer.experiment.data_nodes import Tokenizer as TokenizerSettings
from trainer.experiment.model_nodes import Student, Teacher
from trainer.model_files import check_files

Origin = tuple[str, str, str | None]  # key, path, revision

END = "<|endoftext|>"
ENCODER = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # special tokens of a tokenizer trained for an encoder
# A folder with any of these files has a tokenizer.
OF_A_TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
                  "spiece.model", "sentencepiece.bpe.model", "tekken.json", "special_tokens_map.json"}
TRAINING_DOCUMENTS = 2000  # enough text for a vocabulary; more would only take time


def tokenizer_origin(own: TokenizerSettings, loaded: Sequence[Origin]) -> Origin | None:
    """(key, path, revision) of the tokenizer to load, or None if one is to be trained.

    Args:
        own: the tokenizer node of the experiment.
        loaded: (key, path, revision) of the models that come with weights.

    Raises:
        UserError: a tokenizer is to be trained for a model with weights, or no model brings one and none is configured.
    """
    if own.path:
        return "data.tokenizer.path", own.path, own.revision
    if own.train_vocabulary:
        if loaded:
            raise UserError("data.tokenizer.train_vocabulary", f"{loaded[0][1]} was trained with its own tokenizer",
                            value=own.train_vocabulary, way_out="remove `train_vocabulary`")
        return None
    if loaded:  # a folder may have only weights
        return next((one for one in loaded[:-1] if own_tokenizer(*one[1:]) is not None), loaded[-1])
    raise UserError("data.tokenizer", "no model brings a tokenizer",
                    way_out="set `data.tokenizer.train_vocabulary: 2048`, or name one in `data.tokenizer.path`")


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of embedding rows that a tokenizer needs: ids may have gaps, so this can exceed its number of tokens."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def known_size(own: TokenizerSettings, loaded: Sequence[Origin]) -> int | None:
    """Embedding rows for the tokenizer that a run will use; None if unknown without reading data or using the network.

    A tokenizer that is trained may end up with fewer, if the text does not yield as many tokens.
    """
    if own.train_vocabulary:
        return own.train_vocabulary
    for path, revision in [(own.path, own.revision)] if own.path else [one[1:] for one in loaded]:
        try:
            return _local_size(path, revision, _stamp(path))
        except UserError:  # the error is reported when the tokenizer is needed
            continue
    return None


def apart_size(teacher: Teacher | None, student: Student, divergence: str) -> int | None:
    """Embedding rows for the teacher's own tokenizer, if `uld` compares it with a student that has another; else None.

    Also None if the tokenizer is not available locally.
    """
    if teacher is None or teacher.path is None or student.from_teacher is not None or divergence != "uld":
        return None
    try:
        return _local_size(teacher.path, teacher.revision, _stamp(teacher.path))
    except UserError:
        return None


@lru_cache(maxsize=16)
def _local_size(path: str, revision: str | None, stamp: tuple) -> int:
    """Embedding rows for a tokenizer that is there; read once in a process, because every study of a step asks."""
    return vocabulary_size(_loaded_tokenizer("data.tokenizer", path, revision, local_files_only=True))


def _stamp(path: str) -> tuple:
    """Changes whenever the files of a local tokenizer do."""
    found = [(name, (Path(path) / name).stat()) for name in sorted(OF_A_TOKENIZER) if (Path(path) / name).is_file()]
    return tuple((name, of.st_size, of.st_mtime_ns) for name, of in found)


def check_models(loaded: Sequence[Origin], tokenizer: PreTrainedTokenizerBase, divergence: str | None, layers: bool
                 ) -> None:
    """Raise `UserError` if a model with weights has a vocabulary that does not match the tokenizer.

    Vocabularies of the same size can belong to different model families, and training would then silently go wrong. A
    teacher may use other ids for the tokens of the same tokenizer, and another tokenizer if the divergence is `uld`.

    Args:
        loaded: (key, path, revision) of models with weights.
        tokenizer: the tokenizer in use.
        divergence: name of the divergence; None for classification, where both models read the same tokens.
        layers: whether the student starts from layers of its teacher, and so with its vocabulary.
    """
    ours = {number: token for token, number in tokenizer.get_vocab().items()}
    for key, path, revision in loaded:
        other = own_tokenizer(path, revision)
        if other is None:
            continue
        theirs = {number: token for token, number in other.get_vocab().items()}
        different = [number for number in sorted(ours) if theirs.get(number, ours[number]) != ours[number]]
        is_teacher = key == "teacher.path" and not layers or key.startswith("teacher.others.")
        if is_teacher and divergence is not None:
            _check_teacher(key, path, divergence, tokenizer, other)
        elif different:
            raise UserError(key, "this model has another vocabulary than the tokenizer in use; for example token "
                            f"{different[0]} is {theirs[different[0]]!r} to it and {ours[different[0]]!r} here",
                            value=path, way_out="choose a teacher, a student and a tokenizer of one family")


def own_tokenizer(path: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with a model; None for a folder that has only weights.

    Raises:
        UserError: the folder's tokenizer.json cannot be loaded.
    """
    folder = Path(path)
    if folder.is_dir() and not any(file.name in OF_A_TOKENIZER for file in folder.iterdir()):
        return None  # transformers would create a default one for the model type, with a vocabulary of a few tokens
    try:
        return _loaded_tokenizer("data.tokenizer", path, revision)
    except UserError:
        if (Path(path) / "tokenizer.json").exists():
            raise
        return None


def _check_teacher(key: str, path: str, name: str, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
                   ) -> None:
    from strategies.distillation.tokenizers.shared_vocabulary import same_tokenizer

    if name == "uld" or other.get_vocab() == tokenizer.get_vocab():
        return
    with error_context(key, value=path, way_out="name a folder with tokenizer.json"):
        same, why = same_tokenizer(tokenizer, other)
    if not same:
        raise UserError("objective.divergence.name", f"{'the teacher' if key == 'teacher.path' else path} has another "
                        f"tokenizer than the student: {why}",
                        value=name, way_out="use uld, which compares where both have read the same text, or a teacher "
                        "of the student's family")


def load_tokenizer(key: str, path: str, revision: str | None, writes: bool = True, **options: bool
                   ) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer; if it has no padding token, it pads with its end-of-sequence token.

    Args:
        writes: whether it is for a model that writes text, which has to end; a classifier only has to pad it.
    """
    tokenizer = _loaded_tokenizer(key, path, revision, **options)
    if not tokenizer.is_fast:
        raise UserError(key, "this tokenizer has no fast version, which label masks need", value=path,
                        way_out="name a folder with tokenizer.json in `data.tokenizer.path`")
    if tokenizer.eos_token_id is None and writes:
        raise UserError(key, "this tokenizer has no end-of-sequence token, so no text would ever end", value=path,
                        way_out="add `eos_token` to its tokenizer_config.json")
    if tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
        raise UserError(key, "this tokenizer has no padding token, so that no two texts fit into one batch", value=path,
                        way_out="add `pad_token` to its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _loaded_tokenizer(key: str, path: str, revision: str | None, **options: bool) -> PreTrainedTokenizerBase:
    check_files(path, key)
    try:  # if `trust_remote_code` is not set, transformers asks on the terminal whether to run a tokenizer's code
        return AutoTokenizer.from_pretrained(path, revision=revision or "main", use_fast=True, trust_remote_code=False,
                                             **options)
    except Exception as error:  # bad files raise all kinds of exceptions in transformers and tokenizers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(key, f"cannot load this tokenizer: {reason}", value=path,
                        way_out="name a hub id or a folder with tokenizer.json in `data.tokenizer.path`") from error


def train_tokenizer(sources: Sequence[tuple[Data, Iterable[dict[str, Any]]]], folder: Path) -> None:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016, on bytes as in GPT-2) and save it to `folder`.

    Args:
        sources: the sources of the text, each with its records.
        folder: where to save it.

    Raises:
        UserError: a source holds token ids, which belong to another tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END] if sources[0][0].is_language else list(ENCODER)
    trainer = trainers.BpeTrainer(vocab_size=sources[0][0].tokenizer.train_vocabulary, special_tokens=special,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(_texts(sources), trainer=trainer)
    if not sources[0][0].is_language:
        _of_encoder(tokenizer).save_pretrained(folder)
        return
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
                            ).save_pretrained(folder)


def _of_encoder(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with special tokens as BERT has them, which it writes around texts and pairs of texts."""
    pad, unknown, first, between, mask = ENCODER
    numbers = [(name, tokenizer.token_to_id(name)) for name in (first, between)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {between}", pair=f"{first} $A {between} $B:1 {between}:1", special_tokens=numbers)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, cls_token=first,
                                   sep_token=between, mask_token=mask)


def _texts(sources: Sequence[tuple[Data, Iterable[dict[str, Any]]]]) -> Iterator[str]:
    """Text of the first records of each source, equally many of each."""
    for data, documents in sources:
        if data.input_ids:
            raise UserError("data.tokenizer.train_vocabulary", "the data holds token ids of another tokenizer",
                            value=data.tokenizer.train_vocabulary,
                            way_out="name the tokenizer that made them in `data.tokenizer.path`")
        for record in islice(documents, TRAINING_DOCUMENTS // len(sources)):
            for name in fields(data):
                if not data.is_language and name == data.label:
                    continue
                if name == data.messages:
                    yield from texts_of(record, data)
                elif data.task == "token_classification":
                    yield " ".join(record[name])
                elif isinstance(record[name], str):
                    yield record[name]
