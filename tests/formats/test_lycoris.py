"""Files for UIs as LyCORIS itself applies them; skipped where it is not installed (`make nightly` installs it)."""

import pytest
import torch

from tests.adapters import Adapted
from utils.formats.adapter_writer import kohya_tensors

KINDS = [
    "lora",
    "rslora",
    "dora",
    "loha",
    "loha with cores",
    "lokr",
    "lokr of whole factors",
]  # it misreads the shapes of LoKr with cores


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sd", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_changes_the_weights_as_the_run_did(pipelines, base, kind):
    modules = pytest.importorskip("lycoris.modules")
    adapted = Adapted(pipelines[base], kind)
    tensors = kohya_tensors(adapted.layers, adapted.components, torch.float32)
    names = {each.name: each for each in adapted.components}
    for layer in adapted.layers:
        weight = adapted.weights[layer.component, layer.name]
        owner = names[layer.component].ui_name(layer.name)
        if len(layer.shape) == 2:
            module = torch.nn.Linear(layer.shape[1], layer.shape[0], bias=False)
        else:
            module = torch.nn.Conv2d(layer.shape[1], layer.shape[0], layer.shape[2:], bias=False)
        module.weight.data = weight.clone()
        kind_there, stored = modules.get_module(tensors, owner)
        with torch.no_grad():
            theirs = modules.make_module(kind_there, stored, owner, module)
            found = (
                theirs.get_weight(layer.shape) if hasattr(theirs, "get_weight") else theirs.make_weight() * theirs.scale
            )
            found = weight + found.reshape(layer.shape)
            if "magnitude" in layer.tensors:
                found = theirs.apply_weight_decompose(found)
        wanted = layer.merged(weight)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4, msg=f"{layer.component}.{layer.name}")
