"""The DeepSpeed engine: ZeRO's stages 0 to 3, with tensor parallelism, for the same model, data, loss and policy.

DeepSpeed reduces and shards gradients, moments and weights, and gathers them. All that is decided about a step is
decided here, as for every engine (step_policy.py): DeepSpeed's own loss scale, clipping and schedules are off.
"""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import EngineState
from megaresnorm.data.loader import StepBatch
from megaresnorm.engines.deepspeed_config import deepspeed_config
from megaresnorm.engines.engine import StepStats, Updated
from megaresnorm.engines.extensions import load_extension
from megaresnorm.engines.garbage import no_garbage_collection
from megaresnorm.engines.low_precision import LowPrecision
from megaresnorm.engines.model import model_of
from megaresnorm.engines.mpu import Mpu
from megaresnorm.engines.passes import Passes
from megaresnorm.engines.state import check_finite, load_tensors, placements
from megaresnorm.engines.step_policy import StepPolicy, Totals
from megaresnorm.engines.zero import FlatPartitions, PartitionedParameters, Partitions, WholeParameters, flat_placements
from megaresnorm.engines.zero_optimizers import DeviceOptimizer, ZeroOptimizer, host_optimizer, settings_groups
from megaresnorm.errors import ConfigError
from megaresnorm.kernels.cpu.trusted import BuildError
from megaresnorm.model.transformer import Transformer
from megaresnorm.optim import Gradient, GradientPlacement, settings_of
from megaresnorm.packages import DEEPSPEED, version_of
from megaresnorm.parallel.collectives import all_reduce
from megaresnorm.parallel.control import all_or_raise
from megaresnorm.parallel.mesh import Axis, ParallelContext
from megaresnorm.reading import first_line
from megaresnorm.recipe import Recipe

log = logging.getLogger(__name__)


