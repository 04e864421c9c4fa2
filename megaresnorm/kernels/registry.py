"""Kernels are chosen once, when the model is built, and the choice is reported with its reason.

A backend registers itself for an op together with ``requires(device, dtype)``, which returns None or the reason why it
cannot run there, and ``avoid(device, dtype)``, which returns None or the reason why it would be the slower one. Asking
for a backend by name that cannot run is an error with that reason; only ``auto`` takes another one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megaresnorm.errors import ConfigError

Refusal = Callable[[torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    Attributes:
        op, backend: the names under which it is registered.
        function: has the arguments of the op's reference.
        requires: given (device, dtype), None or the reason why it cannot run there.
        avoid: given (device, dtype), None or the reason why ``auto`` passes it over.
        kinds: the forms it can compute of an op that has several (the activations; attention plain or with capped
            scores); None for all of them.
        implementation: what ``function`` is made of, where an op asks its backends for that (add_norm's
            ``AddNormBackend``).
    """

    op: str
    backend: str
    function: Callable
    requires: Refusal
    avoid: Refusal
    kinds: tuple[str, ...] | None
    implementation: Any = None


# The order in which ``auto`` tries backends, whatever the order of imports. Backends that are not listed come after
# these and before "reference", the specification.
ORDER = ("triton", "cpu", "blocked", "sdpa", "flex", "chunked")
_KERNELS: dict[str, dict[str, Kernel]] = {}


def register_kernel(
    op: str,
    backend: str,
    requires: Refusal = lambda device, dtype: None,
    avoid: Refusal = lambda device, dtype: None,
    kinds: tuple[str, ...] | None = None,
    implementation: Any = None,
) -> Callable[[Callable], Callable]:
    """Decorator that makes a function a backend of ``op``; ``Kernel`` describes the arguments."""

    def register(function: Callable) -> Callable:
        kernels = _KERNELS.setdefault(op, {})
        assert backend not in kernels, f"{op}/{backend} is registered twice"
        kernels[backend] = Kernel(op, backend, function, requires, avoid, kinds, implementation)
        return function

    return register


def backends(op: str) -> list[Kernel]:
    """All kernels of ``op``, in the order in which ``auto`` tries them."""

    def rank(kernel: Kernel) -> tuple[bool, int]:
        known = ORDER.index(kernel.backend) if kernel.backend in ORDER else len(ORDER)
        return kernel.backend == "reference", known

    return sorted(_KERNELS[op].values(), key=rank)


def kernel_named(op: str, backend: str) -> Kernel:
    """The registry's entry of a backend.

    Raises:
        KeyError: no such backend is registered.
    """
    return _KERNELS[op][backend]


def check_backend(op: str, backend: str, setting: str | None = None) -> None:
    """Check that a backend of ``op`` exists, or that it is ``auto``; whether it can run is not asked.

    Args:
        setting: the recipe's key that names it; None: kernels.OP.

    Raises:
        ConfigError: it does not; the line names those that do.
    """
    known = ["auto", *(kernel.backend for kernel in backends(op))]
    if backend not in known:
        raise ConfigError(f"{setting or f'kernels.{op}'}={backend!r}: wanted one of {', '.join(known)}")


def choose_kernel(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    kind: str | None = None,
    *,
    fused: bool = False,
    setting: str | None = None,
) -> tuple[Kernel, str]:
    """Choose the kernel that runs ``op``.

    Args:
        backend: a backend's name, or ``auto`` for the first that can run and has no reason to be avoided.
        dtype: of the model's matrix products.
        kind: the form of the op that is wanted, where it has several.
        fused: whether ``auto`` takes the reference, which torch.compile fuses with what is around it.
        setting: as of ``check_backend``.
    Returns:
        The kernel, and a line that says which it is and why.
    Raises:
        ConfigError: the backend does not exist, or was asked for by name and cannot run here.
    """
    check_backend(op, backend, setting)
    if fused and backend == "auto":
        return kernel_named(op, "reference"), f"{op} on {device.type}: reference (fused by torch.compile)"
    refusals: list[str] = []
    for kernel in backends(op):
        if backend not in ("auto", kernel.backend):
            continue
        reason = kernel.requires(device, dtype)
        if kind is not None and kernel.kinds is not None and kind not in kernel.kinds:
            reason = f"has no {kind} {op}"
        if reason is None and backend == "auto":
            reason = kernel.avoid(device, dtype)
        if reason is None:
            why = "asked for" if backend != "auto" else "; ".join(["first that can run", *refusals])
            return kernel, f"{op} on {device.type}: {kernel.backend} ({why})"
        if backend != "auto":
            raise ConfigError(f"{setting or f'kernels.{op}'}={backend} cannot run on {device.type}: {reason}")
        refusals.append(f"not {kernel.backend}: {reason}")
    raise AssertionError(f"no backend of {op} runs on {device.type}")
