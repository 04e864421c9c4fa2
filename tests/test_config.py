"""Recipes: YAML that means what it says, and one line for everything that is wrong."""

import json
import re
from pathlib import Path

import pytest

from megaresnorm.cli import main
from megaresnorm.cli.recipes import recipe_schema
from megaresnorm.errors import ConfigError
from megaresnorm.recipe.explain import recipe_keys
from megaresnorm.recipe.load import apply_override, build_recipe, dump_recipe, load_recipe, read_yaml

ROOT = Path(__file__).parents[1]
GOOD = """
model: {dim: 64, num_blocks: 4, num_heads: 4, seq_len: 32}
data: {path: data}
train: {output: out, steps: 10, global_batch: 8}
"""

# (overrides or a whole file, what the line must contain). A suggestion stands in a typo's line.
BAD = [
    # typos of keys, in their own section
    (["model.num_blokcs=4"], ["model.num_blokcs", "did you mean model.num_blocks?"]),
    (["model.dimm=4"], ["did you mean model.dim?"]),
    (["model.n_heads=4"], ["did you mean model.num_heads?"]),
    (["model.num_head=4"], ["did you mean model.num_heads?"]),
    (["model.topolgy=keel"], ["did you mean model.topology?"]),
    (["model.drop_out=0.1"], ["did you mean model.dropout?"]),
    (["model.tie_embeddings=true"], ["did you mean model.tied_embeddings?"]),
    (["model.seqlen=32"], ["did you mean model.seq_len?"]),
    (["model.vocabsize=32"], ["did you mean model.vocab_size?"]),
    (["model.qknorm=head"], ["did you mean model.qk_norm?"]),
    (["model.init.distributoin=xavier"], ["did you mean model.init.distribution?"]),
    (["model.topology_options.base_dims=4"], ["did you mean model.topology_options.base_dim?"]),
    (["train.step=4"], ["did you mean train.steps?"]),
    (["train.globalbatch=4"], ["did you mean train.global_batch?"]),
    (["train.microbatch=4"], ["did you mean train.micro_batch?"]),
    (["train.outputs=x"], ["did you mean train.output?"]),
    (["train.batch_ramp.begin=4", "train.batch_ramp.steps=4"], ["train.batch_ramp.begin", "start, steps"]),
    (["optim.learning_rate=4"], ["optim.learning_rate", "did you mean optim.lr?"]),
    (["recompute.gathered=keep"], ["recompute.gathered=keep has no effect with parallel.tensor_layout=full"]),
    (["parallel.merge_chunks=2"], ["parallel.merge_chunks=2 has no effect with parallel.tensor_layout=full"]),
    (["engine.name=megatron"], ["engine.name='megatron'", "native, deepspeed"]),
    (["model.num_layers=4"], ["did you mean model.num_blocks?"]),
    (["model.hidden_size=4"], ["did you mean model.dim?"]),
    (["optim.weightdecay=0.1"], ["did you mean optim.weight_decay?"]),
    (["optim.beta_1=0.9"], ["did you mean optim.beta1?"]),
    (["schedule.warmup=4"], ["did you mean schedule.warmup_steps?"]),
    (["precision.residual_type=bf16"], ["did you mean precision.residual_dtype?"]),
    (["data.paths=x"], ["did you mean data.path?"]),
    (["kernels.addnorm=auto"], ["did you mean kernels.add_norm?"]),
    # typos of sections, and keys in the wrong section
    (["modle.dim=4"], ["modle.dim", "did you mean model.dim?"]),
    (["optimizer.lr=1.0"], ["optimizer.lr", "did you mean optim.lr?"]),
    (["train.lr=0.1"], ["did you mean optim.lr?"]),
    (["model.weight_decay=0.1"], ["did you mean optim.weight_decay?"]),
    (["train.warmup_steps=1"], ["did you mean schedule.warmup_steps?"]),
    # typos of values
    (["model.norm=layer_norm"], ["model.norm='layer_norm'", "layernorm, rmsnorm", "did you mean layernorm?"]),
    (["model.positions=ropee"], ["did you mean rope?"]),
    (["model.ffn=swglu"], ["did you mean swiglu?"]),
    (["schedule.kind=cosin"], ["did you mean cosine?"]),
    (["precision.compute=bfloat16"], ["fp32, bf16, fp16, fp8, fp64", "it is called bf16 here"]),
    (["optim.clip=adaGC"], ["did you mean adagc?"]),
    (["train.device=gpu"], ["auto, cpu, cuda"]),
    # types and ranges
    (["model.dim=0"], ["model.dim=0", "greater than or equal to 1"]),
    (["model.dim='64'"], ["model.dim='64'", "integer", "got a str"]),
    (["model.dim=64.5"], ["model.dim=64.5", "integer"]),
    (["model.dropout=1.0"], ["model.dropout=1.0", "less than 1"]),
    (["model.dropout=-0.1"], ["greater than or equal to 0"]),
    (["model.bias=1"], ["model.bias=1", "boolean"]),
    (["model.bias=no"], ["model.bias='no'", "boolean"]),
    (["optim.lr=.nan"], ["optim.lr=nan", "finite"]),
    (["optim.lr=.inf"], ["optim.lr=inf", "finite"]),
    (["optim.lr=0.0"], ["greater than 0"]),
    (["optim.eps=1e-8x"], ["optim.eps='1e-8x'", "number"]),
    (["watchdog.step=0"], ["watchdog.step=0", "greater than or equal to 1"]),
    (["watchdog.start=604801"], ["watchdog.start=604801", "less than or equal to 604800"]),
    (["watchdog.checkpoint=2.5"], ["watchdog.checkpoint=2.5", "integer"]),
    (["watchdog.check_point=60"], ["did you mean watchdog.checkpoint?"]),
    (["checkpoint.keep=1"], ["checkpoint.keep=1", "greater than or equal to 2"]),
    (["model=7"], ["model=7", "section"]),
    (["model.init=xavier"], ["model.init='xavier'", "section"]),
    (["train.output="], ["train.output=None", "string"]),
    # relations between settings
    (["model.num_heads=5"], ["model.num_heads=5 must divide model.dim=64", "[1, 2, 4, 8, 16, 32, 64]"]),
    (["model.num_kv_heads=3"], ["model.num_kv_heads=3 must divide model.num_heads=4", "[1, 2, 4]"]),
    (["model.head_dim=7"], ["model.head_dim=7 must be even"]),
    (["train.micro_batch=3"], ["train.micro_batch=3 must divide train.global_batch=8", "[1, 2, 4, 8]"]),
    (
        ["schedule.kind=wsd", "schedule.decay_steps=4", "schedule.warmup_steps=7"],
        ["7 steps of warm-up", "train.steps=10"],
    ),
    (["data.valid_fraction=0.6", "data.test_fraction=0.5"], ["must leave something to train on"]),
    (["precision.compute=fp64", "precision.residual_dtype=bf16"], ["fp64 is for both or neither"]),
    (["train.batch_ramp.start=16", "train.batch_ramp.steps=2"],
     ["train.batch_ramp.start=16", "at most train.global_batch=8"]),
    # settings without effect
    (["model.positions=learned", "model.rope_theta=500.0"], ["model.rope_theta=500.0 has no effect"]),
    (["model.init.position_std=0.1"], ["model.init.position_std=0.1 has no effect with model.positions=rope"]),
    (["model.init.std=0.1"], ["model.init.std=0.1 has no effect with model.init.distribution=xavier"]),
    (["optim.adagc_ratio=1.5"], ["optim.adagc_ratio=1.5 has no effect with optim.clip=global"]),
    (["schedule.kind=constant", "schedule.decay_steps=2"], ["schedule.decay_steps=2 has no effect"]),
    (["schedule.warmup_ratio=0.1", "schedule.warmup_steps=2"], ["schedule.warmup_steps=2 has no effect"]),
    (["schedule.min_lr=0.0001", "schedule.min_ratio=0.2"], ["schedule.min_ratio=0.2 has no effect"]),
    (["schedule.min_lr=0.1"], ["schedule.min_lr=0.1 must be at most optim.lr=0.001"]),
    (["schedule.kind=inverse_sqrt", "schedule.min_lr=0.0001"], ["schedule.min_lr=0.0001 has no effect"]),
    (["train.loggers=[tensorbord]"], ["tensorboard, wandb, mlflow", "did you mean tensorboard?"]),
    (["train.loggers=[mlflow]", "train.tensorboard=true"], ["both are given"]),
    (["schedule.kind=constant", "schedule.min_ratio=0.5"], ["schedule.min_ratio=0.5 has no effect"]),
    # overrides that are not overrides
    (["model.dim"], ["'model.dim'", "section.key=value"]),
    (["=3"], ["section.key=value"]),
    (["model.dim.x=3"], ["model.dim is a value, not a section"]),
    (["model.dim=[1"], ["not valid YAML"]),
    # whole files
    ("", ["the file is empty"]),
    ("- a\n- b\n", ["got a list at the top level"]),
    ("model: {dim: 1\n", ["not valid YAML"]),
    ("model:\n  dim: 1\n  dim: 2\n", ["line 3", "'dim' is given twice"]),
    ("model: !!python/object/apply:os.system ['true']\n", ["not valid YAML"]),
    ("a: &a [*a]\n", ["an anchor contains itself"]),
    ("model: {dim: 64, num_blocks: 4, num_heads: 4, seq_len: 32}\ndata: {path: d}\n", ["train is missing"]),
    ("model: {num_blocks: 4, num_heads: 4, seq_len: 32}\ndata: {path: d}\ntrain: {}\n",
     ["model.dim is missing", "model.dim="]),
    ("\tmodel: 1\n", ["line 1", "not valid YAML"]),
]  # fmt: skip


