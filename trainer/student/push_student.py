"""Uploads an exported student to the Hugging Face hub, in one commit: what is interrupted leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

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
from trainer.run.model_card import CARD, MARK, license_of, model_card, students

REFUSED = (401, 403)  # HTTP status: no token that is known, or one that may not do this


def push(run: Path, repository: str, runtime: str = "transformers", private: bool = False) -> str:
    """Upload the student of a finished run, and return the address of its repository.

    The repository is created if there is none. All files arrive in one commit, after their contents: until then the
    repository is as it was.

    Args:
        run: the run's folder. It may come from somebody else: nothing in it that is a link is uploaded.
        repository: OWNER/NAME.
        runtime: the runtime that the student is exported for.
        private: whether nobody else may see the repository.

    Raises:
        UserError: there is no such student, its receipt does not hold or is of other files, or there is no token.
        RunFailed: the upload failed.
    """
    folder = RunFolder(run)
    student = _verified(folder, runtime)
    files = _files(student)
    _check_place(repository)
    size = readable(sum(file.stat().st_size for file in files))
    console.print(f"{run}: uploading {len(files)} files of {student.name}, {size}, to {repository} in one commit")
    if license_of(read_values(folder.experiment)[0]) is None:
        console.print(f"{run}: hint: the model card states no license: set export.license, and start the run's command "
                      "again")
    operations = [CommitOperationAdd(path.relative_to(student).as_posix(), _content(path, folder, student, repository))
                  for path in files]
    api = HfApi()
    try:
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
    base = read_json(student / "adapter_config.json").get("base_model_name_or_path") if (
        student / "adapter_config.json").is_file() else None
    if isinstance(base, str) and Path(base).is_absolute():
        raise UserError("", f"{student} is an adapter alone, and its base, {base}, is a folder that nobody else has",
                        way_out="set export.adapter: merged, and start the run's command again")
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


def _check_place(repository: str) -> None:
    """Raise `UserError` if there can be no such repository, or nothing can be sent to a hub from here."""
    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise UserError("--to", f"no name of a repository: {first_line(error)}", value=repository,
                        way_out="OWNER/NAME, of letters, digits, `-`, `_` and `.`") from error
    if constants.is_offline_mode():
        raise UserError("", "HF_HUB_OFFLINE is set, so that nothing is sent to a hub", way_out="unset it")
    if get_token() is None:
        raise UserError("", "there is no token of the Hugging Face hub here", way_out="hf auth login, or set HF_TOKEN, "
                        "to a token that may write (https://huggingface.co/settings/tokens)")


def _content(path: Path, folder: RunFolder, student: Path, repository: str) -> str | bytes:
    """A file's path; of a card that is still as it was written, the same for its new place."""
    if path == student / CARD and MARK in path.read_text(encoding="utf-8", errors="replace"):
        return model_card(folder, student, repository).replace(f"\n{MARK}\n", "").encode()
    return str(path)


def _failed(repository: str, error: Exception) -> RunFailed | UserError:
    status = getattr(error.response, "status_code", None) if isinstance(error, HfHubHTTPError) else None
    if status in REFUSED:
        return UserError("--to", f"the hub refuses the token (HTTP {status})", value=repository,
                         way_out="take a token that may write there: hf auth login, or HF_TOKEN")
    return RunFailed(f"{repository} has not got the student: {first_line(error)}\n  -> start the same command again: "
                     "until all of it has arrived, the repository is as it was before, or empty")
