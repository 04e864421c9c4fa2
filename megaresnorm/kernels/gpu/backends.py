"""Backends in Triton beside add_norm's. Their modules, and with them triton, are imported when one is first run."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from megaresnorm.kernels.activation import ActivationBackend, register_activation
from megaresnorm.kernels.cross_entropy import register_loss
from megaresnorm.kernels.gpu.requires import triton_requires
from megaresnorm.kernels.rotary import RotaryBackend, register_rotary

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "swiglu", "geglu", "geglu_tanh")


def _function(module: str, name: str) -> Callable:
    """A function of one of the files here; it runs on the device of its first argument."""

    def run(*arguments: Any) -> Any:
        with torch.cuda.device_of(arguments[0]):
            return getattr(importlib.import_module(f"megaresnorm.kernels.gpu.{module}"), name)(*arguments)

    return run


register_activation(
    "triton",
    ActivationBackend(_function("activation", "forward"), _function("activation", "backward"), ACTIVATIONS, True),
    requires=triton_requires,
)
register_rotary(
    "triton", RotaryBackend(_function("rotary", "forward"), _function("rotary", "backward")), requires=triton_requires
)
register_loss("triton", _function("cross_entropy", "pieces"), requires=triton_requires)