@pytest.mark.parametrize(("what", "parts"), BAD, ids=lambda v: str(v)[:60])
def test_bad_recipe_costs_one_line_and_exit_2(what, parts, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD if isinstance(what, list) else what)
    overrides = what if isinstance(what, list) else []
    assert main(["train", str(path), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"megaresnorm: error: {path}: ")
    for part in parts:
        assert part in error


def test_there_are_at_least_sixty_bad_recipes():
    assert len(BAD) >= 60


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_unreadable_recipe_is_named(content, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    assert main(["train", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_unknown_topology_and_kernel_are_suggested(tiny):
    from megaresnorm.model.lint import check
    from megaresnorm.run import Run

    with pytest.raises(ConfigError, match=r"did you mean deepnorm\?"):
        check(tiny(model={"topology": "deepnom"}))
    with pytest.raises(ConfigError, match=r"wanted one of auto, .*reference"):
        Run(tiny(kernels={"add_norm": "referense"}))


def test_yaml_scalars_mean_what_they_look_like():
    text = "[3e-4, 1e5, 1., .5, no, on, yes, 010, 1_000, 0x1f, 12:30:00, 2024-01-01, ~, null, true, -3, +2.5e-1, '3']"
    assert read_yaml(text) == [
        3e-4, 1e5, 1.0, 0.5, "no", "on", "yes", 10, "1_000", "0x1f", "12:30:00", "2024-01-01", None, None, True, -3,
        0.25, "3",
    ]  # fmt: skip


def test_overrides_use_the_same_rules_and_reach_every_key(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    recipe = load_recipe(
        path,
        [
            "optim.lr=3e-4",
            "model.init.embedding_std=0.02",
            "train.batch_ramp={start: 2, steps: 5}",
            "train.micro_batch=2",
        ],
    )
    assert recipe.optim.lr == 3e-4 and recipe.model.init.embedding_std == 0.02 and recipe.train.batch_ramp.start == 2


def test_a_dumped_recipe_reads_back_equal(tiny):
    recipe = tiny(optim={"lr": 1e-5, "eps": 1e-12}, train={"sample_prompt": "no: 010\n"})
    assert build_recipe(read_yaml(dump_recipe(recipe))) == recipe


def test_recipes_are_frozen(tiny):
    with pytest.raises(ValueError, match="frozen"):
        tiny().model.dim = 3


def test_schema_for_editors_is_current_and_documents_every_key():
    assert json.loads((ROOT / "configs" / "recipe.schema.json").read_text()) == recipe_schema(), (
        "run: megaresnorm schema > configs/recipe.schema.json"
    )
    definitions = recipe_schema()["$defs"]
    for section in definitions.values():
        for name, field in section["properties"].items():
            assert field.get("description"), f"{section['title']}.{name} has no description"
    assert len(set(recipe_keys())) > 50


@pytest.mark.parametrize(
    "text", ["1e5", "08", "1e-3", ".5e3", "010", "true", "null", "~", "", "no", "0x1f", "3", "a: b", "# x", "é\n\t"]
)
def test_strings_that_look_like_something_else_survive_being_saved(tiny, text):
    recipe = tiny(train={"sample_prompt": text})
    assert build_recipe(read_yaml(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("text", "part"),
    [("? [1, 2]\n: 3\n", "line 1: a key must be a name"), ("? {a: 1}\n: 3\n", "line 1: a key must be a name")],
)
def test_keys_are_names(text, part):
    with pytest.raises(ConfigError, match=part):
        read_yaml(text)


def test_aliases_cannot_make_an_error_endless(tmp_path, capsys):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join([*lines, "model: *a9", "data: *a9"]))
    assert main(["train", str(path)]) == 2
    assert len(capsys.readouterr().err) < 500


def test_settings_of_older_versions_are_read_under_their_new_names(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    for old, new in (("parameters", True), ("gradients", False)):
        recipe = load_recipe(path, ["parallel.dp_shard=2", f"parallel.shard={old}"])
        assert recipe.parallel.reshard_after_forward is new
        assert recipe == load_recipe(
            path, ["parallel.dp_shard=2", f"parallel.reshard_after_forward={str(new).lower()}"]
        )
        assert "\n  shard:" not in dump_recipe(recipe)
    assert "parallel.shard" not in set(recipe_keys())


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["parallel.shard=gradients", "parallel.reshard_after_forward=true"], "both are given; remove parallel.shard"),
        (["parallel.shard=optimizer"], "reshard_after_forward now; set that to true (parameters), false (gradients)"),
        (["parallel.shard=[1]"], "it is called parallel.reshard_after_forward now"),
    ],
)
def test_an_old_name_that_cannot_be_read_says_the_new_one(tmp_path, overrides, says):
    (tmp_path / "recipe.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_recipe(tmp_path / "recipe.yaml", overrides)


PATHS = """
model: {dim: 8, num_blocks: 1, num_heads: 1, seq_len: 8}
data: {blend: [{path: ./near, weight: 1.0}, {path: far, weight: 1.0}], valid: {a: ../up, b: plain}, valid_fraction: 0.0,
       tokenizer: ./t/tokenizer.json}
train: {output: ../runs/one, steps: 2, initial_weights: ./}
"""


def test_paths_that_begin_with_a_dot_are_relative_to_the_recipe_and_all_others_to_the_working_directory(
    tmp_path, monkeypatch
):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "r.yaml").write_text(PATHS)
    (tmp_path / "elsewhere").mkdir()
    for here, name in ((tmp_path, "configs/r.yaml"), (folder, "r.yaml"), (tmp_path / "elsewhere", "../configs/r.yaml")):
        monkeypatch.chdir(here)
        recipe = load_recipe(name)
        assert [source.path for source in recipe.data.sources] == [str(folder / "near"), "far"]
        assert recipe.data.valid == {"a": str(tmp_path / "up"), "b": "plain"}
        assert recipe.data.tokenizer == str(folder / "t" / "tokenizer.json")
        assert recipe.train.output == str(tmp_path / "runs" / "one")
        assert recipe.train.initial_weights == str(folder)
        # What is typed is relative to where it is typed.
        typed = load_recipe(name, ["train.output=./out", "data.valid.b=../x"])
        assert typed.train.output == str(here / "out") and typed.data.valid["b"] == str(here.parent / "x")
        # The recipe that a run keeps says the same from anywhere.
        (tmp_path / "elsewhere" / "copy.yaml").write_text(dump_recipe(recipe))
        assert load_recipe(tmp_path / "elsewhere" / "copy.yaml") == recipe


def test_home_and_variables_are_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("EMPTY", "")
    (tmp_path / "r.yaml").write_text(
        PATHS.replace("./near", "~/near").replace("far", "$SCRATCH/far").replace("../up", "'${SCRATCH}/up'")
        .replace("./t/tokenizer.json", "~/t").replace("../runs/one", "~/one").replace("./}", '"$SCRATCH/w"}')
    )  # fmt: skip
    recipe = load_recipe("~/r.yaml".replace("~", str(tmp_path)))
    assert [source.path for source in recipe.data.sources] == [str(tmp_path / "near"), "/scratch/me/far"]
    assert recipe.data.valid["a"] == "/scratch/me/up" and recipe.data.tokenizer == str(tmp_path / "t")
    assert recipe.train.output == str(tmp_path / "one") and recipe.train.initial_weights == "/scratch/me/w"
    from megaresnorm.cli.arguments import path, path_text, source

    for parse in (lambda text: str(path(text)), path_text, source):
        assert parse("~/a") == str(tmp_path / "a") and parse("$SCRATCH/a") == "/scratch/me/a"
        for odd in ("$(pwd)/x", "cost$", "${NOT_THERE", "$EMPTY/x", "$5"):
            with pytest.raises(ConfigError):
                parse(odd)
    assert source("hf:~/x:config") == f"hf:{tmp_path}/x:config"


def test_home_is_expanded_by_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.txt").write_text("some text")
    assert main(["prepare", "~/t.txt", "--out", "~/data", "--workers", "1"]) == 0
    assert main(["data", "show", "~/data"]) == 0 and main(["data", "verify", "$HOME/data"]) == 0
    assert (tmp_path / "data" / "tokens.bin").exists()


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.path=my #1 data", ("data", "path"), "my #1 data"),
        ("data.path=#1", ("data", "path"), "#1"),
        ("data.path='quoted' # a comment", ("data", "path"), "quoted"),
        ("train.tensorboard=True", ("train", "tensorboard"), True),
        ("train.tensorboard=FALSE", ("train", "tensorboard"), False),
        ("train.max_minutes=Null", ("train", "max_minutes"), None),
        ("train.steps=5 # five", ("train", "steps"), 5),
        ("train.sample_prompt=a#b", ("train", "sample_prompt"), "a#b"),
    ],
)
def test_what_is_typed_behind_an_equals_sign_is_meant(override, key, value):
    values: dict = {}
    apply_override(values, override)
    assert values == {key[0]: {key[1]: value}} and type(values[key[0]][key[1]]) is type(value)


def test_every_path_of_a_recipe_can_be_relative_to_it():
    """The fields that are paths, and those that the reader of a file looks for."""
    from megaresnorm.recipe.load import _PATHS

    schema = recipe_schema()
    found = set()

    def walk(node, keys):
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        if node.get("format") == "path":
            found.add(keys)
        for name, inner in node.get("properties", {}).items():
            walk(inner, (*keys, name))
        for inner in (*node.get("anyOf", ()), *node.get("allOf", ()), *node.get("patternProperties", {}).values()):
            walk(inner, keys)
        for part in ("items", "additionalProperties"):
            if isinstance(node.get(part), dict):
                walk(node[part], keys)

    walk(schema, ())
    assert found == set(_PATHS) and len(found) == 6
