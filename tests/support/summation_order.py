"""The order of a sum, read off its result. For tests and benchmarks.

A *probe* plants 2^25 at one place of a sum, -2^25 at another, 1 at a third, and zeros everywhere else. In a float32
accumulator the 1 is lost if it is added while the large value is in (1 + 2^25 is 2^25), and the result is 0; added
before or after, it survives, and the result is 1. So each probe tells whether one place is summed between two others,
and thousands of probes tell the order. Random data can agree by luck; this cannot.
"""

import torch
from torch import Tensor

LARGE = 2.0**25
LARGE_FLOAT64 = 2.0**54
"""The same for a float64 accumulator."""


def probes(n_places: int, count: int, seed: int = 0) -> Tensor:
    """int64 [count, 3]: places of the large value, of the 1, of the negative large value; all different.

    Half of them are close together, as orders differ within an instruction or a block more easily than across many.
    Needs 3 places at least.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    anywhere = torch.rand(count, n_places, generator=generator, device="cpu").topk(3, 1).indices
    reach = min(n_places, 24)
    start = torch.randint(0, n_places - reach + 1, (count, 1), generator=generator, device="cpu")
    close = start + torch.rand(count, reach, generator=generator, device="cpu").topk(3, 1).indices
    return torch.where(torch.arange(count, device="cpu")[:, None] % 2 == 0, anywhere, close)


def planted(places: Tensor, n_places: int, large: float = LARGE, one: float = 1.0) -> Tensor:
    """float64 [count, n_places]: the terms of each probe."""
    terms = torch.zeros(len(places), n_places, dtype=torch.float64, device="cpu")
    values = torch.tensor([large, one, -large], dtype=torch.float64, device="cpu")
    return terms.scatter_(1, places, values.expand(len(places), 3))


def survives_in_a_chain(places: Tensor) -> Tensor:
    """bool [count]: what one accumulator over the places in ascending order gives."""
    large, one, negative = places.unbind(1)
    between = (torch.minimum(large, negative) < one) & (one < torch.maximum(large, negative))
    return ~between
