"""Tensor parallel whose bits do not follow the number of ranks: a setting of a model, inside the mode.

A row-parallel layer (``rowwise`` in a plan of transformers, ``RowwiseParallel`` of torch) has a part of K on each rank, and
its result is a sum over the ranks. ``rank_invariant`` has each such layer of a model add in one tree over a fixed number of
leaves of K (``kernels/aten/row_parallel.py``), whatever the number of ranks, one included. Partial sums travel unrounded, so
an all-reduce of 16-bit activations carries twice the bytes. All other layers of a plan are the same on any number of ranks as
they are: columns, heads and rows of the vocabulary are computed whole on one rank, and gathered.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pytest_batchinv import mode
from pytest_batchinv.kernels.aten.common import Refused

LEAVES = 8
"""As many as the ranks of a node have: any power of two of them up to that gives the same bits."""

ROWWISE = {"rowwise": False, "rowwise_rep": True, "rowwise_split_input": True, "local_rowwise": False}
"""Styles of row-parallel layers, and whether their input comes whole."""

EXACT = {
    *("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise", "local_colwise", "local_packed_colwise"),
    *("embedding_rowwise", "embedding_colwise", "mla_kv_a_proj"),
    *("replicated_with_grad_allreduce", "replicate", "local_params"),
}
"""Styles whose forward adds nothing over ranks but zeros."""

_EXPERTS = "moe_tp_experts"

Plan = Mapping[str, str]
"""Module or parameter -> style, as transformers writes it: "layers.*.mlp.down_proj": "rowwise"."""


@contextlib.contextmanager
def rank_invariant(model: nn.Module, leaves: int = LEAVES, plan: Plan | None = None) -> Iterator[list[str]]:
    """Inside, the row-parallel layers of the model add in one tree over ``leaves`` leaves of K, on any number of ranks.

    They are known by ``plan``, by default the model's own ``tp_plan``, and by weights that are DTensors sharded over K. Gives
    their names. Enter it on every rank after the model was divided, and with one rank on the whole model, in
    ``batch_invariant_mode``. Under ``stock_torch()`` the layers compute as they did before. Gradients of experts are refused;
    other gradients flow, but only logprobs are promised to be the same on any number of ranks.

    Raises ModeError outside of the mode. Raises Refused where leaves are no power of two, or the ranks do not divide the
    leaves, or the leaves K, or a layer of the plan adds over ranks in another way, and ValueError where the model has no
    row-parallel layer.
    """
    if not mode.is_on():
        raise mode.ModeError("rank_invariant() is a setting of batch-invariant mode: enter batch_invariant_mode() before it.")
    if leaves < 1 or leaves & (leaves - 1):
        raise Refused(f"rank_invariant: {leaves} leaves are no power of two, so that no rank would have a whole branch.")
    layers = dict(_layers(model, leaves, _plan_of(model) if plan is None else plan))
    if not layers:
        raise ValueError(
            f"rank_invariant: {type(model).__name__} has no row-parallel layer: it has no tp_plan, and no weight is sharded "
            "over K. Give plan={'name.of.the.layer': 'rowwise'}."
        )
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.in_force())
        yield list(layers)


def _plan_of(model: nn.Module) -> Plan:
    return getattr(model, "tp_plan", None) or {}


def _generic(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _layers(model: nn.Module, leaves: int, plan: Plan) -> Iterator[tuple[str, _Layer]]:
    def style_of(name: str) -> str:
        return plan.get(name, plan.get(_generic(name), ""))

    for name, module in model.named_modules():
        style = style_of(name)
        for parameter, _ in module.named_parameters(name, recurse=False):
            if style_of(parameter) and style_of(parameter) not in EXACT and style != _EXPERTS:
                raise Refused(
                    f"rank_invariant: the parameter {parameter} is {style_of(parameter)!r}, and {type(module).__name__} is "
                    f"none of the experts that it has a tree for ({_EXPERTS})."
                )
        if style == _EXPERTS:
            yield name, _Experts(name, module, leaves)
        elif style in ROWWISE and isinstance(module, nn.Linear):
            yield name, _Linear(name, module, leaves, ROWWISE[style])
        elif style and style not in EXACT:
            raise Refused(
                f"rank_invariant: {name} ({type(module).__name__}) has the style {style!r}, whose sum over ranks follows their "
                f"number. What it knows: {', '.join((*ROWWISE, _EXPERTS, *sorted(EXACT)))}."
            )
        elif not style and isinstance(module, nn.Linear) and _shard_dim(module.weight) == 1:
            yield name, _Linear(name, module, leaves, False)


def _shard_dim(x: Any) -> int | None:
    """The dim over which a DTensor is divided; None for one that is whole, and for other tensors."""
    placements = getattr(x, "placements", ())
    dims = [placement.dim % x.dim() for placement in placements if hasattr(placement, "dim")]
    return dims[0] if dims else None


def _is_dtensor(x: Any) -> bool:
    """Asked by its type, which Dynamo knows: it says of a parameter that is a DTensor that it has no ``to_local``."""
    from torch.distributed.tensor import DTensor  # here, as it takes long to import

    return isinstance(x, DTensor)


def _local(x: Any) -> Any:
    return x.to_local() if _is_dtensor(x) else x


class _Layer:
    """One module whose result is a sum over ranks. weight: what is divided over K, its last dim."""

    mesh: Any

    def __init__(self, name: str, module: nn.Module, leaves: int, weight: Any) -> None:
        self.module, self.group = module, None
        self.rank, self.world_size = 0, 1
        K = weight.shape[-1]
        if _shard_dim(weight) == weight.dim() - 1:
            mesh = weight.device_mesh
            (dim,) = [i for i, placement in enumerate(weight.placements) if hasattr(placement, "dim")]
            self.mesh, self.group = mesh, mesh.get_group(dim)
            self.rank, self.world_size = mesh.get_local_rank(dim), mesh.size(dim)
        if leaves % self.world_size:
            raise Refused(
                f"rank_invariant: {self.world_size} ranks do not divide {leaves} leaves, so that a leaf of {name} would lie on "
                f"two ranks. Take a power of two of ranks, up to {leaves}."
            )
        if K % leaves:
            raise Refused(f"rank_invariant: K of {name} is {K}, which cannot be cut into {leaves} equal leaves.")
        self.leaves = leaves // self.world_size

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """The module's forward is ours inside, and what it was before after it."""
        module, before = self.module, self.module.__dict__.get("forward")
        stock: Callable[..., Any] = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs) if mode.is_on() else stock(*args, **kwargs)

        module.forward = forward
        try:
            yield
        finally:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def over_ranks(self, partial: Tensor) -> Tensor:
        """The sum of the ranks' parts, in the mode's order. It may write to partial."""
        if self.group is None:
            return partial
        if torch.is_grad_enabled() and partial.requires_grad:
            summed: Tensor = _SumOverRanks.apply(partial, self.group)  # type: ignore[no-untyped-call]
            return summed
        torch.distributed.all_reduce(partial, group=self.group)
        return partial


