"""A step of reinforcement learning: the trainer's logprobs are the sampler's, bit for bit."""

import pytest

from pytest_batchinv import gpu


@pytest.mark.batch_invariant
@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-qwen3-moe"])
def test_the_trainer_gives_the_samplers_logprobs_before_and_after_updates(preset, dtype, batchinv_settings):
    """64 rows decoded at once with a static cache; then packed by fours, with gradients; one update, and both again."""
    from pytest_batchinv.suite import rl_step

    model = rl_step.built(preset, gpu.resolve_device(batchinv_settings.device), dtype, in_mode=True)
    before = next(model.parameters()).detach().clone()
    for agreement in rl_step.run(model, rl_step.Step(rows=64, micro_batch=4, new_tokens=4, updates=1)):
        assert (agreement.equal, agreement.largest) == (agreement.tokens, 0.0), f"after {agreement.updates} updates"
    assert not before.equal(next(model.parameters())), "no update was taken"
