"""Three data-parallel copies: gradients are summed in the same order in every step of every process."""

from launched import losses, train_on_rank

from megaresnorm.testing import run_ranks


def test_a_run_of_three_copies_that_resumes_repeats_every_bit(tiny, tmp_path):
    """Its gradients fill more than one of DDP's buckets, which are made anew after the first step of a process."""

    def recipe(name: str, steps: int):
        return tiny(
            model={"dim": 64, "num_blocks": 8, "ffn_dim": 256, "seq_len": 64},
            train={"output": str(tmp_path / name), "steps": steps, "global_batch": 12, "eval_every": 0},
            schedule={"kind": "constant"},
            checkpoint={"every": 2},
        )

    (whole, *_) = run_ranks(3, train_on_rank, 3, recipe("whole", 5))
    run_ranks(3, train_on_rank, 3, recipe("parts", 2))
    (parts, *_) = run_ranks(3, train_on_rank, 3, recipe("parts", 5))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and whole == parts
