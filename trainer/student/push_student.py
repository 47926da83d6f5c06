"""Uploads an exported student to the Hugging Face hub, in one commit: what is interrupted leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from strategies.export.receipt import digest_of, is_weight_file
from trainer import __version__
from trainer.errors import RunFailed, UserError
from trainer.experiment.plain_yaml import read_values
from trainer.model_files import first_line
from trainer.run.folder import RunFolder, read_json
from trainer.run.metrics import console, readable
from trainer.run.model_card import CARD, MARK, license_of, model_card, students, with_base

ADAPTER = "adapter_config.json"
REFUSED = (401, 403)  # HTTP status: no token that is known, or one that may not do this


def push(run: Path, repository: str, runtime: str = "transformers", private: bool = False,
         base: str | None = None) -> str:
    """Upload the student of a finished run, and return the address of its repository.

    The repository is created if there is none. All files arrive in one commit, after their contents: until then the
    repository is as it was.

    Args:
        run: the run's folder. It may come from somebody else: nothing in it that is a link is uploaded.
        repository: OWNER/NAME.
        runtime: the runtime that the student is exported for.
        private: whether nobody else may see the repository.
        base: of an adapter alone whose base is a folder here, the id on the hub of the same weights.

    Raises:
        UserError: there is no such student, its receipt does not hold or is of other files, there is no token, or an
            adapter's base would be one that nobody else has.
        RunFailed: the upload failed.
    """
    folder = RunFolder(run)
    student = _verified(folder, runtime)
    files = _files(student)
    _check_place("--to", repository)
    _check_base(student, repository, base)
    _check_token()
    size = readable(sum(file.stat().st_size for file in files))
    console.print(f"{run}: uploading {len(files)} files of {student.name}, {size}, to {repository} in one commit")
    if license_of(folder) is None:
        console.print(f"{run}: hint: the model card states no license: set export.license, and start the run's command "
                      "again")
    operations = [CommitOperationAdd(path.relative_to(student).as_posix(),
                                     _content(path, folder, student, repository, base)) for path in files]
    api = HfApi()
    try:
        if base is not None and not api.repo_exists(base):
            raise UserError("--base", "the hub has no such model, or none that this token may see", value=base,
                            way_out="name the repository that has the weights of the adapter's base")
        address = str(api.create_repo(repository, private=private or None, exist_ok=True))
        if private and not api.repo_info(repository).private:
            raise UserError("--private", "this repository is there already, and everybody can read it",
                            value=repository, way_out="name another, or make it private on the hub first")
        api.create_commit(repository, operations, commit_message=f"{folder.path.name}: by Limbeck {__version__}")
    except UserError:
        raise
    except Exception as error:  # of the network, of the hub, and of what stores large files
        raise _failed(repository, error) from error
    return address


def _verified(folder: RunFolder, runtime: str) -> Path:
    """The folder of the student for a runtime, whose files are those of its receipt, which holds."""
    if not folder.finished:
        raise UserError("", f"{folder.path} is not the folder of a finished run",
                        way_out="finish it: start its command again")
    found = students(folder)
    if runtime not in found:
        raise UserError("--runtime", "the run has no student for it", value=runtime, way_out=
                        f"limbeck export {folder.path} --to {runtime} writes it; there is {', '.join(found)}")
    student = found[runtime]
    receipt, again = read_json(student / "receipt.json"), "write it again, with limbeck export, or the run's command"
    if receipt.get("holds") is not True:
        raise UserError("", f"the receipt of {student} does not hold: the file is not the student", way_out=again)
    weights = [file for file in sorted(student.rglob("*")) if is_weight_file(file)]
    if receipt.get("sha256") != digest_of(weights):
        raise UserError("", f"the weights in {student} are not those that its receipt is of", way_out=again)
    return student


def _files(student: Path) -> list[Path]:
    """All files of a student, of which none may be a link or something else than a file."""
    found = [path for path in sorted(student.rglob("*")) if not path.is_dir() or path.is_symlink()]
    for path in found:
        if path.is_symlink() or not path.is_file():
            raise UserError("", f"{path} is a link or no file, and may lead to anything",
                            way_out="put the file itself there")
    return found


def _check_base(student: Path, repository: str, base: str | None) -> None:
    """Raise `UserError` if an adapter would name a base that nobody else has, or `--base` names one for nothing."""
    file = student / ADAPTER
    now = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    local = isinstance(now, str) and Path(now).is_absolute()
    if base is None and local:
        raise UserError("", f"{student} is an adapter alone, and its base, {now}, is a folder that nobody else has",
                        way_out=f"name the same weights on the hub: limbeck push {student.parent} --to {repository} "
                        "--base OWNER/NAME; or set export.adapter: merged, and start the run's command again")
    if base is not None and not local:
        what = "this student is no adapter alone" if now is None else f"the adapter names its base already: {now}"
        raise UserError("--base", what, value=base, way_out="leave it out")
    if base is not None:
        _check_place("--base", base)


def _check_place(option: str, repository: str) -> None:
    """Raise `UserError` if an option names what can be no repository."""
    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise UserError(option, f"no name of a repository: {first_line(error)}", value=repository,
                        way_out="OWNER/NAME, of letters, digits, `-`, `_` and `.`") from error


def _check_token() -> None:
    """Raise `UserError` if nothing can be sent to a hub from here."""
    if constants.is_offline_mode():
        raise UserError("", "HF_HUB_OFFLINE is set, so that nothing is sent to a hub", way_out="unset it")
    if get_token() is None:
        raise UserError("", "there is no token of the Hugging Face hub here", way_out="hf auth login, or set HF_TOKEN, "
                        "to a token that may write (https://huggingface.co/settings/tokens)")


def _content(path: Path, folder: RunFolder, student: Path, repository: str, base: str | None) -> str | bytes:
    """A file's path; or what it is to hold in its new place: of a card that is as it was written, or of an adapter."""
    if path == student / CARD and MARK in path.read_text(encoding="utf-8", errors="replace"):
        return model_card(folder, student, repository, base).replace(f"\n{MARK}\n", "").encode()
    if base is not None and path == student / ADAPTER:
        return _json({**read_json(path), "base_model_name_or_path": base, "revision": None})
    if base is not None and path == student / "receipt.json":
        return _json(with_base(read_json(path), read_values(folder.experiment)[0], base))
    return str(path)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _failed(repository: str, error: Exception) -> RunFailed | UserError:
    status = getattr(error.response, "status_code", None) if isinstance(error, HfHubHTTPError) else None
    if status in REFUSED:
        return UserError("--to", f"the hub refuses the token (HTTP {status})", value=repository,
                         way_out="take a token that may write there: hf auth login, or HF_TOKEN")
    return RunFailed(f"{repository} has not got the student: {first_line(error)}\n  -> start the same command again: "
                     "until all of it has arrived, the repository is as it was before, or empty")