class DeepSpeedEngine:
    """An ``Engine`` that runs DeepSpeed's, pp = dp_shard = 1.

    Args:
        recipe: resolved, so that model.vocab_size is set.
        context: None for one process.

    Attributes:
        assembled: the bare model, which DeepSpeed has taken over.
        passes: the forward passes of single microbatches.
        policy: what becomes of a step.
        gathers_weights: whether hooks gather them, of stage 3.
    """

    stack = pipeline = None  # microbatches come one by one

    def __init__(
        self, recipe: Recipe, context: ParallelContext | None = None, device: str | torch.device = "cpu"
    ) -> None:
        self.context = context = context or ParallelContext.single()
        device = torch.device(device)
        deepspeed, mpu = all_or_raise(lambda: load_deepspeed(device), context.control), Mpu(context)
        self._stage, self._offload = recipe.engine.zero_stage, recipe.engine.offload
        config = deepspeed_config(recipe, data_ranks=context.dp.size, pin=device.type == "cuda")
        self.gathers_weights = self._stage == 3
        sharding: dict[str, Any] = {}
        if self._stage == 3:
            sharding = {"on_parameter": Partitioner(deepspeed, config, mpu).partition, "shards_later": True}
        self.assembled = assembled = model_of(recipe, context, device, **sharding)
        self.passes = Passes(recipe, assembled.device)
        self._parameters = assembled.parameters()
        self._low_precision = None if self._stage == 3 else LowPrecision(recipe.precision, assembled, self._parameters)
        self._optimizer = self._make_optimizer(recipe, deepspeed)
        self._engine, *_ = deepspeed.initialize(
            model=assembled.model, optimizer=self._optimizer, config=config, mpu=mpu, dist_init_required=False
        )
        if self._stage == 3:
            gather_by_parts(deepspeed, assembled.model, self._engine.optimizer.parameter_offload)
        self._partitions = self._find_partitions()
        shards = context.world if self._stage else context.model_shards
        replicas = Axis("dp") if self._stage else context.dp
        self.policy = StepPolicy(recipe, assembled, replicas=replicas, shards=shards)
        self._placements = [GradientPlacement(assembled.table[name].split is not None) for name in self._parameters]
        summed = [name for name in self._parameters if assembled.table[name].partial]
        self._partial = summed if context.tp.size > 1 else []

    def _make_optimizer(self, recipe: Recipe, deepspeed: Any) -> ZeroOptimizer:
        table = self.assembled.table
        settings = {p: settings_of(table[name], recipe.optim) for name, p in self._parameters.items()}
        groups = settings_groups(settings)
        if self._offload == "none":
            return DeviceOptimizer(groups, recipe.optim)
        adam = all_or_raise(lambda: _cpu_adam(deepspeed, self._offload), self.context.control)
        return host_optimizer(adam, groups, recipe.optim)

    def _find_partitions(self) -> Partitions:
        if self._stage == 0:
            return WholeParameters(self._parameters)
        if self._stage == 3:
            return PartitionedParameters(self._parameters, self._engine.optimizer, self.context.dp.rank)
        return FlatPartitions(self._parameters, self._engine.optimizer)

    @property
    def model(self) -> Transformer:
        """See ``Engine``."""
        return self.assembled.model

    def step(self, batch: StepBatch, lr: float, stop: Callable[[], bool] = lambda: False) -> StepStats:
        """See ``Engine``.

        Communication:
            What DeepSpeed sends for the stage, in FP32; one all-reduce over tp of all partial sums of gradients; those
            of ``StepPolicy``.
        """
        with no_garbage_collection():
            tokens = self.policy.valid_tokens(batch)
            loss = self.backward(batch, tokens)
            gradients = self._collect() if tokens else []
            totals = self.policy.sum_up(loss, gradients, batch, tokens, stops=stop())
            if tokens:
                self.update(gradients, totals, lr)
            return self.policy.settle(totals, batch, tokens)

    def backward(self, batch: StepBatch, tokens: int) -> Tensor:
        """See ``Engine``."""
        loss, last = self.passes.no_loss(), len(batch.microbatches) - 1
        for i, part in enumerate(batch.microbatches if tokens else ()):
            self._engine.set_gradient_accumulation_boundary(i == last)
            nll, objective = self.passes.train(self._engine, part, self.policy.factor / tokens)
            self._engine.backward(objective, scale_wrt_gas=False)
            loss += nll.detach()
        return loss

    @torch.no_grad()
    def _collect(self) -> list[Gradient]:
        """This rank's pieces of the gradients, one for each parameter, as sums over all ranks."""
        if self._offload != "none" and self.assembled.device.type == "cuda":
            # DeepSpeed has only begun to copy gradients to the host, on streams of its own. The host needs all of them
            # now, so there is nothing that could go on meanwhile.
            torch.cuda.synchronize(self.assembled.device)
        tensors = {name: self._partitions.gradient(name) for name in self._parameters}
        if self._partial:
            parts = [tensors[name] for name in self._partial]
            summed = all_reduce(torch.cat(parts).to(self.assembled.device), self.context.tp).to(parts[0].device)
            torch._foreach_copy_(parts, list(summed.split([len(each) for each in parts])))
        factor = self.context.dp.size / self.policy.factor  # DeepSpeed divides by the ranks of dp
        if factor != 1.0:
            torch._foreach_mul_(list(tensors.values()), factor)
        return [Gradient(tensor, at) for tensor, at in zip(tensors.values(), self._placements, strict=True)]

    @torch.no_grad()
    def update(self, gradients: Sequence[Gradient], totals: Totals, lr: float) -> None:
        """See ``Engine``."""
        self._optimizer.begin(lr, self.policy.updates, self.policy.clip(gradients, totals), totals.refused)
        self._engine.step()
        self._refresh()

    def _refresh(self) -> None:
        if self._low_precision is not None:
            self._low_precision.refresh()

    @torch.no_grad()
    def evaluate(self, batch: StepBatch) -> float | None:
        """See ``Engine``."""
        loss = self.passes.no_loss()
        for part in batch.microbatches:
            loss += self.passes.evaluate(self._engine, part)
        return self.policy.mean_loss(loss, batch)

    def state(self) -> EngineState:
        """See ``Engine``."""
        return self.policy.state()

    @cached_property
    def tensors(self) -> dict[str, dict[str, TensorSlices]]:
        """See ``Engine``."""
        pieces = self._partitions.pieces
        of_pieces, of_whole = flat_placements(self.assembled, pieces), placements(self.assembled)
        groups: dict[str, dict[str, TensorSlices]] = {"weights": {}, "optimizer": {}}
        for name, parameter in self._parameters.items():
            piece, flat, whole = pieces[name], of_pieces[name], of_whole[name]
            groups["weights"][name] = (
                flat.of(piece.of(piece.master)) if self._stage == 3 else whole.of(parameter.detach())
            )
            for key, state in self._optimizer.state_of(piece.master).items():
                slices = flat.of(piece.of(state)) if self._stage else whole.of(state)
                groups["optimizer"][f"{key}.{name}"] = slices
        return groups | self.policy.tensors()

    def updated(self) -> list[Updated]:
        """See ``Engine``."""
        found = []
        for name, at in zip(self._parameters, self._placements, strict=True):
            piece = self._partitions.pieces[name]
            state = {key: piece.of(one) for key, one in self._optimizer.state_of(piece.master).items()}
            found.append(Updated(name, piece.of(piece.master), state, partial(self._partitions.gradient, name), at))
        return found

    def load(self, checkpoint: Checkpoint, state: EngineState) -> None:
        """See ``Engine``."""
        load_tensors(checkpoint, self.tensors)
        self.policy.load(state)
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
        self._partitions.weights_changed()
        self._refresh()


