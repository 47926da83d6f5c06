"""The ledger's counts against what torch really keeps."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from strategies.memory.ledger import parameter_bytes, saved_activation_bytes
from strategies.optimizers.adamw import adamw
from strategies.optimizers.groups import parameter_groups
from tests.conftest import TINY


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_activations_are_those_autograd_saves(dtype):
    def build():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=90))

    def inputs():  # each token a document of its own, so that there is a mask
        ids = torch.zeros(3, 16, dtype=torch.long)
        return {"input_ids": ids, "position_ids": ids, "use_cache": False}

    counted = saved_activation_bytes(build, inputs, dtype)
    model = build()
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    positions = torch.cat([torch.arange(9), torch.arange(7)]).expand(3, 16)
    with (torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
          torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)):
        logits = model(input_ids=torch.zeros(3, 16, dtype=torch.long), position_ids=positions, use_cache=False).logits
    own.add(logits.untyped_storage()._cdata)
    real = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    assert counted == pytest.approx(real, rel=0.01)


def test_optimizer_state_and_weights_are_exact():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=90))
    optimizer = adamw(parameter_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    state = sum(value.numel() * value.element_size() for entry in optimizer.state.values()
                for name, value in entry.items() if name != "step")
    assert parameter_bytes(model) * 2 == state
    decayed = [group["weight_decay"] for group in optimizer.param_groups for p in group["params"] if p.ndim < 2]
    assert decayed and not any(decayed), "norms and biases are not decayed"
