"""A run's folder written by hand, in the formats of metrics.jsonl, depth.jsonl, numbers.jsonl and profile.json."""

import json
import math
import random
from pathlib import Path

from megaresnorm.recipe.load import build_recipe, dump_recipe

BLOCKS = 6
BY_SUBLAYER = ("stream_rms", "sum_rms", "branch_rms", "branch_ratio", "branch_cosine", "kurtosis")
BY_BLOCK = ("cosine", "angular_distance", "logit_max", "stream_gradient", "gradient_norm", "update_ratio")


def write_run(folder: Path, *, steps=200, done=200, blocks=BLOCKS, recipe=True, depth=True, numbers=True, profile=True,
              **settings) -> Path:  # fmt: skip
    """A run of ``steps`` steps of which ``done`` are done.

    Args:
        settings: sections of its recipe, beside those that it has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "model": {"dim": 64, "num_blocks": blocks, "num_heads": 4, "seq_len": 128, "vocab_size": 1024},
        "data": {"path": "runs/data"},
        "train": {"output": str(folder), "steps": steps, "global_batch": 8},
    }
    for section, keys in settings.items():
        values.setdefault(section, {}).update(keys)
    if recipe:
        (folder / "recipe.yaml").write_text(dump_recipe(build_recipe(values)))
    write_lines(folder / "metrics.jsonl", (metrics(step, done) for step in range(1, done + 1)))
    if depth:
        write_lines(folder / "depth.jsonl", depth_records(done, blocks))
    if numbers:
        write_lines(folder / "numbers.jsonl", (numbers_record(step, blocks) for step in range(10, done + 1, 10)))
    if profile:
        (folder / "profile").mkdir(exist_ok=True)
        (folder / "profile" / "profile.json").write_text(json.dumps(profile_of(blocks)))
    return folder


def write_lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def metrics(step, steps):
    """With a spike at step 150, and a step whose gradients are not finite at 120."""
    noise = random.Random(step)
    loss = 3 + 4 * math.exp(-step / 8) + noise.gauss(0, 0.03) + (3.0 if step == 150 else 0.0)
    found = {
        "step": step, "loss": loss, "gradient_norm": None if step == 120 else 0.5 + noise.random(),
        "lr": 3e-3 * step / steps, "samples": 8 * step, "tokens": 1024 * step, "time": 1.7e9 + 0.1 * step,
        "loss_scale": 65536.0 if step < 100 else 32768.0, "skipped": 0, "seconds": 0.1,
        "tokens_per_second": 9000 + 900 * noise.random(), "tflops": 0.05, "peak_memory": 4e8 + 1e5 * step,
    }  # fmt: skip
    if step % 50 == 0:
        found |= {"valid_loss": loss + 0.1, "valid_perplexity": math.exp(loss + 0.1), "valid_bits_per_byte": 1.5,
                  "valid_loss/web": loss + 0.2, "valid_loss/code": loss}  # fmt: skip
    return found


def depth_records(steps, blocks):
    for step in range(10, steps + 1, 10):

        def value(name, place, step=step):
            if name == "gradient_norm":
                return 10 ** (-3 * place / blocks) * (1 + 0.1 * math.sin(step))
            return None if place == 1 and step == 20 else 0.1 + 0.05 * place + 0.001 * step

        yield {
            "schema_version": 1, "step": step, "kind": "watch",
            "by_sublayer": {name: [value(name, i / 2) for i in range(2 * blocks)] for name in BY_SUBLAYER},
            "by_block": {name: [value(name, i) for i in range(blocks)] for name in BY_BLOCK},
            "whole": {"logit_max": 3.0, "effective_depth": 7.0 + step / 100, "sublayers_above": 9},
        }  # fmt: skip
        if step % 50 == 0:
            yield {
                "schema_version": 1, "step": step, "kind": "probe",
                "by_block": {"attention_entropy": [2.0 - 0.1 * i for i in range(blocks)],
                             "collapse": [0.9 - 0.1 * i for i in range(blocks)]},
                "whole": {"model_update": 0.1, "mean_path_length": 4.0 + step / 100, "seconds": 0.4},
                "paths": {"lengths": [0, 1, 2, 4, 8, 2 * blocks], "log_norms": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5],
                          "shares": [0.01, 0.1, 0.3, 0.4, 0.15, 0.04]},
            }  # fmt: skip


def numbers_record(step, blocks):
    shares = [0.001 * i for i in range(blocks)]
    one = {"amax": [4.0] * blocks, "saturated": [0.0] * blocks, "underflown": shares}
    formats = ["e4m3"] * blocks
    return {
        "schema_version": 1, "step": step, "format": {"input": formats, "weight": formats, "gradient": formats},
        "blocks": {"input": one, "weight": one, "gradient": one},
    }  # fmt: skip


def time(ms):
    return {"p50": ms, "p95": 1.2 * ms, "max": 2 * ms, "rank": 0}


def row(name, block, part, forward, backward, **more):
    return {
        "name": name, "block": block, "part": part, "stage": None, "forward": time(forward), "backward": time(backward),
        "input_grad": None, "weight_grad": None, "recompute": None, "exposed": None, "hidden": None, "optimizer": None,
        "flops": 1e9, "tflops": 0.05, "share_of_peak": None, "activation_bytes": None, "transient_bytes": None,
        "parameter_bytes": None, "gradient_norm": None, "stream_rms": None, **more,
    }  # fmt: skip


def profile_of(blocks):
    rows = [row("embedding", None, "embedding", 0.2, 0.3), row("head", None, "head", 3.0, 6.0)]
    for block in range(blocks):
        slow = 4.0 if block == 2 else 0.0
        sizes = {"activation_bytes": 2_000_000, "transient_bytes": 300_000, "parameter_bytes": 650_000}
        rows += [
            row(
                f"block {block} attention",
                block,
                "attention",
                0.8,
                1.6,
                recompute=time(0.8),
                exposed=time(0.3),
                **sizes,
            ),
            row(f"block {block} ffn", block, "ffn", 1.2 + slow, 2.4, recompute=time(1.1), **sizes),
            row(f"block {block} norm", block, "norm", 0.2, 0.3),
        ]
    ranks = [
        {"rank": rank, "host": "node-1", "pp": rank, "dp": 0, "tp": 0, "step_ms": 60.0, "own_ms": 50.0 + 8 * rank}
        for rank in range(2)
    ]
    return {
        "schema_version": 1, "made": "2026-11-30T12:00:00Z", "command": "megaresnorm profile", "device": "CPU",
        "layout": "pp 2", "first_step": 3, "num_steps": 10, "ranks": ranks, "step_ms": time(60.0),
        "tokens_per_second": 9000.0, "tflops": 0.05, "peak_tflops": None, "mfu": 0.31, "hfu": 0.38,
        "convention": "causal attention by half", "rows": rows,
        "whole": {"bubble": time(6.0), "ideal_bubble": 0.04, "data": time(0.1), "host": time(1.0),
                  "unaccounted": time(0.5), "overhead": 0.02},
        "findings": ["block 2 ffn takes 4 ms longer than the median of its kind"],
    }  # fmt: skip