def load_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, made ready for tensors of this kind of device. Of what it logs, warnings and errors are shown.

    Raises:
        ConfigError: it is installed, and cannot be imported.
    """
    # It reads them from there alone. LOCAL_RANK says which GPU is this rank's; under Open MPI the other must agree.
    local_rank = {"LOCAL_RANK", *({"OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys())}
    os.environ |= {"DS_ACCELERATOR": device.type, **dict.fromkeys(local_rank, str(device.index or 0))}
    try:
        import deepspeed
        from deepspeed.ops import __compatible_ops__
        from deepspeed.utils import logger
    except Exception as e:  # noqa: BLE001 - whatever its own imports, or variables that it reads, come to
        raise ConfigError(
            f"engine.name=deepspeed: DeepSpeed {version_of('deepspeed')} cannot be imported ({type(e).__name__}: "
            f"{first_line(e)}); pip install --force-reinstall 'deepspeed{DEEPSPEED}', or set engine.name=native"
        ) from None
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    # DeepSpeed calls torch by the names that all its versions know, at every message.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    __compatible_ops__["deepspeed_shm_comm"] = False  # compiled at the first start, under a lock that a kill leaves
    if not dist.is_initialized():
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", store=HashStore(), rank=0, world_size=1)
    from deepspeed import comm

    comm.init_distributed(dist_init_required=False) if comm.is_initialized() else comm.init_distributed()
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line is worth showing: the optimizer that DeepSpeed has not tested is ours."""
    return "untested optimizer" not in record.getMessage()


def _cpu_adam(deepspeed: Any, offload: str) -> type:
    """DeepSpeed's AdamW for the host, whose operation is compiled where DeepSpeed was not installed with it.

    Raises:
        ConfigError: it cannot be compiled.
    """
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    builder = CPUAdamBuilder()
    if not installed_ops.get(builder.name) or accelerator_name != deepspeed.accelerator.get_accelerator()._name:
        try:
            load_extension(builder, deepspeed.__version__)
        except BuildError as e:
            raise ConfigError(f"engine.offload={offload}: {e}; engine.offload=none needs no compiler") from None
    return DeepSpeedCPUAdam


class Partitioner:
    """Partitions parameters for ZeRO-3 one by one, so that while a model is built at most one is whole on a rank.

    Args:
        config: DeepSpeed's.
    """

    def __init__(self, deepspeed: Any, config: dict[str, Any], mpu: Mpu) -> None:
        self._init, self._config, self._mpu = deepspeed.zero.Init, config, mpu
        self._first: Any = None

    def partition(self, parameter: nn.Parameter) -> None:
        """Keep this rank's part of a parameter, whose other memory is freed. Collective over dp.

        Communication:
            One broadcast of the parameter, by which DeepSpeed makes sure that ranks begin alike.
        """
        if self._first is not None:
            self._first.convert_to_zero_parameters(param_list=[parameter])
            return
        self._init(
            module=nn.ParameterList([parameter]),
            data_parallel_group=self._mpu.get_data_parallel_group(),
            config_dict_or_path=self._config,
            dtype=torch.float32,
            mpu=self._mpu,
        )
        self._first = parameter


def gather_by_parts(deepspeed: Any, model: Transformer, hooks: Any) -> None:
    """Let ZeRO-3 gather the weights of each part of a model together, and what belongs to none around all of it.

    DeepSpeed has hooked every module, for the parameters of its own; a block reads those of all its modules, and in
    backward runs some of them again. Its hooks of modules within a part are removed: they would find nothing to gather.

    Args:
        hooks: a ``DeepSpeedZeRoOffload``, which has handles of the hooks.
    """
    parts = list(model.parts())
    within = {id(parameter) for part in parts for parameter in part.parameters()}
    inner = [module for part in parts for module in part.modules() if module is not part]
    hooked = {id(known) for module in inner for known in (module._forward_pre_hooks, module._forward_hooks)}
    for handle in (*hooks.forward_hooks, *hooks.backward_hooks):
        if id(handle.hooks_dict_ref()) in hooked:
            handle.remove()
    for part in parts:
        for parameter in part.parameters():
            deepspeed.zero.register_external_parameter(part, parameter)
    for parameter in model.parameters():
        if id(parameter) not in within:
            deepspeed.zero.register_external_parameter(model, parameter)
