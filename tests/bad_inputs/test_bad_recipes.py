"""Recipes that would hang, fill the memory or end in a traceback."""

import pytest
from refused import FOLDER, LOOP, NOT_FILES, PIPE, ZEROS, put, refused

GOOD = """
model: {dim: 64, num_blocks: 4, num_heads: 4, seq_len: 32}
data: {path: data}
train: {output: out, steps: 10, global_batch: 8}
"""
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  !!merge m: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 25))
OVERRIDES = [
    # products and divisors
    ("train.global_batch=999999999989 train.micro_batch=2", "train.global_batch=999999999989: wanted less than"),
    ("train.global_batch=99999989 train.micro_batch=2", "try micro_batch in [1, "),
    ("train.global_batch=73513440 train.micro_batch=70000000",
     "must divide train.global_batch=73513440; try micro_batch in ["),
    ("model.dim=4194301 model.num_heads=2", "try num_heads in [1, 4194301]"),
    ("model.num_heads=4194304 model.num_kv_heads=3 model.head_dim=1", "try num_kv_heads in ["),
    ("model.num_heads=4194304 model.head_dim=4194304", "are wider together than"),
    ("parallel.tp=1000000", "try parallel.tp in [1, 2, 4]"),
    # counts
    *((f"{key}={value}", f"{key}={value if len(str(value)) < 40 else ''}") for key, value in (
        ("model.num_blocks", 10**12), ("model.num_blocks", 10_001), ("model.dim", 2**40), ("model.dim", 2**63),
        ("model.dim", -1), ("model.num_heads", 2**64), ("model.num_kv_heads", 2**40), ("model.head_dim", 2**40),
        ("model.ffn_dim", 2**50), ("model.seq_len", 10**12), ("model.vocab_size", 10**10),
        ("model.vocab_multiple", 10**12), ("train.steps", 10**15), ("train.steps", 10**30),
        ("train.eval_samples", 2**70), ("train.log_every", 10**20), ("train.eval_every", 10**40),
        ("train.sample_tokens", 10**9), ("train.max_skipped_steps", 10**18), ("train.seed", 2**63),
        ("data.seed", 10**30), ("checkpoint.every", 10**20), ("checkpoint.keep", 10**20),
        ("checkpoint.keep_every", 10**20), ("checkpoint.max_failures", 10**19), ("parallel.pp", 10**9),
        ("parallel.tp", 10**12), ("parallel.dp_shard", 2**64), ("parallel.dp_replicate", 10**10),
        ("schedule.warmup_steps", 10**16), ("schedule.decay_steps", 10**16), ("optim.adagc_warmup", 10**16),
    )),
    ("parallel.pipeline=interleaved parallel.stages_per_rank=1000000000000", "parallel.stages_per_rank="),
    ("parallel.pp=10000", "wanted at most one a block"),
    ("parallel.pp=2 parallel.stage_blocks=[1000000000000000000000,1]", "parallel.stage_blocks.0="),
    ("train.batch_ramp={start: 1, steps: 1000000000000000}", "train.batch_ramp.steps=1000000000000000"),
    ("model.topology_options.base_num_blocks=1000000000000", "base_num_blocks"),
    ("model.topology_options.base_dim=1000000000000", "base_dim"),
    ("model.rope_scaling={kind: llama3, factor: 8.0, original_seq_len: 1000000000000}", "original_seq_len"),
    ("model.dim=1" + "0" * 399, "model.dim=a whole number of over 60 digits: wanted less than"),
    ("model.dim=1" + "0" * 400, "a whole number of 401 digits"),
    ("model.dim=1" + "0" * 5000, "a whole number of 5001 digits"),
    ("optim.lr=1" + "0" * 399, "optim.lr="),
    ("optim.lr=1" + "0" * 5000, "a whole number of 5001 digits"),
    ("optim.lr=1e" + "9" * 5000, "optim.lr=inf"),
    # FP16 and its loss scale
    *((f"precision.compute=fp16 precision.loss_scale={value}", f"precision.loss_scale={shown}: wanted {wanted}")
      for value, shown, wanted in (
        ("3", "3", "a power of two"), ("0", "0", "a power of two"), ("-2", "-2", "a power of two"),
        (".nan", "nan", "a power of two"), ("1e39", "1e+39", "a power of two"), ("1e-39", "1e-39", "a power of two"),
        ("1152921504606846977", "1152921504606846977", "a power of two"),  # 2^60 + 1
        ("1" + "0" * 399, "a whole number of over 60 digits", "a power of two"),
        ("true", "True", "dynamic, or a power of two"), ("static", "'static'", "dynamic, or a power of two"),
        ("[1]", "[1]", "dynamic, or a power of two"),
    )),
    ("precision.loss_scale=65536", "precision.loss_scale=65536 has no effect with precision.compute=fp32; remove it"),
    ("precision.compute=bf16 precision.loss_scale=dynamic",
     "precision.loss_scale=dynamic has no effect with precision.compute=bf16; remove it"),
    ("precision.compute=fp16 precision.residual_dtype=fp16", "grows beyond 65504, where FP16 ends; leave it unset"),
    ("precision.compute=fp16 precision.residual_dtype=bf16", "bits that FP16 branches have; leave it unset (fp32)"),
    ("precision.compute=fp16 precision.residual_dtype=fp64", "fp64 is for both or neither"),
    ("precision.compute=fp16 precision.loss_scale.value=2", "precision.loss_scale={'value': 2}"),
    # numbers that FP32 does not hold
    *((f"{key}={value}", "a number that FP32 holds, from 1.17549e-38") for key, value in (
        ("optim.eps", "1e-46"), ("optim.eps", "1e-320"), ("optim.lr", "1e39"), ("optim.lr", "1e-300"),
        ("optim.clip_norm", "1e-45"), ("optim.weight_decay", "1e300"), ("model.norm_eps", "1e-40"),
        ("model.embedding_multiplier", "1e200"), ("model.logits_scaling", "1e-310"), ("model.logit_softcap", "1e-39"),
        ("model.attention_multiplier", "1e40"), ("model.attention_softcap", "1e-44"), ("train.z_loss", "1e-60"),
        ("model.init.embedding_std", "1e-99"), ("model.init.head_std", "1e99"), ("train.max_minutes", "1e300"),
        ("model.rope_theta", "1e300"), ("model.topology_options.alpha", "1e-39"),
        ("data.blend", "[{path: x, weight: 1e-320}]"),
    )),
    ("model.init={distribution: normal, std: 1e-320}", "a number that FP32 holds"),
    ("model.rope_theta=1e-320", "model.rope_theta="),
    ("model.rope_theta=0.5", "greater than or equal to 1"),
    ("model.rope_scaling={kind: linear, factor: 1e99}", "a number that FP32 holds"),
    # strings
    ('train.output="a\\0b"', "wanted a name without NUL"),
    ('data.path="\\0"', "wanted a name without NUL"),
    ('data.path="\\ud800"', "data.path="),
    ("train.output=" + "x" * 5000, "at most 4096"),
    ("x" * 100_000, "is not of the form section.key=value"),
    ("x" * 100_000 + "=1", "is not of the form section.key=value"),
    ("=".join(["a." * 50_000 + "a", "1"]), "is not of the form section.key=value"),
    ("model.topology=" + "deepnorm" * 2000, "at most 100 characters"),
    ("kernels.attention=" + "fused" * 2000, "at most 100 characters"),
    ("model.norm=" + "layernorm" * 2000, "model.norm="),
    ("model.dim=" + "[" * 1000, "deep; a recipe is not so large"),
    ("model=[1, 2]", "wanted a section"),
    ("train.sample_prompt=[]", "train.sample_prompt="),
]  # fmt: skip
FILES = {
    "aliases that grow": (BOMB, "over 8,000 values"),
    "merge keys that grow": (MERGES, "the tag 'merge'"),
    "a merge key": (GOOD + "<<: {a: 1}\n", "<<: no such setting"),
    "a section with an empty one in it": (GOOD + "foo: {bar: {}}\n", "foo.bar: no such setting"),
    "a section with keys that are no names": (GOOD + "foo: {1: {null: 2}}\n", "foo.1.None: no such setting"),
    "a section of sections": (GOOD + "foo: " + "{a: " * 12 + "1" + "}" * 12 + "\n", "foo.a.a.a"),
    "a section with a long name in it": (GOOD + "foo: {" + "x" * 900 + ": 1}\n", "foo.xxx"),
    "a merge key with an alias": ("a: &a {b: 1}\n<<: *a\n" + GOOD, "no such setting"),
    "an anchor in itself": ("model: &a {b: *a}\n", "an anchor contains itself"),
    "an anchor that is not there": ("model: *a\n", "not valid YAML"),
    "a timestamp": ("model: !!timestamp abc\n", "the tag 'timestamp'"),
    "binary": ("model: !!binary ab$\n", "the tag 'binary'"),
    "a set": ("model: !!set {a, b}\n", "the tag 'set'"),
    "an ordered map": ("model: !!omap [a: 1]\n", "the tag 'omap'"),
    "pairs": ("model: !!pairs [a: 1]\n", "the tag 'pairs'"),
    "code": ("model: !!python/object/apply:os.system [id]\n", "the tag 'python/"),
    "a tag of its own": ("model: !mine {dim: 1}\n", "the tag '!mine'"),
    "a bool that is none": ("model: {bias: !!bool maybe}\n", "the tag 'bool'"),
    "an int that is none": ("model: {dim: !!int 0x40}\n", "the tag 'int'"),
    "a float that is none": ("model: {dim: !!float x}\n", "the tag 'float'"),
    "a null that is none": ("model: !!null x\n", "the tag 'null'"),
    "a map that is a list": ("model: !!map [1]\n", "the tag 'map'"),
    "a tag of gigabytes": (f"model: !<{'x' * 60_000}> 1\n", "the tag "),
    "5,000 digits": (f"model: {{dim: 1{'0' * 5000}}}\n", "a whole number of 5001 digits"),
    "nested lists": ("model: " + "[" * 60_000, "deep; a recipe is not so large"),
    "nested maps": ("model: " + "{a: " * 20_000, "deep; a recipe is not so large"),
    "a hundred thousand values": ("model: [" + "1," * 60_000 + "]", "over 8,000 values"),
    "a key of 1,000 letters": ("x" * 1000 + ": 1\n", "xxx...: no such setting"),
    "a key of 100,000 letters": ("x" * 100_000 + ": 1\n", "not valid YAML"),
    "twice a key of 1,000 letters": (f"{'x' * 1000}: 1\n" * 2, "is given twice"),
    "a list as key": ("? [1]\n: 2\n", "a key must be a name"),
    "a directive": ("%YAML 9.9\n---\na: 1\n", "not valid YAML"),
    "two documents": (GOOD + "---\n" + GOOD, "not valid YAML"),
    "a NUL": (b"model: \x00", "not valid YAML"),
    "no UTF-8": (b"model: \xff\xfe", "not UTF-8"),
    "nothing": (b"", "the file is empty"),
    "a number": (b"3", "got a int"),
    "megabytes": (b"#" * (1 << 20), "at most 262,144 are read"),
    "blends without end": (GOOD + "blend: [" + "{path: a, weight: 1.0}," * 1001 + "]\n", "no such setting"),
}


