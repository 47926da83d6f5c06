"""`limbeck init`: write a starter folder with the example experiment, schema and launch files of the repository."""

from __future__ import annotations

import json
import shlex
from importlib.resources import files
from pathlib import Path

from trainer.errors import UserError
from trainer.experiment.explain import schema

NEXT = """\
wrote {count} files to {folder}; see what would run, then run it:

  cd {quoted}
  python train.py --config experiment.yaml --dry-run
  accelerate launch --quiet --config_file launch/one_process.yaml train.py --config experiment.yaml
"""


def write_starter(folder: Path) -> str:
    """Write a starter experiment and its launch files, and return a message with the commands to run next.

    Args:
        folder: a new folder, or one that contains none of these files.

    Raises:
        UserError: one of the files exists, or the folder cannot be written; nothing is overwritten.
    """
    contents = starting_files()
    for above in (folder, *folder.parents):
        if above.exists() and not above.is_dir():
            raise UserError("", f"{above} is a file", way_out="name a folder, for example limbeck init first-run")
    if there := [name for name in contents if (folder / name).exists() or (folder / name).is_symlink()]:
        what = ", ".join(there[:3]) + " and more of these files" * (len(there) > 3)
        raise UserError("", f"{folder} has {what} already; nothing was written",
                        way_out="name a new folder, or move away what is there")
    try:
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("x", encoding="utf-8") as handle:
                handle.write(content)
            if name.endswith(".sh"):
                (folder / name).chmod(0o755)
    except OSError as error:
        raise UserError("", f"cannot write {error.filename or folder}: {error.strerror}",
                        way_out="name a folder that can be written") from error
    return NEXT.format(count=len(contents), folder=folder, quoted=shlex.quote(str(folder))).rstrip()


def starting_files() -> dict[str, str]:
    """The files of a starter folder: path within it -> text."""
    launchers = {f"launch/{file.name}": file.read_text(encoding="utf-8")
                 for file in sorted(shipped("launch").iterdir()) if file.suffix in (".yaml", ".sh")}
    return {"experiment.yaml": (shipped("configs") / "quickstart.yaml").read_text(encoding="utf-8"),
            "experiment.schema.json": json.dumps(schema(), indent=2) + "\n",
            "train.py": shipped("train.py").read_text(encoding="utf-8"), **launchers}


def shipped(name: str) -> Path:
    """Path of a file or folder at the repository root; in a wheel it is inside the package `limbeck` or next to it."""
    package = Path(str(files("limbeck")))
    return package / name if (package / name).exists() else package.parent / name
