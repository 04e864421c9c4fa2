"""The native engine: plain PyTorch, one optimizer step at a time, on however many ranks."""

from collections.abc import Callable
from functools import cached_property
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megaresnorm.assemble import build_model
from megaresnorm.checkpoint.format import FINITE, TensorSlices, is_finite
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import EngineState
from megaresnorm.clipping import GradientClipper
from megaresnorm.data.loader import Batch, SampleRange, StepBatch
from megaresnorm.engines.engine import StepStats
from megaresnorm.engines.garbage import no_garbage_collection
from megaresnorm.engines.graphs import MicrobatchGraph, Recorder
from megaresnorm.engines.low_precision import LowPrecision
from megaresnorm.engines.state import FullState, numbers_of_parameters, placements, rounded_weights
from megaresnorm.engines.step_vector import (
    OwnShares,
    gradient_norms,
    own_shares,
    own_squares,
    stats_of,
    sum_over_ranks,
    whole_norms,
)
from megaresnorm.errors import CheckpointError
from megaresnorm.kernels.cross_entropy import differentiate
from megaresnorm.layout import logit_rows_of
from megaresnorm.model.dropout import DropoutKey
from megaresnorm.model.transformer import Transformer
from megaresnorm.optim import Gradient, GradientPlacement, Optimizer
from megaresnorm.parallel.collectives import all_reduce
from megaresnorm.parallel.data_parallel import grad_sync, local, pad_uneven_shards, replicate_model, shard_model
from megaresnorm.parallel.gradients import reduce_gradients, reductions
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.precision.loss_scale import LossScale
from megaresnorm.recipe import Recipe
from megaresnorm.recompute_auto import plan_on_all_ranks

if TYPE_CHECKING:
    from megaresnorm.parallel.pipeline import Pipeline