class _SumOverRanks(torch.autograd.Function):
    """Each rank's part has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Any) -> Tensor:
        total = partial.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Linear(_Layer):
    """round(tree over all leaves + bias)."""

    def __init__(self, name: str, module: nn.Linear, leaves: int, takes_whole_input: bool) -> None:
        super().__init__(name, module, leaves, module.weight)
        self.takes_whole_input = takes_whole_input

    def __call__(self, input: Any) -> Any:
        x, gives_dtensor = self._columns(input)
        out = self.over_ranks(torch.ops.batchinv.row_parallel(x, _local(self.module.weight), self.leaves))
        bias = _local(self.module.bias)
        out = (out if bias is None else out + bias.to(out.dtype)).to(x.dtype)
        if not gives_dtensor:
            return out
        from torch.distributed.tensor import DTensor, Replicate

        return DTensor.from_local(out, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)

    def _columns(self, input: Any) -> tuple[Tensor, bool]:
        """This rank's columns of the input; and whether it came as a DTensor, as the hooks of torch's styles give it."""
        if _is_dtensor(input):
            if self.group is None:
                return input.to_local(), True
            from torch.distributed.tensor import Shard

            return input.redistribute(placements=[Shard(input.dim() - 1)]).to_local(), True
        if self.group is None or not self.takes_whole_input:
            return input, False
        size = input.shape[-1] // self.world_size
        return input[..., self.rank * size : (self.rank + 1) * size], False


class _Experts(_Layer):
    """round(tree over all leaves of: sum over a token's experts, ascending by choice, of weight * down(leaf)).

    In the form that transformers' experts have: ``gate_up_proj`` [E, 2 * I, H] or ``up_proj``, ``down_proj`` [E, H, I]. The
    experts of a token are added before the leaves are, so that what travels is a row a token, and not one an expert.
    """

    def __init__(self, name: str, module: nn.Module, leaves: int) -> None:
        given = {word: getattr(module, word, False) for word in ("has_bias", "has_post_expert_norm", "is_transposed")}
        wrong = [word for word, value in given.items() if value]
        if not hasattr(module, "down_proj") or wrong:
            why = f"sets {', '.join(wrong)}" if wrong else "has no down_proj"
            raise Refused(f"rank_invariant: {name} ({type(module).__name__}) {why}, and there is no tree for such experts.")
        super().__init__(name, module, leaves, module.down_proj)

    def __call__(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Tensor:
        x, chosen, weights = (_local(given) for given in (hidden_states, top_k_index, top_k_weights))
        module: Any = self.module
        down = _local(module.down_proj)
        if torch.is_grad_enabled() and any(given.requires_grad for given in (x, weights, down)):
            raise Refused("rank_invariant: experts have no gradients there; call the model under torch.no_grad().")
        n_tokens, top_k = chosen.shape
        ids, order = torch.sort(chosen.reshape(-1), stable=True)
        offs = torch.searchsorted(ids, torch.arange(down.shape[0], device=ids.device), right=True).int()
        back = torch.argsort(order)
        up = _local(module.gate_up_proj if module.has_gate else module.up_proj)
        inner = torch.ops.batchinv.grouped_product(x[order // top_k], up, offs, False)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        weights = weights.reshape(-1, 1)
        size = inner.shape[-1] // self.leaves
        parts = []
        for leaf in range(self.leaves):
            terms = slice(leaf * size, (leaf + 1) * size)
            rows = torch.ops.batchinv.grouped_product(inner[:, terms], down[:, :, terms], offs, True)[back]
            parts.append((rows * weights.to(rows.dtype)).view(n_tokens, top_k, -1).sum(1))
        return self.over_ranks(torch.ops.batchinv.tree_sum(torch.stack(parts))).to(x.dtype)
