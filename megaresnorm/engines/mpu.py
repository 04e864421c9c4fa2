"""The model parallel unit that DeepSpeed asks for process groups, made of a run's axes."""

import torch.distributed as dist

from megaresnorm.parallel.mesh import ParallelContext


class Mpu:
    """The axes of a run under the names by which DeepSpeed (0.19) asks for them.

    DeepSpeed knows tensor parallelism under two of them.

    Args:
        context: of several ranks or of one, in a process group.
    """

    def __init__(self, context: ParallelContext) -> None:
        self._dp, self._tp = context.dp, context.tp
        # DeepSpeed sends to groups of one rank as well, for which an axis has none.
        own = None if context.mesh is None else context.mesh.get_group("cp")
        self._groups = {axis.name: axis.group or own or dist.group.WORLD for axis in (self._dp, self._tp)}

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that read different samples."""
        return self._groups[self._dp.name]

    def get_data_parallel_world_size(self) -> int:
        """Number of them."""
        return self._dp.size

    def get_data_parallel_rank(self) -> int:
        """Index of this rank among them."""
        return self._dp.rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that have parts of the same matrices."""
        return self._groups[self._tp.name]

    def get_tensor_model_parallel_world_size(self) -> int:
        """Number of them."""
        return self._tp.size

    def get_tensor_model_parallel_rank(self) -> int:
        """Index of this rank among them."""
        return self._tp.rank

    def get_tensor_model_parallel_src_rank(self) -> int:
        """The first of them, among all ranks."""
        return dist.get_rank() - self._tp.rank

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_rank = get_tensor_model_parallel_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Stages of a pipeline: there is none."""
        return 1