class NativeEngine:
    """An ``Engine`` of plain PyTorch: DDP or FSDP2, torch's pipelines, AdamW, 16-bit copies of the weights.

    Args:
        recipe: resolved, so that model.vocab_size is set.
        context: None for one process.

    Attributes:
        assembled: the bare stages.
        modules: the stages by number as data parallelism has wrapped them, to be called in training.
        reductions: of gradients, beside those of data parallelism.
        low_precision: copies of weights and scales.
    """

    def __init__(
        self, recipe: Recipe, context: ParallelContext | None = None, device: str | torch.device = "cpu"
    ) -> None:
        self.context = context = context or ParallelContext.single()
        self._z_loss, self._seed = recipe.train.z_loss, recipe.train.seed
        self._drops = recipe.model.dropout > 0.0
        self._shards_gradients = recipe.parallel.accumulate == "sharded"
        plans = recipe.recompute.policy == "auto"
        self.assembled = assembled = build_model(
            recipe.model,
            recipe.precision,
            recipe.kernels,
            recipe.parallel,
            context,
            recompute=recipe.recompute,
            segments=plan_on_all_ranks(recipe, context, torch.device(device)) if plans else None,
            seed=recipe.train.seed,
            device=device,
            compiled=recipe.train.compile,
            logit_rows=logit_rows_of(recipe, context.tp.size, torch.device(device).type),
            shard=self._sharding(recipe) if context.dp_shard.size > 1 else None,
        )
        self.modules = {number: self._wrapped(model) for number, model in assembled.models.items()}
        self._loss_scale = LossScale.of(recipe.precision)
        self._parameters, table = assembled.parameters(), assembled.table
        self.low_precision = LowPrecision(recipe.precision, assembled, self._parameters)
        tied = self._parameters.get("embedding.weight") if recipe.model.tied_embeddings else None
        at = {n: GradientPlacement(table[n].split is not None, n in assembled.copies) for n in self._parameters}
        rounded = rounded_weights(assembled, self._seed)
        self._optimizer = Optimizer(self._parameters, table, recipe.optim, at, rounded)
        partial = (p for name, p in self._parameters.items() if table[name].partial)
        self.reductions = reductions(partial, tied, tp=context.tp, embedding=context.embedding)
        self._clipper = GradientClipper(recipe.optim, len(self._parameters), assembled.device)
        self._own: OwnShares | None = None  # known with the first gradients
        self._updates = 0
        # The next step's samples and their valid tokens on all ranks, which the last step has summed.
        self._counted: tuple[SampleRange | None, int] | None = None
        self._pipeline = self._make_pipeline(recipe) if context.pp.size > 1 else None
        self._graph: MicrobatchGraph | None = None
        if assembled.compiled == "cuda_graphs":
            self.record_microbatches()

    def record_microbatches(self, recorder: Recorder | None = None) -> None:
        """Replay microbatches from now on; the recorder is that of ``MicrobatchGraph``. For one rank alone."""
        assert self.context.world.size == 1, "checked with the recipe: other ranks' messages are not recorded"
        self._optimizer.keep_gradients()
        self._graph = MicrobatchGraph(self._forward_backward, self.assembled.device, recorder)

    def _sharding(self, recipe: Recipe) -> Callable[[Transformer], None]:
        """What shards a stage over dp_shard while it is on the meta device."""
        reshards = recipe.parallel.reshard_after_forward and recipe.parallel.num_stages == 1
        return lambda model: shard_model(model, model.parts(), self.context, reshard_after_forward=reshards)

    def _wrapped(self, model: Transformer) -> nn.Module:
        if self.context.dp_shard.size > 1:
            pad_uneven_shards(model)
            return model
        return replicate_model(model, self.context.dp) if self.context.dp_replicate.size > 1 else model

    def _make_pipeline(self, recipe: Recipe) -> "Pipeline":
        from megaresnorm.parallel.pipeline import Pipeline  # a second's imports, for runs with stages alone

        (model, *_) = self.assembled.models.values()
        return Pipeline(
            self.modules,
            recipe.parallel.num_stages,
            self.context.pp,
            recipe.parallel.pipeline,
            model.wire,
            self.assembled.device,
            shards_gradients=self._shards_gradients,
        )

    @property
    def model(self) -> Transformer:
        """See ``Engine``."""
        return self.assembled.model

    @property
    def stack(self) -> Callable[[int], int] | None:
        """See ``Engine``: the number of microbatches that the pipeline's schedule needs."""
        return None if self._pipeline is None else self._pipeline.num_microbatches

    def step(self, batch: StepBatch, lr: float, stop: Callable[[], bool] = lambda: False) -> StepStats:
        """Accumulate the gradients of one global batch in FP32, clip and update. Collective.

        1. The valid tokens of the whole batch, which the step before has summed: the loss is divided by them, however
           unequal the parts are.
        2. Forward and backward of every microbatch, or the pipeline's schedule (tp and pp inside; dp as ``grad_sync``).
        3. Add up what dp does not: partial sums over tp, tied embeddings over the first and last stage.
        4. One vector over all ranks: loss, squares of the gradients, stop flag, valid tokens of the next step.
        5. Clip, AdamW, renew the 16-bit copies: on the device, and nothing at all where loss or norm is not finite.
        6. The host reads the vector.

        Communication:
            That of ``gradients``, but one all-reduce of 4 numbers FP64 over all ranks in the place of its own; with
            ``clip: adagc`` one more over model_shards, of a number for each parameter.
        """
        with no_garbage_collection():
            tokens = self._valid_tokens(batch)
            self.low_precision.begin_step()
            loss = self._backward(batch, tokens)
            gradients = self._optimizer.collect(per_parameter=self._clipper.clips_each) if tokens else []
            following = (None, lambda: 0) if batch.following is None else batch.following
            norms = gradient_norms([gradient.tensor for gradient in gradients]) if tokens else None
            if self._own is None and gradients:
                self._own = own_shares(gradients, self.context)
            squares = None if norms is None or self._own is None else own_squares(norms, self._own)
            vector = sum_over_ranks(self.context, loss, squares, stops=stop(), tokens=following[1]())
            if norms is not None:
                self._update(gradients, norms, vector, lr)
            self._optimizer.zero_grad()
            loss_sum, total, stops, next_tokens = vector.tolist()
        known = following[0] is not None and isfinite(next_tokens)
        self._counted = (following[0], int(next_tokens)) if known else None
        stats = stats_of(loss_sum, total, tokens, self._loss_scale, stop=stops > 0)
        self._updates += stats.applied
        if stats.applied:
            self.low_precision.step_was_applied()
        self._clipper.steps += stats.applied and self._clipper.clips_each
        return stats

    def gradients(self, batch: StepBatch) -> tuple[float, int]:
        """Put the reduced gradients of one global batch into the parameters' ``grad``. Collective.

        Returns:
            Mean loss a token and number of tokens. A batch without labels has no gradients, and its loss is 0.

        Communication:
            All-reduces of 8 bytes over dp for the number of tokens, unless the step before has counted them, and of 32
            bytes over all ranks for the loss. Beside these what the model, ``Pipeline.run``, ``grad_sync`` and
            ``reduce_gradients`` send.
        """
        tokens = self._valid_tokens(batch)
        total = sum_over_ranks(self.context, self._backward(batch, tokens)).tolist()[0]
        return total / max(tokens, 1), tokens

    @torch.no_grad()
    def evaluate(self, batch: StepBatch) -> float | None:
        """See ``Engine``.

        Communication:
            One all-reduce of 32 bytes over all ranks, beside what forward passes send.
        """
        if self._pipeline is not None:
            loss = self._run_pipeline(batch, None)
        else:
            loss = self._no_loss()
            for part in batch.microbatches:
                loss += self._losses(self.model, part, None, 1.0)[0]
        total, _, _, tokens = sum_over_ranks(self.context, loss, tokens=batch.num_valid).tolist()
        return total / tokens if tokens else None

    def state(self) -> EngineState:
        """See ``Engine``."""
        scale = None if self._loss_scale is None else self._loss_scale.state
        return EngineState(updates=self._updates, clipper_steps=self._clipper.steps, loss_scale=scale)

    def full_state(self) -> FullState:
        """Every weight, whole, by global name; ``FullState`` has what ranks must observe."""
        return FullState.of_weights(self.assembled)

    @cached_property
    def tensors(self) -> dict[str, dict[str, TensorSlices]]:
        """See ``Engine``."""
        mine = {name: local(p.detach()) for name, p in self._parameters.items()}
        states = {name: self._optimizer.state(p) for name, p in self._parameters.items()}
        groups: dict[str, dict[str, TensorSlices]] = {"weights": {}, "optimizer": {}}
        for name, place in placements(self.assembled).items():
            groups["weights"][name] = place.of(mine.get(name))
            for key in self._optimizer.rule.names:
                groups["optimizer"][f"{key}.{name}"] = place.of(states.get(name, {}).get(key), wide=True)
        if self._clipper.clips_each:
            averages = dict(zip(self._parameters, self._clipper.averages.split(1), strict=True))
            groups["clipper"] = numbers_of_parameters(self.assembled, averages, self.assembled.table, 1)
        return groups | self.low_precision.tensors()

    def load(self, checkpoint: Checkpoint, state: EngineState) -> None:
        """See ``Engine``."""
        for group, members in self.tensors.items():
            if group in FINITE or group in checkpoint.tensors:  # clipping, scaling may have been others until then
                checkpoint.load(group, members)
        self.low_precision.loaded()
        self._updates = state.updates
        self._clipper.steps = state.clipper_steps if "clipper" in self.tensors else 0
        self._optimizer.rule.set_updates(self._updates)
        if self._loss_scale is not None:
            self._loss_scale.load(state.loss_scale)
        self.weights_changed()

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """See ``Engine``."""
        checkpoint.load("weights", self.tensors["weights"])
        self.weights_changed()

    def check_finite(self, where: str) -> None:
        """See ``Engine``."""
        for group in FINITE:
            for name, slices in self.tensors[group].items():
                if slices.local is not None and not is_finite(slices.local):
                    raise CheckpointError(f"{where}{group} {name} is not finite; use an older checkpoint")

    def weights_changed(self) -> None:
        """Renew what is derived from the weights, after they have been changed from outside."""
        self.low_precision.refresh()

    def _valid_tokens(self, batch: StepBatch) -> int:
        """Number of valid labels on all ranks of dp."""
        if self._counted is not None and self._counted[0] == batch.samples:
            return self._counted[1]
        if self.context.dp.size == 1:
            return batch.num_valid
        return int(all_reduce(torch.tensor([batch.num_valid], device=self.assembled.device), self.context.dp).item())

    def _backward(self, batch: StepBatch, tokens: int) -> Tensor:
        """Put the reduced gradients into the parameters' ``grad``; without tokens there are none.

        Returns:
            Sum of this rank's losses, FP64; 0 on the stages of a pipeline that have none.
        """
        if not tokens:
            return self._no_loss()
        factor = 1.0 if self._loss_scale is None else self._loss_scale.value
        loss = (self._run_pipeline if self._pipeline else self._accumulate)(batch, factor / tokens)
        reduce_gradients(self.reductions)
        self._optimizer.divide_gradients(factor)
        return loss

    def _accumulate(self, batch: StepBatch, scale: float) -> Tensor:
        if self._graph is not None:
            return self._graph.accumulate(batch.microbatches, scale)
        (module,), loss, last = self.modules.values(), self._no_loss(), len(batch.microbatches) - 1
        for i, part in enumerate(batch.microbatches):
            with grad_sync(module, last=i == last, sharded=self._shards_gradients):
                loss += self._forward_backward(part, scale)
        return loss

    def _forward_backward(self, part: Batch, scale: float | Tensor) -> Tensor:
        """Sum of a microbatch's losses; its gradients, times ``scale``, are added to the parameters'."""
        (module,) = self.modules.values()
        nll, objective = self._losses(module, part, self._dropout(part), scale)
        differentiate(objective)
        return nll.detach()

    def _run_pipeline(self, batch: StepBatch, scale: float | None) -> Tensor:
        """Sum of the losses on the last stage, 0 on the others. A ``scale`` of None means forward alone."""
        assert self._pipeline is not None
        (whole,), total = batch.microbatches, self._no_loss()

        def loss(losses: tuple[Tensor, Tensor]) -> Tensor:
            nll, objective = losses
            total.add_(nll.detach())
            return objective

        arguments: dict[str, Any] = {"z_loss": self._z_loss, "scale": 1.0 if scale is None else scale}
        arguments |= {} if whole.documents is None else {"documents_BS": whole.documents}
        if scale is not None and self._drops:
            arguments["dropout"] = self._dropout(whole)
        self._pipeline.run(
            whole.tokens, whole.labels, batch.num_microbatches, loss, backward=scale is not None, **arguments
        )
        return total

    def _losses(
        self, module: nn.Module, batch: Batch, dropout: DropoutKey | None, scale: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of a microbatch's losses, and the objective."""
        options = {"documents_BS": batch.documents, "labels_BS": batch.labels, "z_loss": self._z_loss, "scale": scale}
        return module(batch.tokens, dropout=dropout, **options)

    def _no_loss(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.assembled.device)

    def _dropout(self, batch: Batch) -> DropoutKey | None:
        return DropoutKey.of_samples(self._seed, batch.samples, batch.tokens.shape[1]) if self._drops else None

    @torch.no_grad()
    def _update(self, gradients: list[Gradient], norms: Tensor, vector: Tensor, lr: float) -> None:
        """Clip and update; a no-op where the step's loss or norm is not finite."""
        total = vector[1].sqrt()
        refused = (~vector[:2].isfinite()).any().float()
        if self._clipper.clips_each and self._own is not None:
            whole = whole_norms(norms, self._own, self.context)
            self._clipper.clip_each([gradient.tensor for gradient in gradients], whole, total, refused)
        self._optimizer.step(lr, divisor=self._clipper.divisor(total), refused=refused)
        self.low_precision.end_step(refused)
        self.weights_changed()
