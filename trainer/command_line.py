"""Argument parsers of `train.py` and `limbeck`; nothing heavy is imported here."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from trainer import __version__
from trainer.errors import UserError
from trainer.experiment.experiment import Experiment
from trainer.experiment.explain import help_text
from trainer.experiment.load import all_keys
from trainer.sweep.sweep_file import Sweep

EXAMPLE = "configs/quickstart.yaml"
RUNTIMES = ("onnx", "gguf", "ctranslate2", "executorch")
READERS = ("llama-cpp", "openvino")
CLUSTERS = ("dgx-v100", "dgx-a100", "dgx-h100", "pcie")  # as in strategies.sharding.network
OVERRIDES = "override a value of the file, for example optimizer.lr=1e-4 student.quantization.bits=8"

EXIT_CODES = """\
Exit codes:
  0    done (or resumed and done)
  1    the run could not go on
  2    a mistake in the experiment, its data or the command line
  3    a memory.budget that no plan can keep
  75   stopped by a signal and saved: start the same command again to go on
  130  stopped at once by a second Ctrl-C
"""
STATUS_CODES = "Exit codes: 0 finished, 75 stopped by a signal and to be started again, 1 anything else, 2 no such run."

SWEEP_CODES = """\
Exit codes:
  0    all runs are finished
  1    some runs failed; their messages are in the table
  2    a mistake in the sweep or in one of its experiments: nothing has been started
  75   stopped by a signal, and its runs saved: start the same command again to go on
  130  stopped at once by a second Ctrl-C
"""


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises `UserError` with the closest valid word instead of exiting.

    `key=value` may appear anywhere among the options: those that argparse does not consume are added to `overrides`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.siblings: dict[str, Parser] = {}  # verb -> its parser, for the other verbs
        self.typed: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.typed = list(args or ())
        options, rest = super().parse_known_args(args, namespace)
        words = [*(getattr(options, "overrides", None) or ()), *rest]
        self._check_options(words)
        if rest and not hasattr(options, "overrides"):
            self.error(f"one word too many: {rest[0]}")
        if hasattr(options, "overrides"):
            options.overrides = words
        return options, []

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` that suggests the usage; an unknown option is reported first."""
        self._check_options(self.typed)
        raise UserError("", message.removeprefix("argument "), way_out=self.format_usage().strip())

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            self._check_options(self.typed)
            what = {"VERB": "verb", "RUNTIME": "runtime", "READER": "reader"}.get(
                str(action.metavar), f"value of {'/'.join(action.option_strings)}")
            raise UserError("", f"no such {what}: {value}", way_out=_nearest(value, [*action.choices]) or
                            f"one of {', '.join(action.choices)}; see {self.prog} --help")

    def _check_options(self, words: Sequence[str]) -> None:
        known = self._option_string_actions
        for word in words:
            if word == "--":
                return
            if word.startswith("-") and word.partition("=")[0] not in known:
                raise self._no_such_option(word)

    def _no_such_option(self, word: str) -> UserError:
        name, equals, _ = word.partition("=")
        bare = word.lstrip("-")
        if owners := [verb for verb, parser in self.siblings.items() if name in parser._option_string_actions]:
            return UserError("", f"{name} goes with {' and '.join(owners)}", way_out=self.format_usage().strip())
        if bare.partition("=")[0] in all_keys(Experiment):
            way_out = f"write it without dashes: {bare}" + ("" if equals else "=VALUE")
        else:
            way_out = _nearest(name, self._option_string_actions) or (
                f"write it without dashes: {bare}" if equals else f"see {self.prog} --help")
        return UserError("", f"no such option: {word}", way_out=way_out)


def _nearest(word: str, words: Collection[str]) -> str:
    near = difflib.get_close_matches(word, words, 1, 0.7)
    return f"did you mean {near[0]}?" if near else ""


