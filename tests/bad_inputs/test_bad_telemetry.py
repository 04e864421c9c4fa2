"""Telemetry that would see nothing, or cannot see what it is to, costs one line."""

import pytest
from refused import refused

from megaresnorm.errors import ConfigError
from megaresnorm.recipe.load import build_recipe


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"compile": "blocks"}}, "telemetry.every=5 does not go with train.compile=blocks"),
        ({"train": {"compile": "cuda_graphs"}}, "does not go with train.compile=cuda_graphs"),
        ({"train": {"compile": "auto"}}, "set train.compile=none, or remove it"),
        ({"telemetry": {"every": -1}}, "telemetry.every=-1"),
        ({"telemetry": {"every": True}}, "telemetry.every=True"),
        ({"telemetry": {"every": 2.5}}, "telemetry.every=2.5"),
        ({"telemetry": {"every": 10**30}}, "telemetry.every"),
        (
            {"telemetry": {"every": 0, "probe_every": 3}, "train": {"compile": "auto"}},
            "telemetry.probe_every=3 does not",
        ),
        ({"telemetry": {"probe_every": 3}, "engine": {"name": "deepspeed"}}, "set engine.name=native, or remove it"),
        ({"telemetry": {"probe_every": -3}}, "telemetry.probe_every=-3"),
        ({"telemetry": {"often": 1}}, "telemetry.often"),
        ({"telemetry": 5}, "telemetry"),
    ],
)
def test_numbers_that_cannot_be_seen_are_refused(sections, says):
    values = {
        "model": {"dim": 16, "num_blocks": 3, "num_heads": 2, "seq_len": 8, "vocab_size": 64},
        "data": {"path": "none"},
        "precision": {"compute": "bf16"},
        "telemetry": {"every": 5},
        "train": {"output": "none", "steps": 2},
    }
    for section, settings in sections.items():
        values[section] = {**values.get(section, {}), **settings} if isinstance(settings, dict) else settings
    with pytest.raises(ConfigError) as error:
        build_recipe(values)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_run_is_refused_before_anything_is_built(byte_data, tmp_path, capfd):
    argv = ["train", "configs/quickstart.yaml", f"data.path={byte_data}", f"train.output={tmp_path / 'run'}"]
    argv += ["telemetry.probe_every=2", "train.compile=blocks"]
    refused(argv, "telemetry.probe_every=2 does not go with train.compile=blocks", tmp_path, capfd)


@pytest.mark.parametrize("name", ["numbers.jsonl", "depth.jsonl"])
@pytest.mark.parametrize("kind", ["a link", "a folder"])
def test_what_stands_in_the_place_of_the_file_is_not_written_over(kind, name, tiny, tmp_path):
    from megaresnorm.errors import TrainingError
    from megaresnorm.trainer import train

    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / name
    if kind == "a link":
        (tmp_path / "victim").write_text("kept")
        path.symlink_to(tmp_path / "victim")
    else:
        path.mkdir()
    with pytest.raises(TrainingError, match="cannot be written"):
        train(tiny(precision={"compute": "bf16"}, telemetry={"every": 1}))
    assert kind == "a folder" or (tmp_path / "victim").read_text() == "kept"
