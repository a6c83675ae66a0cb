"""``attention`` and ``packed_attention`` on the GPU: any mask, grouped heads, keys in one tensor, packed or in pages.

    out = softmax(sm_scale * q @ k.T + mask) @ v        lse = log(sum(exp(sm_scale * q @ k.T + mask)))

The order of sums. The keys of a (batch, head) are counted from the first key that any of its queries can see. BLOCK_N keys
are a block, CHUNK_BLOCKS blocks are a chunk. Each block has a softmax of its own: its maximum, its sum and its product with v,
both over the keys ascending. The softmaxes of a chunk's blocks are merged in ascending order, then those of the row's chunks.

So padding on either side changes no bit, and neither does the number of queries. A block of keys that a query cannot see
leaves the query's maximum, sum and accumulator as they are, bit for bit, so it may be skipped. Blocks or chunks may also be
computed by several programs, as splits: the programs write the softmaxes to a workspace, and another kernel merges them in
the same order. The values of hidden keys must be finite: 0 * NaN is NaN, as in torch.

``plan`` chooses the tile and the splits, ``ranges`` finds which blocks of keys a block of queries can see, ``kernel`` computes
the softmaxes of blocks, ``merge`` merges softmaxes.

References: merging of softmaxes, Milakov and Gimelshein, arXiv 1805.02867; its use in attention, Dao et al., arXiv
2205.14135; splits of the keys, Dao et al., "Flash-Decoding" (2023); pages, Kwon et al., arXiv 2309.06180.
"""

from .backward import attention_backward
from .plan import attention, packed_attention, plan_attention

__all__ = ["attention", "attention_backward", "packed_attention", "plan_attention"]
