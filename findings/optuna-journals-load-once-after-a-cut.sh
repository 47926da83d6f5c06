#!/usr/bin/env bash
# optuna 5.0.0: a study in a journal file whose last line was cut off, as by a kill or a full disk during a write, loads
# without a word, with all trials before it. The next write is appended to the cut line, and from then on every load
# raises JSONDecodeError: trials that were there an hour ago cannot be had any more without mending the file by hand.
# Exit code 1 if this changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optuna==5.0.0
cat > "$folder/torn.py" <<'PY'
import json
import sys
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

optuna.logging.set_verbosity(optuna.logging.ERROR)
file = Path(sys.argv[1])


def study():
    return optuna.create_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(file))),
                               load_if_exists=True)


study().optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=5)
file.write_bytes(file.read_bytes()[:-20])
torn = study()
print(f"after the cut: {len(torn.trials)} trials load")
try:
    torn.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    print("another trial is written")
except json.JSONDecodeError as error:
    print(f"the next write: {type(error).__name__}")
try:
    print(f"{len(study().trials)} trials load again")
    sys.exit(1)
except json.JSONDecodeError as error:
    print(f"every later load: {type(error).__name__}")
PY
"$folder/venv/bin/python" "$folder/torn.py" "$folder/journal.log"
