"""What each architecture goes through, by the product's own functions, in this process."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.architectures.tiny_models import ROW, Room
from benchmarks.architectures.verdicts import apart, judged, message, refused, right, verdict_of, wrong
from benchmarks.sharding.sharded_runs import fresh
from strategies.export.hf.transformers_folder import write_folder
from strategies.quantization.qat import quantized_layers
from trainer import preparation
from trainer.data.batches import Batch, example_batch, training_batches
from trainer.data.dataset import PreparedData, prepare_text
from trainer.distributed.launch import start
from trainer.early_checks import check_early
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data
from trainer.experiment.experiment import Experiment
from trainer.planning import plan
from trainer.run.folder import RunFolder
from trainer.run.metrics import console
from trainer.student.compare_student import logits_of
from trainer.student.export_student import write_for
from trainer.student.quantize_student import finalize_student
from trainer.training.loop import TrainLoop
from trainer.training.step_input import StepInputs

# Relative: of the loss; of the largest gradient, logit, byte. fp32 sums in another order lie below a tenth of them.
LOSS, GRADIENT, LOGITS, BYTES = 2e-5, 5e-4, 2e-5, 0.03
APART = {"packing": False}  # what is not about packing is not to be refused for it
LEFT = 0.05  # share of a quantized student's block weights that may stay in full precision without a word


def prepared(experiment: Experiment, text: PreparedData) -> TrainLoop:
    """What `train.py` makes of an experiment before the first step, refusals included."""
    fresh()
    how = preparation.Launched(*start(experiment))
    check_early(experiment, how.topology, how.plans)
    # Sums for the ledger and for the disk that no check is about.
    with replaced(plan, "_activations", lambda *_: None), replaced(preparation, "planned_bytes", lambda *_: 0):
        return preparation.prepare(experiment, experiment, RunFolder(experiment.folder), how, text)


@contextmanager
def replaced(module: Any, name: str, other: Any) -> Iterator[None]:
    """Within the context a module's name stands for something else."""
    before = getattr(module, name)
    setattr(module, name, other)
    try:
        yield
    finally:
        setattr(module, name, before)


def unplanned() -> AbstractContextManager[None]:
    """Memory is not planned in here, which would take most of the time of a check that is not about it."""
    return replaced(plan, "plan_step", lambda *_: None)


# ---- the loss, packed, padded and accumulated, and the memory of a step

class Steps:
    """A trainer on the model, prepared once for several checks; on packed rows where the product packs."""

    def __init__(self, room: Room, wanted: list[str]) -> None:
        whole = {"batch_size": len(list(room.documents())), "micro_batch": 8}
        self.asked = {"packed": room.experiment("packed"),
                      "padded": room.experiment("padded", data={"packing": False}, training=whole)}
        self.texts = {how: prepare_text(experiment) for how, experiment in self.asked.items()}
        self.refused: str | None = None
        try:
            self.trainer = prepared(self.asked["packed"], self.texts["packed"])
        except UserError as error:
            if error.key != "data.packing":
                raise
            self.refused = message(error)
            self.trainer = prepared(self.asked["padded"], self.texts["padded"])
        self.trainer.learning_rate = lambda step: 0.0  # weights stay as they are loaded
        self.documents = list(room.documents())
        self.loss, self.gradients = alone(room.plain(), self.documents)

    def take(self, how: str, rows: int, micro_batches: int) -> tuple[float, float]:
        """Differences of the loss and of the gradients of a step that sees every document once."""
        taken, update = {}, self.trainer._update

        def keeping(finite: bool) -> float:
            taken.update({_own(name): parameter.grad.detach().clone() for name, parameter
                          in self.trainer.unwrapped.named_parameters() if parameter.grad is not None})
            return update(finite)

        self.trainer._update = keeping
        try:
            record = one_step(self.trainer, batches(self.texts[how], rows), micro_batches)
        finally:
            self.trainer._update = update
        return (abs(record["loss"] / self.loss - 1) if record["loss"] is not None else float("inf"),
                gradients_apart(taken, self.gradients))


