"""The native engine: plain PyTorch, one optimizer step at a time, on however many ranks."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import EngineState
from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.engine import StepStats, Updated
from megaresnorm.engines.garbage import no_garbage_collection
from megaresnorm.engines.graphs import MicrobatchGraph, Recorder
from megaresnorm.engines.low_precision import LowPrecision
from megaresnorm.engines.model import model_of
from megaresnorm.engines.passes import Passes
from megaresnorm.engines.state import FullState, check_finite, load_tensors, placements, rounded_weights
from megaresnorm.engines.step_policy import StepPolicy, Totals
from megaresnorm.engines.step_vector import sum_over_ranks
from megaresnorm.kernels.cross_entropy import differentiate
from megaresnorm.model.transformer import Transformer
from megaresnorm.optim import Gradient, GradientPlacement, Optimizer
from megaresnorm.parallel.data_parallel import grad_sync, local, pad_uneven_shards, replicate_model, shard_model
from megaresnorm.parallel.gradients import reduce_gradients, reductions
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe import Recipe

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
        passes: the forward passes of single microbatches.
        policy: what becomes of a step.
        pipeline: the stages of this rank and their schedule; None where there is one stage.
        gathers_weights: whether FSDP2's hooks do.
    """

    def __init__(
        self, recipe: Recipe, context: ParallelContext | None = None, device: str | torch.device = "cpu"
    ) -> None:
        self.context = context = context or ParallelContext.single()
        self._shards_gradients = recipe.parallel.accumulate == "sharded"
        self.gathers_weights = context.dp_shard.size > 1
        shard = self._sharding(recipe) if self.gathers_weights else None
        self.assembled = assembled = model_of(recipe, context, torch.device(device), shard=shard)
        self.modules = {number: self._wrapped(model) for number, model in assembled.models.items()}
        self.passes = Passes(recipe, assembled.device)
        self._parameters, table = assembled.parameters(), assembled.table
        self.low_precision = LowPrecision(recipe.precision, assembled, self._parameters)
        tied = self._parameters.get("embedding.weight") if recipe.model.tied_embeddings else None
        at = {n: GradientPlacement(table[n].split is not None, n in assembled.copies) for n in self._parameters}
        rounded = rounded_weights(assembled, recipe.train.seed)
        self._placements = at
        self._optimizer = Optimizer(self._parameters, table, recipe.optim, at, rounded)
        summed = (p for name, p in self._parameters.items() if table[name].partial)
        self.reductions = reductions(summed, tied, tp=context.tp, embedding=context.embedding)
        self.policy = StepPolicy(recipe, assembled, replicas=context.dp_replicate, shards=context.model_shards)
        staged = context.pp.size > 1
        self.pipeline = self._make_pipeline(recipe, self.modules) if staged else None
        # DDP expects a gradient of every parameter, which not every path has.
        self._bare_pipeline = self._make_pipeline(recipe, assembled.models) if staged else None
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

    def _make_pipeline(self, recipe: Recipe, modules: Mapping[int, nn.Module]) -> "Pipeline":
        from megaresnorm.parallel.pipeline import Pipeline  # a second's imports, for runs with stages alone

        (model, *_) = self.assembled.models.values()
        return Pipeline(
            dict(modules),
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
        return None if self.pipeline is None else self.pipeline.num_microbatches

    def step(self, batch: StepBatch, lr: float, stop: Callable[[], bool] = lambda: False) -> StepStats:
        """Accumulate the gradients of one global batch in FP32, clip and update. Collective.

        1. The valid tokens of the whole batch, which the step before has summed: the loss is divided by them, however
           unequal the parts are.
        2. Forward and backward of every microbatch, or the pipeline's schedule (tp and pp inside; dp as ``grad_sync``).
        3. Add up what dp does not: partial sums over tp, tied embeddings over the first and last stage.
        4. One vector over all ranks: loss, squares of the gradients, stop flag, valid tokens of the next step.
        5. Clip, AdamW, renew the 16-bit copies: on the device, and nothing at all where loss or norm is not finite, or
           above the policy's bounds.
        6. The host reads the vector.

        Communication:
            That of ``gradients``, but one all-reduce of 4 numbers FP64 over all ranks in the place of its own; with
            ``clip: adagc`` one more over model_shards, of a number for each parameter.
        """
        with no_garbage_collection():
            tokens = self.policy.valid_tokens(batch)
            self.low_precision.begin_step()
            loss = self.backward(batch, tokens)
            gradients = self._optimizer.collect(per_parameter=self.policy.clipper.clips_each) if tokens else []
            totals = self.policy.sum_up(loss, gradients, batch, tokens, stops=stop())
            if tokens:
                self.update(gradients, totals, lr)
            self._optimizer.zero_grad()
            stats = self.policy.settle(totals, batch, tokens)
        if stats.applied:
            self.low_precision.step_was_applied()
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
        tokens = self.policy.valid_tokens(batch)
        total = sum_over_ranks(self.context, self.backward(batch, tokens)).tolist()[0]
        return total / max(tokens, 1), tokens

    @torch.no_grad()
    def evaluate(self, batch: StepBatch) -> float | None:
        """See ``Engine``.

        Communication:
            One all-reduce of 32 bytes over all ranks, beside what forward passes send.
        """
        if self.pipeline is not None:
            loss = self._run_pipeline(batch, None, self.pipeline)
        else:
            loss = self.passes.no_loss()
            for part in batch.microbatches:
                loss += self.passes.evaluate(self.model, part)
        return self.policy.mean_loss(loss, batch)

    def probe(self, batch: Batch, *, backward: bool = False) -> None:
        """Run a batch through the model without dropout and leave nothing behind: for what watches it. Collective.

        Between steps: all ranks of dp get the same batch, and no weight, moment or count changes. A pipeline runs as
        many copies of the batch as its schedule needs, of which the first alone has labels.

        Args:
            backward: whether the mean loss is differentiated as well, times ``policy.factor``. The gradients of the
                parameters are dropped; those that FSDP2 makes are reduced first.

        Communication:
            What the model and ``Pipeline.run`` send, and FSDP2's reductions (``grad_sync``); nothing over dp else.
        """
        whole = StepBatch.of([batch], self.stack)
        scale = self.policy.factor / max(whole.num_valid, 1) if backward else None
        if self._bare_pipeline is not None:
            self._run_pipeline(whole, scale, self._bare_pipeline, drops=False)
        else:
            with torch.set_grad_enabled(backward), grad_sync(self.model, last=True, sharded=self._shards_gradients):
                objective = self.model(batch.tokens, **self.passes.options(batch, scale or 1.0))[1]
                if backward:
                    differentiate(objective)
        if backward:
            self._optimizer.zero_grad()

    def state(self) -> EngineState:
        """See ``Engine``."""
        return self.policy.state()

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
        return groups | self.policy.tensors() | self.low_precision.tensors()

    def updated(self) -> list[Updated]:
        """See ``Engine``."""
        optimizer = self._optimizer
        return [
            Updated(n, local(p.detach()), optimizer.state(p), partial(optimizer.gradient, p), self._placements[n])
            for n, p in self._parameters.items()
        ]

    def load(self, checkpoint: Checkpoint, state: EngineState) -> None:
        """See ``Engine``."""
        load_tensors(checkpoint, self.tensors)
        self.low_precision.loaded()
        self.policy.load(state)
        self._optimizer.rule.set_updates(state.updates)
        self.weights_changed()

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """See ``Engine``."""
        checkpoint.load("weights", self.tensors["weights"])
        self.weights_changed()

    def check_finite(self, where: str) -> None:
        """See ``Engine``."""
        check_finite(self.tensors, where)

    def weights_changed(self) -> None:
        """Renew what is derived from the weights, after they have been changed from outside."""
        self.low_precision.refresh()

    def drop_gradients(self) -> None:
        """Forget what backward has left, where no update is to come of it."""
        self._optimizer.zero_grad()

    def backward(self, batch: StepBatch, tokens: int) -> Tensor:
        """See ``Engine``."""
        if not tokens:
            return self.passes.no_loss()
        factor = self.policy.factor
        scale = factor / tokens
        loss = (
            self._accumulate(batch, scale) if self.pipeline is None else self._run_pipeline(batch, scale, self.pipeline)
        )
        reduce_gradients(self.reductions)
        self._optimizer.divide_gradients(factor)
        return loss

    def _accumulate(self, batch: StepBatch, scale: float) -> Tensor:
        if self._graph is not None:
            return self._graph.accumulate(batch.microbatches, scale)
        (module,), loss, last = self.modules.values(), self.passes.no_loss(), len(batch.microbatches) - 1
        for i, part in enumerate(batch.microbatches):
            with grad_sync(module, last=i == last, sharded=self._shards_gradients):
                loss += self._forward_backward(part, scale)
        return loss

    def _forward_backward(self, part: Batch, scale: float | Tensor) -> Tensor:
        """Sum of a microbatch's losses; its gradients, times ``scale``, are added to the parameters'."""
        (module,) = self.modules.values()
        nll, objective = self.passes.train(module, part, scale)
        differentiate(objective)
        return nll.detach()

    def _run_pipeline(
        self, batch: StepBatch, scale: float | None, pipeline: "Pipeline", *, drops: bool = True
    ) -> Tensor:
        """Sum of the losses on the last stage, 0 on the others. A ``scale`` of None means forward alone."""
        (whole,), total = batch.microbatches, self.passes.no_loss()

        def loss(losses: tuple[Tensor, Tensor]) -> Tensor:
            nll, objective = losses
            total.add_(nll.detach())
            return objective

        arguments: dict[str, Any] = self.passes.options(whole, 1.0 if scale is None else scale)
        del arguments["labels_BS"]  # which the last stage alone is given
        arguments["dropout"] = self.passes.dropout(whole) if drops and scale is not None else None
        arguments = {name: value for name, value in arguments.items() if value is not None}
        pipeline.run(whole.tokens, whole.labels, batch.num_microbatches, loss, backward=scale is not None, **arguments)
        return total

    @torch.no_grad()
    def update(self, gradients: Sequence[Gradient], totals: Totals, lr: float) -> None:
        """See ``Engine``."""
        divisor = self.policy.clip(gradients, totals)
        self._optimizer.step(lr, divisor=divisor, refused=totals.refused)
        self.low_precision.end_step(totals.refused)
        self.weights_changed()
