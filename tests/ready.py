"""What a process that tests fork has imported when it starts; its clients are forked as well."""

import gc
from contextlib import suppress
from importlib import import_module
from types import SimpleNamespace

from benchmarks.faults.processes import NEEDED
from strategies.export import receipt
from tests import clients, searches

for name in (*NEEDED, "trainer.experiment.lr_schedule", "strategies.optimizers.by_name", "strategies.sharding.fsdp2",
             "transformers.models.llama.modeling_llama", "torch.distributed.fsdp", "torch.utils.cpp_extension",
             "scipy.io", "scipy.optimize", "matplotlib.pyplot",
             "matplotlib.backends.backend_agg", "deepspeed.ops.op_builder.all_ops",
             "deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.runtime.zero.muon.muon_optimizer"):
    with suppress(ImportError):  # of what is optional
        import_module(name)
searches.share()
receipt.subprocess = SimpleNamespace(run=clients.ask)
gc.collect()
gc.freeze()  # so many objects would be looked through at each collection of each process