class _Once(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise UserError("", f"{option_string} is given twice", way_out="give one experiment; key=value changes it")
        setattr(namespace, self.dest, values)


def train_parser() -> Parser:
    """The parser of `train.py`; sets the attributes `config`, `overrides`, `dry_run` and `json`."""
    parser = Parser(
        prog="train.py", description="Train a student from one experiment file.",
        usage="accelerate launch train.py --config FILE [key=value ...]\n"
              "       python train.py --config FILE [key=value ...] --dry-run [--json]",
        epilog=f"{EXIT_CODES}\n{help_text()}")
    _experiment(parser)
    parser.add_argument("--dry-run", action="store_true", help="show what would run - values and where they come from, "
                        "steps, parameters, bytes - and stop")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print the plan as JSON instead")
    parser.add_argument("-V", "--version", action="version", version=f"limbeck {__version__}",
                        help="show the version and exit")
    return parser


def parse_train(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `train.py`.

    Raises:
        UserError: the arguments are not valid.
    """
    options = train_parser().parse_args(arguments)
    if options.json and not options.dry_run:
        raise UserError("", "--json goes with --dry-run", way_out="add --dry-run to print the plan as JSON")
    if options.config is None:
        raise UserError("", "no experiment given", way_out=f"pass one, for example --config {EXAMPLE}")
    return options


def limbeck_parser() -> Parser:
    """The parser of `limbeck`; sets `verb`, None if none is given, and the attributes of that verb."""
    parser = Parser(prog="limbeck", usage="limbeck VERB ...", description="What is done beside training.", epilog=
                    "Each verb has its own: limbeck VERB --help.\n"
                    "Training is launched: accelerate launch train.py --config FILE (see train.py --help).")
    parser.add_argument("-V", "--version", action="version", version=f"limbeck {__version__}",
                        help="show the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", prog="limbeck")
    for add in (_init, _schema, _show_data, _status, _watch, _report, _export, _push, _evaluate, _sweep, _generate,
                _scale):
        add(verbs)
    for name, verb in verbs.choices.items():
        verb.siblings = {other: one for other, one in verbs.choices.items() if other != name}
    parser.siblings = dict(verbs.choices)
    return parser


def _experiment(parser: Parser) -> None:
    parser.add_argument("--config", metavar="FILE", action=_Once,
                        help="the experiment, a YAML file (start from one in configs/, or from limbeck init FOLDER)")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=OVERRIDES)


def _sentence(says: str) -> str:
    return says[0].upper() + says[1:]  # str.capitalize would write "json"


def _init(verbs: Any) -> None:
    says = "write a starting experiment into a folder"
    parser = verbs.add_parser(
        "init", help=says, usage="limbeck init FOLDER", description=f"{_sentence(says)}: experiment.yaml with its "
        "schema for editors,\ntrain.py, and launch/ with topologies for accelerate and Slurm. No file is overwritten.")
    parser.add_argument("folder", metavar="FOLDER", help="a new one, or one that has none of these files")


def _schema(verbs: Any) -> None:
    says = "write the JSON Schema of experiment files or of sweeps, for editors"
    parser = verbs.add_parser("schema", help=says, usage="limbeck schema [FILE] [--sweep]",
                              description=_sentence(says) + ".")
    parser.add_argument("file", metavar="FILE", nargs="?", help="where to (default: standard output)")
    parser.add_argument("--sweep", action="store_true", help="that of sweep files")


def _show_data(verbs: Any) -> None:
    says = "show a few records of the training data as they will be learned"
    parser = verbs.add_parser("show-data", help=says, usage="limbeck show-data --config FILE [key=value ...]",
                              description=f"{_sentence(says)},\nand where rows cut them off.")
    _experiment(parser)


def _status(verbs: Any) -> None:
    says = "tell how a run is doing or how it ended"
    _run(verbs.add_parser("status", help=says, description=_sentence(says) + ".", epilog=STATUS_CODES,
                          usage="limbeck status RUN\n       limbeck status --config FILE [key=value ...]"))


def _watch(verbs: Any) -> None:
    says = "show how a run is doing until it has ended"
    parser = verbs.add_parser("watch", help=says, epilog=f"{STATUS_CODES} Ctrl-C: 130.",
                              description=f"{_sentence(says)}: what it does, its figures, and curves as text.\nOnly "
                              "its folder is read, and nothing written or locked: it may be on another machine.",
                              usage="limbeck watch RUN [--every SECONDS] [--once]\n"
                              "       limbeck watch --config FILE [key=value ...] [--every SECONDS] [--once]")
    _run(parser)
    parser.add_argument("--every", metavar="SECONDS", type=float, default=2.0, help="seconds between looks (default: "
                        "2)")
    parser.add_argument("--once", action="store_true", help="look once and end, as always where the output is no "
                        "terminal")


def _run(parser: Parser) -> None:
    parser.add_argument("--config", metavar="FILE", action=_Once, help="the experiment whose run is meant")
    parser.add_argument("overrides", metavar="RUN | key=value", nargs="*", default=[],
                        help="the folder of a run or a sweep; with --config, what train.py was given besides")


def _report(verbs: Any) -> None:
    says = "write report.md and its pictures of a run folder again"
    parser = verbs.add_parser("report", help=says, usage="limbeck report RUN", description=_sentence(says) + ".")
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run, or of a sweep")


def _export(verbs: Any) -> None:
    says = "write a finished run's student for another runtime"
    parser = verbs.add_parser("export", help=says, description=f"{_sentence(says)}, and check it there.",
                              usage=f"limbeck export RUN --to {'|'.join(RUNTIMES)} [--reader READER] "
                                    "[--trust-remote-code]")
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--to", metavar="RUNTIME", choices=RUNTIMES, required=True, help=" or ".join(RUNTIMES))
    parser.add_argument("--reader", metavar="READER", choices=READERS, action="append", default=[],
                        help="also have it read by llama-cpp (what is for gguf) or openvino (onnx)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with its model: "
                        "only if you say so here, whatever the folder says")


def _push(verbs: Any) -> None:
    says = "upload a finished run's student to the Hugging Face hub"
    parser = verbs.add_parser("push", help=says, description=f"{_sentence(says)}, with its model card, in one commit.",
                              usage="limbeck push RUN --to OWNER/NAME [--runtime RUNTIME] [--private] "
                                    "[--base OWNER/NAME]")
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--to", metavar="OWNER/NAME", required=True, help="the repository, which is created if needed")
    parser.add_argument("--runtime", metavar="RUNTIME", choices=("transformers", *RUNTIMES), default="transformers",
                        help="which of its students: transformers (default), " + " or ".join(RUNTIMES))
    parser.add_argument("--private", action="store_true", help="create it so that nobody else can see it")
    parser.add_argument("--base", metavar="OWNER/NAME", help="of an adapter alone whose base is a folder here: the "
                        "same weights on the hub, which the uploaded adapter then names")


def _evaluate(verbs: Any) -> None:
    says = "judge a model on tasks, with confidence intervals"
    parser = verbs.add_parser("evaluate", help=says, description=f"{_sentence(says)}, and write evaluation.json into "
                              "its folder.",
                              usage="limbeck evaluate FOLDER --tasks FILE [--limit N] [--teacher FOLDER] "
                                    "[--output FILE]\n                        [--tokens N] [--trust-remote-code]\n"
                                    "       limbeck evaluate RUN [--tasks FILE] ...")
    parser.add_argument("run", metavar="FOLDER", help="a folder with a model that transformers can load, or that of a "
                        "finished run, whose student is meant")
    parser.add_argument("--tasks", metavar="FILE", help="the tasks: a YAML file with `tasks`, or an experiment with "
                        "`evaluate` (default: those of the run)")
    parser.add_argument("--limit", metavar="N", type=int, help="use at most so many records of each task")
    parser.add_argument("--teacher", metavar="FOLDER", help="another model, judged beside it: the results have the "
                        "difference on the same records")
    parser.add_argument("--output", metavar="FILE", help="where to write the results, instead of evaluation.json in "
                        "the folder")
    parser.add_argument("--tokens", metavar="N", type=int, default=4096, help="most tokens of a forward pass, padding "
                        "included (default: 4096)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model: only if "
                        "you say so here")


def _sweep(verbs: Any) -> None:
    says = "run one experiment with other values, settings and seeds, and compare the results"
    parser = verbs.add_parser(
        "sweep", help=says, usage="limbeck sweep SWEEP [--dry-run] [key=value ...]",
        description=f"{_sentence(says)}.\nStarted again, it goes on: finished runs are kept, stopped ones resume, "
        "failed ones are tried again.",
        epilog=f"{SWEEP_CODES}\n{help_text(Sweep)}")
    parser.add_argument("sweep", metavar="SWEEP", help="the sweep, a YAML file (see configs/sweep-learning-rate.yaml)")
    parser.add_argument("--dry-run", action="store_true",
                        help="show the runs, and steps and bytes of each setting, and start none")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="override a key of the sweep, "
                        "for example jobs=4, or one of the experiment in all runs: training.steps=200")


GENERATE_CODES = """\
Exit codes:
  0    done; of several processes, this one has done its share
  1    the memory of the device does not suffice, or no answer is left
  2    a mistake in the command line, the prompts or the folder: nothing has been generated
  130  stopped at once by Ctrl-C: start the same command again to go on
"""


def _generate(verbs: Any) -> None:
    says = "let a teacher answer prompts, and write its answers as a data set to train students on"
    parser = verbs.add_parser(
        "generate", help=says, epilog=GENERATE_CODES, description=f"{_sentence(says)}.\nAfter a stop or a kill the "
        "same command goes on. Several processes share the work: accelerate launch -m limbeck generate ...",
        usage="limbeck generate TEACHER --prompts PATH --to FOLDER\n"
              "                        [--messages FIELD | --prompt FIELD | --text FIELD] [...]")
    parser.add_argument("teacher", metavar="TEACHER", help="hub id or local folder of the model that answers")
    parser.add_argument("--prompts", metavar="PATH", required=True, help="hub id, local folder, file or glob of the "
                        "prompts, as data.path")
    parser.add_argument("--to", metavar="FOLDER", required=True, help="where the data set goes: a new folder, or one "
                        "of the same command before")
    _of_prompts(parser)
    _of_decoding(parser)
    parser.add_argument("--dtype", metavar="DTYPE", choices=("float32", "bfloat16", "float16"),
                        help="in which its weights are held: float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the hub id")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that ships with the teacher")


def _of_prompts(parser: Parser) -> None:
    kinds = parser.add_mutually_exclusive_group()
    for kind, what in (("messages", "conversations, which are answered after their last message that is not the "
                        "assistant's"), ("prompt", "instructions, written by the chat template if there is one, or "
                                         "ended by a line break"), ("text", "plain texts, which are continued")):
        kinds.add_argument(f"--{kind}", metavar="FIELD", help=f"field with {what}")
    parser.add_argument("--tools", metavar="FIELD", help="field with the tools of conversations")
    parser.add_argument("--system", metavar="TEXT", help="system prompt of conversations without one")
    parser.add_argument("--split", metavar="NAME", default="train", help="split of a hub data set (default: train)")
    parser.add_argument("--limit", metavar="N", type=int, help="answer the first N prompts only")
    parser.add_argument("--first-tokens", metavar="N", type=int, help="of each plain text, the first N tokens are the "
                        "prompt (default: all)")


def _of_decoding(parser: Parser) -> None:
    parser.add_argument("--new-tokens", metavar="N", type=int, default=256, help="most tokens of an answer (default: "
                        "256)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="of sampling; 0, the default, "
                        "takes the most probable token each time, whatever generation_config.json says")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="sample from the most probable tokens "
                        "that have this much of the probability (default: 1)")
    parser.add_argument("--beams", metavar="N", type=int, default=1, help="beams of a beam search, as in Kim & Rush "
                        "(default: 1, none)")
    parser.add_argument("--answers", metavar="N", type=int, default=1, help="answers to each prompt: samples, or the "
                        "best of the beams (default: 1)")
    parser.add_argument("--unfinished", metavar="WHAT", choices=("keep", "drop"), help="keep or drop answers that were "
                        "cut off (default: drop answers, keep plain texts)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=16, help="sequences at a time (default: 16)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the samples (default: 0)")


def _scale(verbs: Any) -> None:
    says = "predict step time and bytes per rank for many numbers of GPUs, without any of them"
    parser = verbs.add_parser(
        "scale", help=says, description=f"{_sentence(says)}.\nEach rank has the sequences that it has in the "
        "experiment, so that the batch grows with the ranks.",
        usage="limbeck scale --config FILE [--ranks N,N] [--engines NAME,NAME] [--network NAME] [--gbits G]\n"
              "                     [--json] [key=value ...]")
    _experiment(parser)
    parser.add_argument("--ranks", metavar="N,N", default="1,8,64,1024", help="numbers of ranks, one per GPU (default: "
                        "1,8,64,1024)")
    parser.add_argument("--engines", metavar="NAME,NAME", help="of ddp, zero1, zero2, zero3, fsdp2 and fsdp2-stage2 "
                        "(default: the experiment's)")
    parser.add_argument("--network", metavar="NAME", choices=CLUSTERS, help="nodes and their links: "
                        + ", ".join(CLUSTERS) + " (default: the usual one for memory.device)")
    parser.add_argument("--gbits", metavar="G", type=float, help="gigabits per second of each GPU between nodes, if "
                        "not the network's")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