def one_step(trainer: TrainLoop, given: Iterator[Batch], micro_batches: int) -> dict[str, Any] | None:
    """A step on the next micro-batches, and no look at those after them."""
    trainer.plan = replace(trainer.plan, accumulation=micro_batches, steps=trainer.state.step + 1)
    return trainer.train_step(StepInputs(given, trainer.plan, trainer.ranks))


def batches(text: PreparedData, rows: int) -> Iterator[Batch]:
    """Micro-batches as the loop gets them."""
    return training_batches(text.train, seed=0, micro_batch=rows, replica=0, replicas=1, skip=0, workers=0, pin=False)


def filled(rows: int, packed: bool, documents: list[torch.Tensor]) -> Batch:
    """A micro-batch without padding, as a plan takes it to be: of two documents a row where they are packed."""
    batch = example_batch(Data(sequence_length=ROW, packing=packed), rows)
    text = torch.cat(documents)
    ids = text[torch.arange(rows * (ROW + 1)) % len(text)].view(rows, ROW + 1)
    return {**batch, "input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous(),
            "row": torch.arange(rows), "bytes": torch.ones(rows, dtype=torch.long)}


def alone(model: nn.Module, documents: list[torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean next-token loss, summed in float64, and its gradients, where a model sees each document by itself.

    Of what the architecture trains: transformers forgets, loading, which parameters are fixed.
    """
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    fixed = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    total, tokens = torch.zeros((), dtype=torch.float64), sum(len(document) - 1 for document in documents)
    for document in documents:
        logits = model(input_ids=document[None], use_cache=False).logits[0, :-1]
        nats = nn.functional.cross_entropy(logits.double(), document[1:], reduction="sum")
        (nats / tokens).backward()
        total += nats.detach()
    return float(total) / tokens, {_own(name): parameter.grad for name, parameter in model.named_parameters()
                                   if parameter.grad is not None and name not in fixed}


def _own(name: str) -> str:
    """A weight's name in a language model, also where it is a part of a multimodal one."""
    return name.replace("language_model.", "")


def gradients_apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference of gradients by name, one that is absent being zero, as a share of the largest."""
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    worst = 0.0
    for name in {*ours, *theirs}:
        one, other = ours.get(name), theirs.get(name)
        difference = one - other if one is not None and other is not None else one if other is None else other
        worst = max(worst, float(difference.abs().max()))
    return worst / largest if worst == worst else float("inf")


def check_loss(room: Room, steps: Steps) -> dict[str, Any]:
    """The loss of padded rows against each document alone, in transformers."""
    loss, gradient = steps.take("padded", 8, 1)
    return judged(loss <= LOSS and gradient <= GRADIENT, loss=loss, gradient=gradient, alone=steps.loss)


def check_packing(room: Room, steps: Steps) -> dict[str, Any]:
    """Packed rows, in one micro-batch and in two, against each document alone; padded ones where packing is refused."""
    ways = [("packed", 4, 1), ("packed", 2, 2)] if steps.refused is None else [("padded", 4, 2)]
    found = [steps.take(*way) for way in ways]
    loss, gradient = (max(differences) for differences in zip(*found, strict=True))
    holds = loss <= LOSS and gradient <= GRADIENT
    if steps.refused is not None and holds:
        return refused(steps.refused, loss=loss, gradient=gradient)
    return judged(holds, loss=loss, gradient=gradient)


def check_memory(room: Room, steps: Steps) -> dict[str, Any]:
    """The planned peak against that of a step in which optimizer state is there."""
    if steps.trainer.plan.memory is None:
        return refused("the step of this architecture cannot be planned")
    packed = steps.refused is None
    rows = steps.asked["packed" if packed else "padded"].training.micro_batch
    for _ in range(2):  # in the second one the optimizer's state is there
        _, found = steps.trainer.memory.measured(
            lambda: one_step(steps.trainer, iter([filled(rows, packed, steps.documents)]), 1))
    planned = steps.trainer.plan.memory.peak
    return judged(abs(planned / found.peak - 1) <= BYTES, planned=planned, measured=found.peak,
                  ratio=planned / found.peak)


# ---- a model that sees what comes after

def check_causal(room: Room) -> dict[str, Any]:
    """A model that sees what comes after is refused; where a flag makes it a decoder, the model without it is tried."""
    asked = {"path": str(room.without_flag() or room.model)}
    document = next(room.documents())[None]
    try:
        model = AutoModelForCausalLM.from_pretrained(asked["path"], dtype=torch.float32).eval()
    except AssertionError:  # Reformer itself cannot be made without the flag
        asked = {"path": str(room.model)}
        model = room.plain()
    with torch.no_grad():
        whole, part = (model(input_ids=ids, use_cache=False).logits[:, :6] for ids in (document, document[:, :6]))
    if apart(part, whole) <= LOGITS:
        return right()
    experiment = room.experiment("causal", student=asked, data=APART)
    with unplanned():
        prepared(experiment, prepare_text(experiment))
    return wrong("it predicts from what comes after, and is trained", difference=apart(part, whole))


# ---- layers of a teacher

def check_layers(room: Room) -> dict[str, Any]:
    """A student of some of its teacher's layers against the teacher whose other blocks are skipped."""
    reference = room.plain()
    count = getattr(reference.config.get_text_config(), "num_hidden_layers", 4)
    kept = [1, count - 1] if count > 2 else [0]
    asked = room.experiment("layers", student={"from_teacher": kept}, teacher={"path": str(room.model)}, data=APART)
    with unplanned():
        trainer = prepared(asked, prepare_text(asked))
    document = next(room.documents())[None]
    blocks = next(one for name, one in reference.named_modules() if isinstance(one, nn.ModuleList)
                  and len(one) == count and not re.search("vision|image|audio", name))  # as many layers as these have
    for number, block in enumerate(blocks):
        if number not in kept:
            block.register_forward_hook(_skip, with_kwargs=True)
    with torch.no_grad():
        theirs = reference(input_ids=document, use_cache=False).logits
        ours = trainer.unwrapped.eval()(input_ids=document, use_cache=False).logits
    difference = apart(ours, theirs)
    return judged(difference <= LOGITS, difference=difference, kept=kept)


def _skip(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """A block's input in place of its output."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])


# ---- 4 bits, export, reload

class Quantized:
    """A student trained with 4-bit weights, exported; what the run said."""

    def __init__(self, room: Room, wanted: list[str]) -> None:
        student = {"path": str(room.model), "quantization": {"bits": 4}}
        self.runtimes, self.refused = [], {}
        for runtime in {"onnx"} & {*wanted}:
            asked = room.experiment("asked", student=student, export={"to": [runtime]}, data=APART)
            try:
                check_early(asked)
                self.runtimes.append(runtime)
            except UserError as error:
                if error.key != "export.to":
                    raise
                self.refused[runtime] = message(error)
        while True:
            self.asked = room.experiment(f"quantized{len(self.refused)}", student=student,
                                         export={"to": self.runtimes}, data=APART)
            self.text = prepare_text(self.asked)
            try:
                with unplanned(), console.capture() as said:
                    self.trainer = prepared(self.asked, self.text)
                break
            except UserError as error:
                if error.key != "export.to" or not self.runtimes:
                    raise
                self.refused[self.runtimes.pop()] = message(error)
        with console.capture() as more:
            self.trainer.train()
            self.model = finalize_student(self.asked, self.trainer.whole(), self.text, self.trainer.folder)
            write_folder(self.trainer.folder.student, self.model, self.text.tokenizer)
        self.said = said.get() + more.get()

    def left(self) -> float:
        """Share of the weights of at least two dimensions, but embeddings and heads, that stay in full precision."""
        packed = {id(layer.weight) for _, layer in quantized_layers(self.model)}
        outer = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Embedding)}
        head = self.model.get_output_embeddings()
        outer |= set() if head is None else {id(head.weight)}
        inner = [parameter for parameter in self.model.parameters()
                 if parameter.squeeze().ndim > 1 and id(parameter) not in outer]
        whole = sum(parameter.numel() for parameter in inner)
        return sum(parameter.numel() for parameter in inner if id(parameter) not in packed) / max(1, whole)


def check_quantized(room: Room, made: Quantized) -> dict[str, Any]:
    """The exported folder, loaded by transformers, against the model in training; nothing left wide without a word."""
    reloaded, info = AutoModelForCausalLM.from_pretrained(made.trainer.folder.student, output_loading_info=True)
    left, told = made.left(), "full precision" in " ".join(made.said.split())
    with torch.no_grad():
        difference = apart(logits_of(reloaded.eval(), made.text), logits_of(made.model, made.text))
    figures = {"difference": difference, "left": left, "told": told}
    if difference > 1e-6 or info["missing_keys"]:
        return judged(False, **figures, missing=sorted(info["missing_keys"])[:2])
    if left > LEFT and not told:
        return wrong(f"{left:.0%} of its blocks' weights stay in full precision, and nothing is said", **figures)
    return right(**figures)


def check_onnx(room: Room, made: Quantized) -> dict[str, Any]:
    """The quantized student for ONNX Runtime, or a refusal before training."""
    if "onnx" in made.refused:
        return refused(made.refused["onnx"])
    return _written("onnx", made.asked, made.model, made.text)


def check_gguf(room: Room) -> dict[str, Any]:
    """The student in full precision as a GGUF file, or a refusal before training."""
    asked = room.experiment("gguf", export={"to": ["gguf"]}, data=APART)
    text = prepare_text(asked)
    with unplanned():
        trainer = prepared(asked, text)
    write_folder(trainer.folder.student, trainer.whole(), text.tokenizer)
    return _written("gguf", asked, trainer.whole(), text)


def _written(runtime: str, asked: Experiment, model: nn.Module, text: PreparedData) -> dict[str, Any]:
    try:
        with console.capture():
            receipt = write_for(runtime, asked, RunFolder(asked.folder), model, text)
    except UserError as error:
        return wrong(f"refused after training only: {message(error)}")
    return judged(receipt.holds, difference=receipt.largest_difference / max(receipt.largest_logit, 1e-30))


# ---- all of them

STEPS: dict[str, Callable[[Room, Steps], dict[str, Any]]] = {
    "loss": check_loss, "packing": check_packing, "memory": check_memory}
QUANTIZED: dict[str, Callable[[Room, Quantized], dict[str, Any]]] = {"quantized": check_quantized, "onnx": check_onnx}
LONE: dict[str, Callable[[Room], dict[str, Any]]] = {
    "causal": check_causal, "layers": check_layers, "gguf": check_gguf}


def examine(room: Room, wanted: list[str], tell: Callable[[str, dict[str, Any]], None]) -> None:
    """Carry checks out on the model of a room, and tell of each as it is done."""
    from benchmarks.architectures.trained_on_ranks import ENGINES, check_engines

    for checks, make in ((STEPS, Steps), (QUANTIZED, Quantized)):
        names = [name for name in wanted if name in checks]
        if not names:
            continue
        made: list[Any] = []
        begun = verdict_of(lambda make=make, made=made, names=names: made.append(make(room, names)) or right())
        for name in names:
            tell(name, verdict_of(lambda name=name, checks=checks, made=made: checks[name](room, made[0]))
                 if made else begun)
        del made
    for name in wanted:
        if name in LONE:
            tell(name, verdict_of(lambda name=name: LONE[name](room)))
    if engines := [name for name in wanted if name in ENGINES]:
        for name, verdict in check_engines(room, engines).items():
            tell(name, verdict)