@pytest.mark.parametrize(("overrides", "wanted"), OVERRIDES, ids=lambda v: v[:50])
def test_an_override_that_no_run_can_have_costs_one_line(overrides, wanted, tmp_path, capfd):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    words = overrides.split(" ")
    given = words if all("=" in word for word in words) else [overrides]
    refused(["train", "--dry-run", path, *given], wanted, tmp_path, capfd)


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_recipe_costs_one_line(case, tmp_path, capfd):
    content, wanted = FILES[case]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(["train", path, "--dry-run"], wanted, tmp_path, capfd)


@pytest.mark.parametrize("case", NOT_FILES)
def test_a_recipe_that_is_not_a_file_is_not_read(case, tmp_path, capfd):
    path = tmp_path / "recipe.yaml"
    NOT_FILES[case](path)
    refused(["train", path, "--dry-run"], "cannot be read", tmp_path, capfd)
    refused(["data", "show", path], "cannot be read", tmp_path, capfd)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "", "/dev/zero", "/dev/stdin/x", "nowhere.yaml"])
def test_a_name_that_no_recipe_has_costs_one_line(name, tmp_path, capfd):
    refused(["train", name, "--dry-run"], "cannot be read", tmp_path, capfd)


def test_the_kinds_that_are_not_files_are_what_they_are_called(tmp_path):
    for i, make in enumerate((ZEROS, PIPE, FOLDER, LOOP, put(3))):
        make(tmp_path / str(i))
    found = [(tmp_path / str(i)) for i in range(5)]
    assert found[0].is_char_device() and found[1].is_fifo() and found[2].is_dir() and found[3].is_symlink()
    assert found[4].read_bytes() == bytes(3)


def test_a_run_of_ten_thousand_million_steps_is_checked_at_once(byte_data, tmp_path, capfd):
    """Nothing counts its steps: neither the schedule's shape nor the samples that will be drawn."""
    import time

    from megaresnorm.cli import main

    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{dim: 16, num_blocks: 1, num_heads: 2, seq_len: 16}}\ndata: {{path: {byte_data}}}\n"
        "train: {output: out, steps: 10000000000, global_batch: 8, micro_batch: 2, "
        "batch_ramp: {start: 2, steps: 9000000000}}\n"
    )
    start = time.process_time()
    assert main(["train", str(path), "--dry-run"]) == 0
    assert main(["data", "show", str(path)]) == 0
    # 3e9 steps of 2, 3e9 of 4, 3e9 of 6, 1e9 of 8 samples.
    assert "44,000,000,000" in capfd.readouterr().out and time.process_time() - start < 4
