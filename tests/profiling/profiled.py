"""Profiles of small runs, some of them disturbed from outside."""

import time
from collections.abc import Callable
from typing import Any

import torch

from megaresnorm.recipe import Recipe
from megaresnorm.run import Run
from megaresnorm.telemetry.wrapped import Wrapped
from megaresnorm.trainer import Trainer

Disturb = Callable[[Wrapped, Run], None]


def profiled(recipe: Recipe, disturb: Disturb = lambda wrapped, run: None) -> dict[str, Any] | None:
    """The profile of ``train.profile``'s window; None on ranks that do not write it."""
    with Run(recipe) as run, Wrapped() as wrapped:
        disturb(wrapped, run)
        trainer = Trainer(run)
        while run.steps_done < trainer.profiler.last_step:
            trainer.step()
    return trainer.profiler.profile


class Sleep(torch.autograd.Function):
    """The same tensor, whose gradient takes a while."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient, None


def slowed(method: Callable, seconds: float) -> Callable:
    def call(*given, **named):
        time.sleep(seconds)
        return method(*given, **named)

    return call


def slow_forward(block: int, seconds: float) -> Disturb:
    """A sleep in the forward pass of a block's ffn."""

    def disturb(wrapped: Wrapped, run: Run) -> None:
        for model in run.engine.assembled.models.values():
            if str(block) in model.blocks:
                down = model.blocks[str(block)].ffn.branch.down
                wrapped.method(down, "forward", lambda forward: slowed(forward, seconds))

    return disturb


def slow_backward(block: int, seconds: float) -> Disturb:
    """A sleep in the backward pass of a block's ffn."""

    def disturb(wrapped: Wrapped, run: Run) -> None:
        for model in run.engine.assembled.models.values():
            if str(block) in model.blocks:
                down = model.blocks[str(block)].ffn.branch.down
                wrapped.method(down, "forward", lambda forward: lambda x: Sleep.apply(forward(x), seconds))

    return disturb


def slow_loader(seconds: float) -> Disturb:
    def disturb(wrapped: Wrapped, run: Run) -> None:
        wrapped.method(run.loader, "step", lambda step: slowed(step, seconds))

    return disturb


def slow_rank(rank: int, seconds: float) -> Disturb:
    """A sleep in every norm of a rank: all of its blocks are slower."""

    def disturb(wrapped: Wrapped, run: Run) -> None:
        if run.context.world.rank != rank:
            return
        for model in run.engine.assembled.models.values():
            for block in model.blocks.values():
                for sublayer in block.sublayers:
                    wrapped.method(sublayer.branch, "forward", lambda forward: slowed(forward, seconds))

    return disturb


def slow_collective(block: int, seconds: float) -> Disturb:
    """The sum over tp after a block's ffn takes long, on all ranks alike."""

    def disturb(wrapped: Wrapped, run: Run) -> None:
        layout = run.engine.model.blocks[str(block)].ffn.branch.down.layout
        transport = layout.axis.transport
        inside = [False]

        class Slow:
            def __getattr__(self, name):
                start = getattr(transport, name)

                def started(*given, **named):
                    if inside[0]:
                        time.sleep(seconds)
                    return start(*given, **named)

                return started

        def marked(forward):
            def call(*given):
                inside[0] = True
                result = forward(*given)
                inside[0] = False
                return result

            return call

        wrapped.value(layout.axis, "transport", Slow())
        wrapped.method(run.engine.model.blocks[str(block)].ffn.branch.down, "forward", marked)

    return disturb
