"""Adapters on a base that is held in the numbers it is exported in."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file

from strategies.adapters.low_rank import base_of
from tests.trainer.models.test_adapters import adapted, base, peaks  # noqa: F401 - a fixture among them
from trainer.errors import UserError
from trainer.experiment.load import read_experiment
from trainer.pipeline import check_early
from trainer.run.folder import RunFolder

FOUR = {"quantization": {"method": "rtn", "bits": 4, "group_size": 16, "symmetric": False}}


def test_the_base_that_was_trained_on_is_exported_beside_the_adapter(run_experiment, base):  # noqa: F811
    experiment, folder = run_experiment("run", **adapted(base, student=FOUR.items(), base="quantized", kind="dora"),
                                        export={"adapter": "separate", "dtype": "bfloat16"})
    receipt = json.loads(folder.receipt.read_text())
    print(receipt)
    print(peaks(folder.path))
    assert 0
