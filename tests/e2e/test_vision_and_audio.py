"""Models of images and of sound, built tiny by transformers: relations R, S, I and X in the mode. Stock torch fails."""

import pytest
import torch
import transformers

from pytest_batchinv import assert_batch_invariant, batch_invariant_mode

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_size": 16, "patch_size": 4}


def _whisper():
    sizes = {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in (("attention_heads", 2), ("ffn_dim", 64))}
    tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, num_mel_bins=16, max_source_positions=20, **sizes, **tokens
    )
    encoder = transformers.WhisperModel(config).encoder.eval()
    return lambda x: encoder(x).last_hidden_state, (16, 40)


def _wav2vec2():
    config = transformers.Wav2Vec2Config(
        **SMALL, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, vocab_size=20, layerdrop=0.0,
    )  # fmt: skip
    return _of(transformers.Wav2Vec2Model(config)), (400,)


def _resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetModel(config).eval()
    return lambda x: model(x).pooler_output.flatten(1), (3, 24, 24)


def _convnext():
    model = transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))
    return _of(model), (3, 32, 32)


def _of(model):
    model.eval().requires_grad_(False)
    return lambda x: model(x).last_hidden_state


MODELS = {
    "vit": lambda: (_of(transformers.ViTModel(transformers.ViTConfig(**SMALL, **IMAGE))), (3, 16, 16)),
    "dinov2": lambda: (_of(transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, **IMAGE))), (3, 16, 16)),
    "siglip": lambda: (_of(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL, **IMAGE))), (3, 16, 16)),
    "clip": lambda: (_of(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL, **IMAGE))), (3, 16, 16)),
    "convnext": _convnext,
    "resnet": _resnet,
    "whisper": _whisper,
    "wav2vec2": _wav2vec2,
}


# transformers 5.23 asks a cached function whether torch.distributed is there; Dynamo traces into it, and warns.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_keeps_its_bits_in_eager_and_compiled_code(name, dtype):
    torch.manual_seed(0)
    with torch.no_grad():
        torch.set_default_dtype(dtype)
        try:
            function, shape = MODELS[name]()
        finally:
            torch.set_default_dtype(torch.float32)
        rows = torch.randn(9, *shape).to(dtype)
        with batch_invariant_mode():
            record = assert_batch_invariant(function, rows, relations=("R", "S", "I", "X"), max_examples=3)
    assert record.relation == "X" and record.verdict == "equal"


@pytest.mark.parametrize("name", ["resnet", "wav2vec2"])
def test_stock_torch_does_not_keep_them(name):
    """Else the test above could not fail."""
    torch.manual_seed(0)
    function, shape = MODELS[name]()
    rows = torch.randn(33, *shape)
    with torch.no_grad():
        whole = function(rows)
        alone = torch.cat([function(row[None]) for row in rows])
    assert not torch.equal(whole, alone)
