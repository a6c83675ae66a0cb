"""A stand-in for vLLM, as far as our own code calls it. It computes nothing of vLLM's."""
