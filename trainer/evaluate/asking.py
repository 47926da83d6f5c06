"""How a model is asked: the processes that share the work, what fits a forward pass, and prompts as token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from strategies.common.progress import report
from trainer.data.chat import ChatTemplate
from trainer.distributed.topology import Topology
from trainer.evaluate.task_files import Question, TaskRecords

T = TypeVar("T")
UNKNOWN_LENGTH = 2048  # tokens that a model is taken to read if its configuration does not say


class Sharers(Protocol):
    """The processes that share the records of a task: a run's `RankGroup`, or `OneProcess`."""

    topology: Topology
    device: torch.device

    @property
    def replica(self) -> int: ...
    def at(self, words: str) -> None: ...
    def asked_to_stop(self) -> bool: ...
    def gather_objects(self, values: list[Any]) -> list[Any]: ...


@dataclass
class OneProcess:
    """A process that shares the records with nobody."""

    device: torch.device
    topology: Topology = field(default_factory=Topology)
    replica: int = 0

    def at(self, words: str) -> None:
        """Nobody waits."""

    def asked_to_stop(self) -> bool:
        """A signal ends the process by itself."""
        return False

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """The values of this process."""
        return values


@dataclass
class Reader:
    """A model as it is asked, with its tokenizer.

    Attributes:
        called: the model as it is called: in training with its wrappers, on every process.
        plain: the model without wrappers, whose configuration and generation are used.
        tokenizer: its tokenizer.
        ranks: the processes that share the records.
        tokens: most tokens of a forward pass, padding included; a longer text is read by itself.
        autocast: the context of a forward pass.
    """

    called: nn.Module
    plain: nn.Module
    tokenizer: PreTrainedTokenizerBase
    ranks: Sharers
    tokens: int = 4096
    autocast: Callable[[], AbstractContextManager] = nullcontext

    @property
    def length(self) -> int:
        """Tokens that the model can read at once."""
        config = self.plain.config.get_text_config()
        found = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
        known = next((one for one in found if isinstance(one, int) and one > 0), None)
        own = self.tokenizer.model_max_length
        return known or (own if own < 10**9 else UNKNOWN_LENGTH)

    def start_of(self, text: str) -> list[int]:
        """The token that this tokenizer begins a text with, unless it does not, or the text has it already."""
        bos = self.tokenizer.bos_token_id
        lacks = bos is not None and not text.startswith(self.tokenizer.bos_token)
        return [bos] if lacks and self.tokenizer("")["input_ids"][:1] == [bos] else []

    @property
    def before(self) -> int:
        """The token that stands before a text of which the first token counts, too."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def apart(self) -> bool:
        """Whether each text is read by itself: rotary frequencies that depend on the longest text of a batch do so."""
        return any("longrope" in str(getattr(module, "rope_type", "")) for module in self.plain.modules())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text alone, without special tokens that the tokenizer would add."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class Prompter:
    """Writes the questions of a task as texts for a model, with their examples, as a chat if the task says so.

    Args:
        records: the task.
        tokenizer: has the chat template.
        key: key of the task in the experiment, for messages.

    Raises:
        UserError: the tokenizer has no chat template that could write the chats.
    """

    def __init__(self, records: TaskRecords, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
        task = records.task
        self.task, self.shots = task, records.shots
        self.chat = ChatTemplate(tokenizer, f"{key}.chat", True, system=task.system) if task.chat else None
        self._begin = "".join(f"{shot.prompt}{task.separator}{shot.answer}\n\n" for shot in self.shots)

    def __call__(self, question: Question) -> str:
        """The text up to where the answer begins."""
        if self.chat is None:
            return self._begin + question.prompt
        said = [(role, text) for shot in self.shots for role, text in (("user", shot.prompt),
                                                                      ("assistant", shot.answer))]
        messages = [{"role": role, "content": text} for role, text in [*said, ("user", question.prompt)]]
        return self.chat.tokenizer.apply_chat_template(
            self.chat.shape.fit(self.chat.with_system(messages)), tokenize=False, add_generation_prompt=True)

    def start(self, reader: Reader, text: str) -> list[int]:
        """The token before a prompt; a chat has exactly the tokens of its template."""
        return [] if self.chat else reader.start_of(text)

    def ids(self, reader: Reader, question: Question) -> list[int]:
        """Token ids of a question."""
        text = self(question)
        return [*self.start(reader, text), *reader.encode(text)]

    @property
    def separator(self) -> str:
        """The text between a question and its answer."""
        return "" if self.chat else self.task.separator

    @property
    def closing(self) -> str:
        """What the chat template closes an answer with; empty without one."""
        return (self.chat.shape.closing or "").strip() if self.chat else ""


def batches_by_length(lengths: Sequence[int], tokens: int, apart: bool = False) -> list[list[int]]:
    """Indices in batches of texts of similar lengths, the longest first, so that too little memory shows at once.

    Args:
        lengths: tokens of each text.
        tokens: most tokens of a batch, padding included.
        apart: whether each text has a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and not apart and longest * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def shared(batches: Sequence[list[int]], do: Callable[[list[int]], list[T]], ranks: Sharers, what: str
           ) -> dict[int, T] | None:
    """Have the processes do batches in turns; every process gets all results, which do not depend on their number.

    Every process takes part in every round, as sharded weights need; one without a batch repeats another's.

    Args:
        do: gives the result of each index of a batch.
        what: name of the work, for progress and for messages about a process that is missing.

    Returns:
        index -> result, or None if a process received a stop signal.
    """
    found: dict[int, T] = {}
    replicas = ranks.topology.data_parallel
    for begin in range(0, len(batches), replicas):
        ranks.at(f"{what}, batch {begin + 1} of {len(batches)}")
        report(what, begin, len(batches))
        if ranks.asked_to_stop():
            return None
        own = begin + ranks.replica
        done = do(batches[own if own < len(batches) else begin])
        if own < len(batches):
            found |= dict(zip(batches[own], done, strict=True))
    ranks.at(f"{what}, all results")
    return {index: value for part in ranks.gather_objects([found]) for index, value in part.items()}
