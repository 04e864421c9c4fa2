"""Who a process is among ranks: one place reads the variables, and refuses what cannot be waited for."""

import pytest

from megaresnorm.cli import main
from megaresnorm.errors import ConfigError
from megaresnorm.parallel.environment import Environment, read_environment

TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_torchruns_variables_are_read():
    found = read_environment({**TWO, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "3"})
    assert (found.rank, found.local_rank, found.world_size, found.ranks_here) == (1, 1, 2, 2)
    assert (found.master_addr, found.master_port, found.attempt) == ("127.0.0.1", 29500, 3)
    assert found.one_node and not found.elastic and found.launcher is None


@pytest.mark.parametrize("left", [{"RANK": "1"}, {"RANK": "abc", "LOCAL_RANK": "7"}, {"MASTER_PORT": "99999"}, {}])
def test_what_is_left_in_a_shell_makes_no_rank(left):
    assert read_environment(left) == Environment()


WRONG = {
    "a rank that is no number": ({"RANK": "abc"}, "RANK is 'abc', wanted a whole number from 0 to 1"),
    "an empty rank": ({"RANK": ""}, "RANK missing"),
    "a rank beyond the last": ({"RANK": "2"}, "RANK is '2', wanted a whole number from 0 to 1"),
    "a negative rank": ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    "a rank in other digits": ({"RANK": "\u0661"}, "wanted a whole number"),
    "a port that is none": ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999', wanted a whole number from 0 to 65535"),
    "a port that is a word": ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    "more ranks than there are": ({"WORLD_SIZE": str(10**12)}, "WORLD_SIZE is '1000000000000'"),
    "a million and one ranks": ({"WORLD_SIZE": "1048577"}, "wanted a whole number from 1 to 1048576"),
    "a size that is a word": ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
    "no rank at all": ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    "an empty size": ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
    "no address": ({"MASTER_ADDR": ""}, "MASTER_ADDR missing"),
    "more ranks here than in all": ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is '3'"),
    "restarts that are a word": ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT is 'x'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_variable_is_one_line_of_any_command(case, monkeypatch, capsys):
    changed, says = WRONG[case]
    with pytest.raises(ConfigError):
        read_environment({**TWO, **changed})
    for name, value in {**TWO, **changed}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "configs/quickstart.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and "start with megaresnorm launch, or unset WORLD_SIZE" in line


def test_a_rank_left_in_a_shell_silences_nothing(tiny, tmp_path, monkeypatch, capsys):
    """Of one process: its log, and its errors."""
    from megaresnorm.recipe.load import dump_recipe

    monkeypatch.setenv("RANK", "1")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny(train={"steps": 2})))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert "step 2/2" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "recipe.yaml"), "model.dim=0"]) == 2
    assert "megaresnorm: error: " in capsys.readouterr().err
