"""The native engine: plain PyTorch, one optimizer step at a time, on however many ranks."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from megaresnorm.assemble import Assembled
from megaresnorm.checkpoint.format import FINITE, TensorSlices, is_finite
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import EngineState
from megaresnorm.data.loader import Batch
from megaresnorm.engines.engine import Decision, GradientStats, StepStats
from megaresnorm.engines.state import FullState, clipper_slices, placements
from megaresnorm.errors import CheckpointError
from megaresnorm.model.dropout import DropoutKey
from megaresnorm.model.transformer import Transformer
from megaresnorm.optim import MOMENTS, GradientClipper, Optimizer, gradient_norms
from megaresnorm.parallel.collectives import all_reduce
from megaresnorm.parallel.data_parallel import grad_sync, local
from megaresnorm.parallel.gradients import reduce_gradients, reductions
from megaresnorm.recipe import Recipe

if TYPE_CHECKING:
    from megaresnorm.parallel.pipeline import Pipeline


class _Kind(NamedTuple):
    """How a parameter's gradient counts in the norm of all.

    Attributes:
        divided: sharded over tp.
        copy: an embedding that the first stage has as well.
    """

    divided: bool
    copy: bool


class NativeEngine:
    """Owns this rank's part of the model, its optimizer and its clipper.

    Attributes:
        reductions: of gradients, beside those of data parallelism.
    """

    def __init__(self, assembled: Assembled, recipe: Recipe) -> None:
        self.assembled, self.context = assembled, assembled.context
        self._z_loss, self._seed = recipe.train.z_loss, recipe.train.seed
        self._drops = recipe.model.dropout > 0.0
        self._shards_gradients = recipe.parallel.accumulate == "sharded"
        self._parameters = assembled.parameters()
        table, tp = assembled.table, self.context.tp
        tied = self._parameters.get("embedding.weight") if recipe.model.tied_embeddings else None
        copies = assembled.copies
        kinds = {name: _Kind(table[name].split is not None, name in copies) for name in self._parameters}
        self._optimizer = Optimizer(self._parameters, table, recipe.optim, kinds)
        partial = (p for name, p in self._parameters.items() if table[name].partial)
        self.reductions = reductions(partial, tied, tp=tp, embedding=self.context.embedding)
        self._clips_each = recipe.optim.clip == "adagc"
        self._clipper = GradientClipper(recipe.optim, len(self._parameters))
        self._updates = 0
        self._pipeline = self._make_pipeline(recipe) if self.context.pp.size > 1 else None

    def _make_pipeline(self, recipe: Recipe) -> "Pipeline":
        from megaresnorm.parallel.pipeline import Pipeline  # a second's imports, for runs with stages alone

        layout, dim, seq = self.assembled.layout, recipe.model.dim, recipe.model.seq_len

        def wire(batch: int) -> tuple[int, int]:
            return layout.tokens(torch.empty(batch * seq, device="meta")).shape[0], layout.width(dim)

        return Pipeline(
            self.assembled.modules,
            recipe.parallel.num_stages,
            self.context.pp,
            recipe.parallel.pipeline,
            wire,
            self.assembled.residual_dtype,
            self.assembled.device,
            shards_gradients=self._shards_gradients,
        )

    @property
    def model(self) -> Transformer:
        """This rank's part of the model, where it has a single stage of it."""
        return self.assembled.model

    def step(self, microbatches: Iterable[Batch], lr: float, accept: Callable[[GradientStats], Decision]) -> StepStats:
        """Accumulate the gradients of one global batch in FP32, ask ``accept``, clip and update. Collective.

        1. Count the valid tokens of the whole batch (dp): the loss is a sum divided by that, however unequal its parts.
        2. Forward and backward of every microbatch, or the pipeline's schedule (tp and pp inside; dp as ``grad_sync``).
        3. Add up what dp does not: partial sums over tp, tied embeddings over the first and last stage.
        4. Norms of all gradients (model_shards, pp); ``accept`` decides, from the same numbers on every rank.
        5. Clip, AdamW, renew the BF16 copies; a step that is refused changes nothing.

        Args:
            microbatches: this rank's share of the batch.
            lr: the schedule's learning rate.
            accept: asked once the gradients are known, and before anything has changed.

        Communication:
            That of ``gradients``. For the norms one all-reduce over model_shards, of a number for each gradient tensor
            that the optimizer collects, and one of a single number over pp.
        """
        with _no_garbage_collection():
            return self._step(microbatches, lr, accept)

    def gradients(self, microbatches: Iterable[Batch]) -> tuple[float, int]:
        """Put the reduced gradients of one global batch into the parameters' ``grad``. Collective.

        Returns:
            Mean loss a token and number of tokens. A batch without labels has no gradients, and its loss is 0.

        Communication:
            All-reduces of 8 bytes: one over dp for the number of tokens, one over dp and one over pp for the loss.
            Beside these what the model, ``Pipeline.run``, ``grad_sync`` and ``reduce_gradients`` send.
        """
        batches = list(microbatches)
        tokens = self._count(batches)
        if not tokens:
            return 0.0, 0
        scale = 1 / tokens
        loss = self._sum(self._run_pipeline(batches, scale) if self._pipeline else self._accumulate(batches, scale))
        reduce_gradients(self.reductions)
        return loss / tokens, tokens

    def _step(self, microbatches: Iterable[Batch], lr: float, accept: Callable[[GradientStats], Decision]) -> StepStats:
        loss, tokens = self.gradients(microbatches)
        if not tokens:  # nothing was to be learned: neither moments nor decay may move a weight
            self._optimizer.zero_grad()
            return StepStats(None, 0.0, 0, applied=False)
        gradients = self._optimizer.collect(per_parameter=self._clips_each)
        norms, total = self._norms(gradients)
        stats = GradientStats(loss, total.item())
        applied = accept(stats) is Decision.APPLY
        if applied:
            self._clipper.clip(gradients, norms, total)
            self._optimizer.step(lr)
            self._updates += 1
            self.assembled.weights_changed()
        self._optimizer.zero_grad()
        return StepStats(stats.loss, stats.norm, tokens, applied)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float | None:
        """Mean cross entropy a token, in nats, without dropout and z-loss. Collective.

        Returns:
            None without labels.

        Communication:
            All-reduces of 8 bytes: one over dp for the number of tokens, one over dp and one over pp for the loss.
            Beside these what forward passes send.
        """
        batches = list(batches)
        tokens = self._count(batches)
        if not tokens:
            return None
        if self._pipeline is not None:
            return self._sum(self._run_pipeline(batches, None)) / tokens
        total = 0.0
        for batch in batches:
            nll, _ = self._losses(self.model, batch, None, 1.0)
            total += nll.item()
        return self._sum(total) / tokens

    def state(self) -> EngineState:
        """The part of the engine's state that is not tensors."""
        return EngineState(updates=self._updates, clipper_steps=self._clipper.steps)

    def full_state(self) -> FullState:
        """Every weight, whole, by global name; ``FullState`` has what ranks must observe."""
        return FullState(self.assembled, {name: local(p.detach()) for name, p in self._parameters.items()})

    @cached_property
    def sharded_state(self) -> dict[str, dict[str, TensorSlices]]:
        """The whole model's tensors by group and global name, with this rank's live slices of them.

        The groups are weights, optimizer, and clipper where each tensor is clipped against its own history.
        """
        mine = {name: local(p.detach()) for name, p in self._parameters.items()}
        moments = {name: self._optimizer.moments(p) for name, p in self._parameters.items()}
        groups: dict[str, dict[str, TensorSlices]] = {"weights": {}, "optimizer": {}}
        for name, place in placements(self.assembled).items():
            groups["weights"][name] = place.of(mine.get(name))
            for key in MOMENTS:
                groups["optimizer"][f"{key}.{name}"] = place.of(moments.get(name, {}).get(key))
        if self._clips_each:
            averages = dict(zip(self._parameters, self._clipper.averages.split(1), strict=True))
            groups["clipper"] = clipper_slices(self.assembled, averages)
        return groups

    def load(self, checkpoint: Checkpoint, state: EngineState) -> None:
        """Take over a checkpoint of the same model, saved in whatever layout.

        Args:
            state: the ``state()`` of the engine that saved it.
        """
        for group, members in self.sharded_state.items():
            if group != "clipper" or group in checkpoint.tensors:  # clipping may have been another until then
                checkpoint.load(group, members)
        self._updates = state.updates
        self._clipper.steps = state.clipper_steps if "clipper" in self.sharded_state else 0
        self._optimizer.set_updates(self._updates)
        self.assembled.weights_changed()

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Take over the weights alone of a checkpoint of a model with the same parameters, saved in whatever layout."""
        checkpoint.load("weights", self.sharded_state["weights"])
        self.assembled.weights_changed()

    def check_finite(self, where: str) -> None:
        """Check that all weights and moments of this rank are finite.

        Args:
            where: begins the line of the error.

        Raises:
            CheckpointError: one is not; the line names it.
        """
        for group in FINITE:
            for name, slices in self.sharded_state[group].items():
                if slices.local is not None and not is_finite(slices.local):
                    raise CheckpointError(f"{where}{group} {name} is not finite; use an older checkpoint")

    def _accumulate(self, batches: Sequence[Batch], scale: float) -> float:
        (module,) = self.assembled.modules.values()
        loss = torch.zeros((), dtype=torch.float64)
        for i, batch in enumerate(batches):
            with grad_sync(module, last=i == len(batches) - 1, sharded=self._shards_gradients):
                nll, objective = self._losses(module, batch, self._dropout(batch), scale)
                objective.backward()
            loss += nll.detach().cpu()
        return loss.item()

    def _run_pipeline(self, batches: Sequence[Batch], scale: float | None) -> float:
        """Sum of the losses on the last stage, 0 on the others. A ``scale`` of None means forward alone."""
        assert self._pipeline is not None
        missing = self._pipeline.num_microbatches(len(batches)) - len(batches)
        filler = batches[0]._replace(labels=torch.full_like(batches[0].labels, -1))
        batches = [*batches, *[filler] * missing]
        whole = batches[0] if len(batches) == 1 else Batch(*(_joined(column) for column in zip(*batches, strict=True)))
        losses: list[Tensor] = []

        def loss(logits_TV: Tensor, labels_BS: Tensor) -> Tensor:
            nll, objective = self._loss(logits_TV, labels_BS, 1.0 if scale is None else scale)
            losses.append(nll.detach())
            return objective

        arguments: dict[str, Any] = {} if whole.documents is None else {"documents_BS": whole.documents}
        if scale is not None and self._drops:
            arguments["dropout"] = self._dropout(whole)
        self._pipeline.run(whole.tokens, whole.labels, len(batches), loss, backward=scale is not None, **arguments)
        return sum(nll.item() for nll in losses)

    def _losses(
        self, module: nn.Module, batch: Batch, dropout: DropoutKey | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        logits_TV = module(batch.tokens, dropout, documents_BS=batch.documents)
        return self._loss(logits_TV, batch.labels, scale)

    def _loss(self, logits_TV: Tensor, labels_BS: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return self.assembled.cross_entropy(logits_TV, labels_BS.flatten(), self._z_loss, scale)

    def _dropout(self, batch: Batch) -> DropoutKey | None:
        if not self._drops:
            return None
        seq_len = batch.tokens.shape[1]
        rows = batch.samples.unsqueeze(1) * seq_len + torch.arange(seq_len, device=batch.samples.device)
        return DropoutKey(self._seed, rows.flatten())

    def _count(self, batches: Sequence[Batch]) -> int:
        """Number of valid labels on all ranks of dp."""
        mine = sum(int((batch.labels >= 0).sum()) for batch in batches)
        if self.context.dp.size == 1:
            return mine
        return int(all_reduce(torch.tensor([mine], device=self.assembled.device), self.context.dp).item())

    def _sum(self, loss: float) -> float:
        """Sum over dp and pp. It is already equal on tp."""
        if self.context.dp.size == self.context.pp.size == 1:
            return loss
        total = torch.tensor([loss], dtype=torch.float64, device=self.assembled.device)
        return all_reduce(all_reduce(total, self.context.dp), self.context.pp).item()

    def _norms(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Norms of every whole gradient, and of all of them together. Collective."""
        norms = gradient_norms(gradients)
        if self.context.world.size == 1:
            return norms, torch.linalg.vector_norm(norms)
        kinds: Any = self._optimizer.kinds(per_parameter=self._clips_each)
        # A rank of tp has its own share of a sharded gradient, and the same as rank 0 of any other.
        counted = norms.new_tensor([kind.divided or self.context.tp.rank == 0 for kind in kinds])
        squares = all_reduce((norms * counted).square(), self.context.model_shards)
        owned = squares.new_tensor([not kind.copy for kind in kinds])
        total = all_reduce((squares * owned).sum().unsqueeze(0), self.context.pp).sqrt().squeeze(0)
        return squares.sqrt(), total


def _joined(column: Sequence[Tensor | None]) -> Any:
    """The tensors of several microbatches as one; None where they have none."""
    tensors = [t for t in column if t is not None]
    return torch.cat(tensors) if tensors else None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch Python's search for cycles off during a step.

    A step of a deep model makes thousands of small objects, none of them in a cycle. Looking for cycles among them, and
    among all that was imported, took 30 of 450 ms at 200 blocks.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
