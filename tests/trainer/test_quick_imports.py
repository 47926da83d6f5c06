"""Heavy imports: what is left out, what is spared, and that the rest is as transformers itself has it."""

import subprocess
import sys

from tests.conftest import ROOT

LATER = ("{'numba', 'scipy.optimize', 'deepspeed', 'networkx', 'matplotlib', 'peft', 'torchvision', "
         "'torch._functorch.aot_autograd'}")


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_models_are_those_that_transformers_finds_and_collections_begin_again():
    in_a_new_process(f"""
import gc, sys
from trainer.quick_imports import import_heavy, uncollected
with uncollected():
    import torch
import_heavy()
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert not {LATER} & set(sys.modules), {LATER} & set(sys.modules)
import transformers.models as told
from transformers.utils.import_utils import _LazyModule, define_import_structure
own = _LazyModule(told.__name__, told.__file__, define_import_structure(told.__file__), module_spec=told.__spec__)
assert len(own._class_to_module) > 1000
for what in ('_class_to_module', '_modules', '_object_missing_backend', '_import_structure'):
    assert getattr(told, what) == getattr(own, what), what
""")


def test_a_process_that_has_torch_keeps_its_garbage_as_it_is():
    in_a_new_process("""
import gc, torch
from trainer.quick_imports import uncollected
with uncollected():
    assert gc.isenabled()
assert not gc.get_freeze_count()
""")


def test_boxes_are_matched_by_scipy_when_they_are():
    in_a_new_process("""
import sys
from trainer.quick_imports import import_heavy
import_heavy()
from transformers.loss import loss_for_object_detection
assert 'scipy.optimize' not in sys.modules
rows, columns = loss_for_object_detection.linear_sum_assignment([[4, 1, 3], [2, 0, 5], [3, 2, 2]])
assert list(columns) == [1, 0, 2]
from scipy.optimize import linear_sum_assignment, milp
assert sys.modules['scipy.optimize'].milp is milp
""")
