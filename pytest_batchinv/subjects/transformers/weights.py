"""Presets as models: the architecture from transformers, the weights seeded, on the device where they will run."""

import zlib

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pytest_batchinv.subjects.presets import preset_config

OUTLIER_SCALE = 1000.0
EMBEDDING_STD = 0.25
NORM_STD = 0.1


def build_preset(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """The preset's model, the same for the same name, dtype and type of device.

    The last token is the outlier: its embedding is about a thousand times larger than the others. The head is a matrix
    of its own, also where the published model ties it to the embeddings, so that the outlier stays an input only.
    """
    settings = preset_config(name)
    config = AutoConfig.for_model(settings.pop("model_type"), **{**settings, "tie_word_embeddings": False})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    _seed(model, zlib.crc32(name.encode()))
    return model.eval()


@torch.no_grad()
def _seed(model: nn.Module, seed: int) -> None:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = list(model.parameters())
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    for parameter in parameters:
        # Drawn in fp32 whatever the dtype, so that the dtypes hold the same weights, each rounded in its own way.
        noise = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device).normal_(generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(noise.mul_(EMBEDDING_STD))
        elif parameter.ndim == 1:  # norms and biases: around the value that the architecture starts from
            parameter.add_(noise.mul_(NORM_STD).to(parameter.dtype))
        else:  # activations keep their size from layer to layer, so attention and logits are neither flat nor one-hot
            parameter.copy_(noise.mul_(parameter.shape[-1] ** -0.5))
    model.get_input_embeddings().weight[-1].mul_(OUTLIER_SCALE)
