"""Adafactor for sharded parameters: its statistics are those of whole matrices, however they are sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from strategies.common.shards import Layout, Piece, add_over, layout_of, local, local_of
from strategies.optimizers import adafactor_passes as passes_of
from strategies.optimizers.norms import begun, check, evaluated, flat_gradient, squared_norm, wide, with_gradient
from strategies.optimizers.passes import Compiles, is_together, number_of, pairs_of, passable
from strategies.optimizers.rectangles import Rectangle, blocks_of, stack_of
from strategies.optimizers.transient import Sharing, traced_one_by_one


class Adafactor(Compiles, torch.optim.Optimizer):
    """Adaptive rates from row and column means of the squared gradient (Shazeer & Stern 2018, algorithms 4 and 5).

    The mathematics and arguments are those of `torch.optim.Adafactor`. With G a gradient of R rows and C columns:

        beta = 1 - t^beta2_decay,  rho = min(lr, 1 / sqrt(t)),  alpha = max(eps[1], RMS(X)) rho
        row = beta row + (1 - beta) mean_columns(G^2),  col = beta col + (1 - beta) mean_rows(G^2)
        V = row col / max(mean(row), eps[0]),  U = G / sqrt(max(V, eps[0]^2))
        X = (1 - lr weight_decay) X - alpha U / max(1, RMS(U) / d)

    A parameter with more dimensions is a stack of matrices over its last two; for one with fewer, V is the running mean
    of G^2 itself. All means and RMS values are of whole parameters. Each step makes two all-reduces over the ranks that
    share parameters: one of all row and column sums, one of all RMS values. Padding between pieces is never touched.

    Large fp32 models on CPU are stepped by compiled passes (`kernels`), which keep no updates. Elsewhere a step needs
    memory for one update at a time; for sharded weights each is computed twice, before and after RMS values are known,
    rather than kept for all weights. Nothing waits for the device.

    State per tensor: `step` (scalar, on the tensor's device); `row_var` [.., R, 1] and `col_var` [.., 1, C], whole on
    every rank; `variance`, of the rank's own elements of vectors. A tensor of several pieces has those of all pieces
    concatenated.

    Args:
        eps: lower bounds; None for the first is the machine epsilon of the parameter's dtype.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, params: Any, lr: float = 1e-2, beta2_decay: float = -0.8,
                 eps: tuple[float | None, float] = (None, 1e-3), d: float = 1.0, weight_decay: float = 0.0) -> None:
        check(lr, weight_decay)
        if not beta2_decay <= 0:
            raise ValueError(f"beta2_decay = {beta2_decay}: the exponent of the step is not positive")
        if (eps[0] is not None and not eps[0] >= 0) or not eps[1] >= 0:
            raise ValueError(f"eps = {eps}: bounds from below are not negative")
        if not d >= 1:
            raise ValueError(f"d = {d}: a threshold of clipping is at least 1")
        super().__init__(params, {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d,
                                  "weight_decay": weight_decay})
        self.compiled = self.compiles(self.param_groups)

    def fresh_state(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of a tensor before its first step."""
        own, pieces = local(tensor), layout_of(tensor).pieces
        matrices = [stack_of(piece.shape) for piece in pieces if len(piece.shape) > 1]
        state = {"step": torch.zeros((), device=own.device)}
        if matrices:
            state["row_var"] = own.new_zeros(sum(stack * rows for stack, rows, _ in matrices))
            state["col_var"] = own.new_zeros(sum(stack * columns for stack, _, columns in matrices))
        if len(matrices) < len(pieces):
            state["variance"] = own.new_zeros(sum(piece.numel for piece in pieces if len(piece.shape) < 2))
        if len(pieces) == 1:
            return state | {name: state[name].view(shape) for name, shape in _shapes(pieces[0]).items()}
        return state

    gathers_updates = False
    one_by_one = True  # a whole tensor's step keeps nothing until the next, so that planning traces a few of many equal

    def transient_bytes(self, sharing: Sharing) -> int:
        """One update at a time and sums of its squares, as traced; no kernel here allocates memory of its own."""
        with self.planned(sharing.on_cpu):
            return traced_one_by_one(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every tensor that has a gradient. All ranks of a group must take part, with the same parameters.

        Raises:
            ValueError: a gradient is sparse, or a parameter is not contiguous or is sharded in a way `layout_of`
                rejects.
        """
        loss = evaluated(closure)
        shared: dict[Any, list[_Work]] = {}
        together, passed = passes_of.Whole([], []), []
        for tensor, settings in with_gradient(self.param_groups):
            state, layout = begun(self, tensor), layout_of(tensor)
            compiled = self.compiled and passable(tensor, state)
            state["step"] += 1
            if compiled:
                passed.append(local(tensor))
            if compiled and is_together(layout):
                passes_of.add_whole(together, tensor, state, layout, settings)
                continue
            work = (_PassedWork if compiled else _Work)(tensor, state, settings, layout)
            if work.group is None:
                _update([work], None)
            else:
                shared.setdefault((work.group, tensor.dtype), []).append(work)
        passes_of.step_whole(together)
        for (group, _), works in shared.items():
            _update(works, group)
        torch.autograd.graph.increment_version(passed)  # autograd does not see what kernels write
        return loss


def _update(works: Sequence[_Work], group: Any) -> None:
    """One step of tensors of one dtype that a group of ranks shares, or that this rank holds whole (group None)."""
    sums = [work.square_sums() for work in works]
    add_over(group, sums)
    for work, own in zip(works, sums, strict=True):
        work.blend(own)
    del sums
    if group is None:
        for work in works:
            work.step_whole()
        return
    norms = torch.cat([work.shares() for work in works])
    add_over(group, [norms])
    for work, own in zip(works, norms.split([len(work.slices) for work in works]), strict=True):
        work.step(own)


class _Work:
    """One tensor in one step: its pieces, and the partial sums that are reduced over ranks together."""

    def __init__(self, tensor: torch.Tensor, state: dict[str, torch.Tensor], settings: dict[str, Any], layout: Layout
                 ) -> None:
        weight, gradient = local_of(tensor), flat_gradient(tensor)
        self.group = layout.group
        step = state["step"].to(wide(weight.device))
        self.fresh = (step ** settings["beta2_decay"]).to(weight.dtype)  # 1 - beta, the weight of the new mean
        rate = step.rsqrt().clamp(max=settings["lr"])
        self.slices = [_Slice(piece, piece.of(weight), piece.of(gradient), found, settings, rate)
                       for piece, found in zip(layout.pieces, views(state, layout), strict=True)]

    def square_sums(self) -> torch.Tensor:
        """The rank's sums of squares over columns, then over rows, of all its matrices, concatenated."""
        statistics = self._statistics()
        sums = self.slices[0].weight.new_zeros(sum(own.numel() for own in statistics))
        parts = [part.view(own.shape) for part, own in zip(
            sums.split([own.numel() for own in statistics]), statistics, strict=True)]
        self._add_squares(list(zip(parts[::2], parts[1::2], strict=True)))
        return sums

    def _add_squares(self, sums: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add the rank's part of the means over columns [L, R] and over rows [L, C] of each matrix."""
        for slice_, (row, column) in zip(self._matrices(), sums, strict=True):
            slice_.add_squares(row, column)

    def shares(self) -> torch.Tensor:
        """[slices, 2]: the rank's shares of the squared norms of weights and updates."""
        return torch.stack([slice_.shares() for slice_ in self.slices])

    def step(self, norms: torch.Tensor) -> None:
        """Decay and update the weights. `norms`: [slices, 2], squared, of whole weights and updates."""
        for slice_, norm in zip(self.slices, norms, strict=True):
            slice_.step(norm)

    def step_whole(self) -> None:
        """Decay and update whole parameters, whose updates are computed once."""
        for slice_ in self.slices:
            slice_.step_whole()

    def blend(self, sums: torch.Tensor) -> None:
        """Update the running means of whole parameters, given `sums` over all ranks."""
        statistics = self._statistics()
        for own, part in zip(statistics, sums.split([own.numel() for own in statistics]), strict=True):
            own.lerp_(part.view(own.shape), self.fresh)
        for slice_ in self.slices:
            if not slice_.matrix:
                slice_.variance.lerp_(slice_.gradient.square(), self.fresh)

    def _statistics(self) -> list[torch.Tensor]:
        return [own for slice_ in self._matrices() for own in (slice_.row, slice_.column)]

    def _matrices(self) -> list[_Slice]:
        return [slice_ for slice_ in self.slices if slice_.matrix]


class _Slice:
    """A rank's elements of one parameter, flat, with the parameter's statistics.

    Attributes:
        row [L, R], column [L, C]: running means of a whole parameter with two dimensions or more.
        variance: of the rank's own elements of any other parameter, flat.
    """

    def __init__(self, piece: Piece, weight: torch.Tensor, gradient: torch.Tensor, found: dict[str, torch.Tensor],
                 settings: dict[str, Any], rate: torch.Tensor) -> None:
        self.weight, self.gradient, self.settings, self.rate = weight, gradient, settings, rate
        self.piece, self.matrix, self.numel = piece, len(piece.shape) > 1, math.prod(piece.shape)
        smallest = settings["eps"][0]
        self.eps = torch.finfo(weight.dtype).eps if smallest is None else smallest
        if self.matrix:
            stack, rows, columns = stack_of(piece.shape)
            self.row, self.column = found["row_var"].view(stack, rows), found["col_var"].view(stack, columns)
        else:
            self.variance = found["variance"].view(-1)

    def add_squares(self, row: torch.Tensor, column: torch.Tensor) -> None:
        """Add this rank's part of the means over columns to `row` [L, R] and over rows to `column` [L, C]."""
        for block in blocks_of(self.piece):
            squares = block.of(self.gradient).square()  # pairwise sums, faster than norms over columns
            row[block.matrices, block.rows] += squares.sum(2).div_(column.shape[1])
            column[block.matrices, block.columns] += squares.sum(1).div_(row.shape[1])

    def updates(self) -> list[torch.Tensor]:
        """New tensors U of algorithm 4, before clipping, one for each block."""
        if not self.matrix:
            return [self.variance.clamp(min=self.eps**2).rsqrt_().mul_(self.gradient)]
        share = self.row / self.row.mean(1, keepdim=True).clamp_(min=self.eps)
        return [self._block_update(share, block) for block in blocks_of(self.piece)]

    def _block_update(self, share: torch.Tensor, block: Rectangle) -> torch.Tensor:
        variance = (share[block.matrices, block.rows].unsqueeze(2)
                    * self.column[block.matrices, block.columns].unsqueeze(1))
        return variance.clamp_(min=self.eps**2).rsqrt_().mul_(block.of(self.gradient)).view(-1)

    def shares(self) -> torch.Tensor:
        """[2]: the rank's share of the squared norms of weight and update."""
        return self.norms(self.updates())

    def step(self, norms: torch.Tensor) -> None:
        """Decay and update the weight. `norms`: [2], squared, of the whole weight and of the whole update."""
        self.apply(self.updates(), norms)

    def step_whole(self) -> None:
        """Decay and update a whole parameter, whose update is computed once."""
        updates = self.updates()
        self.apply(updates, self.norms(updates))

    def norms(self, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        """[2]: the rank's share of the squared norms of weight and update."""
        zero = torch.zeros((), dtype=wide(self.weight.device), device=self.weight.device)
        return torch.stack([squared_norm(self.weight), sum((squared_norm(update) for update in updates), zero)])

    def apply(self, updates: Sequence[torch.Tensor], norms: torch.Tensor) -> None:
        """Decay and update the weight. `norms`: [2], squared, of the whole weight and of the whole update."""
        weight_rms, update_rms = (norms / max(1, self.numel)).sqrt()
        if self.settings["weight_decay"]:
            self.weight.mul_(1 - self.settings["lr"] * self.settings["weight_decay"])
        rate = weight_rms.clamp(min=self.settings["eps"][1]) * self.rate
        rate = (rate / (update_rms / self.settings["d"]).clamp(min=1.0)).to(self.weight.dtype)
        at = 0
        for update in updates:
            self.weight[at:at + update.numel()].addcmul_(update, rate, value=-1)
            at += update.numel()


class _PassedWork(_Work):
    """A `_Work` of compiled passes over all its rectangles; updates are computed for their norms and to be applied."""

    def _add_squares(self, sums: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        spans = passes_of.Spans()
        for slice_, (row, column) in zip(self._matrices(), sums, strict=True):
            spans.add(slice_.piece, slice_.weight, slice_.gradient, row, column)
        passes_of.add_squares(spans, self.slices[0].weight)

    def shares(self) -> torch.Tensor:
        self._spans = passes_of.Spans()
        rows = passes_of.shares_of([slice_.row for slice_ in self._matrices()], self.slices[0].eps)
        shares, one = iter(rows), self.slices[0].weight.new_ones(1, 1)
        self._held = rows, one  # the spans know only where they are
        for number, slice_ in enumerate(self.slices):
            row = next(shares) if slice_.matrix else one
            column = slice_.column if slice_.matrix else slice_.variance
            self._spans.add(slice_.piece, slice_.weight, slice_.gradient, row, column, number)
        return passes_of.norms_of(self._spans, len(self.slices), self.slices[0].eps)

    def step(self, norms: torch.Tensor) -> None:
        first = self.slices[0]
        eps, floor, threshold, keep = passes_of.scalars_of(first.settings, first.weight.dtype)
        rates = [max((weight / max(1, slice_.numel)) ** 0.5, floor) * number_of(first.rate)
                 / max(1.0, (update / max(1, slice_.numel)) ** 0.5 / threshold)
                 for slice_, (weight, update) in zip(self.slices, pairs_of(norms), strict=True)]
        passes_of.apply(self._spans, rates, eps, keep)

    def step_whole(self) -> None:
        self.step(self.shares())


# ---- where in the state each piece's part is

def views(state: dict[str, torch.Tensor], layout: Layout) -> list[dict[str, torch.Tensor]]:
    """Views of each piece's part of a state: `row_var` and `col_var` in torch's shapes, or `variance`, flat."""
    at = dict.fromkeys(("row_var", "col_var", "variance"), 0)
    flat = {name: state[name].view(-1) for name in at if name in state}
    found = []
    for piece in layout.pieces:
        own = {}
        for name, shape in _shapes(piece).items():
            size = math.prod(shape)
            own[name] = flat[name][at[name]:at[name] + size].view(shape)
            at[name] += size
        found.append(own)
    return found


def _shapes(piece: Piece) -> dict[str, tuple[int, ...]]:
    if len(piece.shape) < 2:
        return {"variance": (piece.numel,)}
    *leading, rows, columns = piece.shape
    return {"row_var": (*leading, rows, 1), "col_var": (*leading, 1, columns)}
