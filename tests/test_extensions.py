"""Extensions in C++: compiled once by any number of processes, and never waited for without end."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from megaresnorm.engines import extensions
from megaresnorm.engines.extensions import load_extension
from megaresnorm.errors import ConfigError
from megaresnorm.kernels.cpu.trusted import BuildError
from megaresnorm.recipe.engine import EngineRecipe

SOURCE = """#include <Python.h>
#include "answer.h"
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(ANSWER); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {NULL, NULL, 0, NULL}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "answer", NULL, -1, methods};
PyMODINIT_FUNC PyInit_answer() { return PyModule_Create(&module); }
"""
fork = multiprocessing.get_context("fork")


class Builder:
    """Compiles and imports as torch does, file ``lock`` and all, but without torch's headers, which take a minute."""

    name = "answer"

    def __init__(self, folder: Path) -> None:
        self._folder, self._loaded_ops = folder, {}
        self.meanwhile = lambda: None

    def sources(self):
        return ["answer.cpp"]

    def include_paths(self):
        return ["includes"]

    def deepspeed_src_path(self, code_path):
        return str(self._folder / code_path)

    def load(self, verbose=False):
        folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / self.name
        folder.mkdir(parents=True, exist_ok=True)
        baton = FileBaton(str(folder / "lock"))
        if not baton.try_acquire():
            baton.wait()
        (self._folder / f"compiled-{os.getpid()}").touch()
        print("Time to load answer op: 1.0 seconds")  # noqa: T201 - as DeepSpeed does
        self.meanwhile()
        header, target = self._folder / "includes", folder / "answer.so"
        include = sysconfig.get_paths()["include"]
        command = [
            "c++",
            "-shared",
            "-fPIC",
            f"-I{include}",
            f"-I{header}",
            *map(self.deepspeed_src_path, self.sources()),
        ]
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, check=False)
        baton.release()
        if done.returncode:
            raise RuntimeError(f"Error building extension 'answer': [1/2] c++ -Werror\nFAILED: x\n{done.stderr}")
        return extensions._import(self.name, str(target))

    @property
    def compiled(self) -> int:
        """How many processes have."""
        return len(list(self._folder.glob("compiled-*")))


@pytest.fixture
def builder(tmp_path, monkeypatch):
    monkeypatch.setattr(extensions, "unavailable", lambda: None)  # it needs no ninja
    monkeypatch.setenv("MEGARESNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/of/the/user")
    (tmp_path / "ops" / "includes").mkdir(parents=True)
    (tmp_path / "ops" / "answer.cpp").write_text(SOURCE)
    (tmp_path / "ops" / "includes" / "answer.h").write_text("#define ANSWER 42\n")
    return Builder(tmp_path / "ops")


def again(builder: Builder) -> Builder:
    """As a process that was started anew has it."""
    return Builder(builder._folder)


def folder_of(tmp_path) -> Path:
    (folder,) = (tmp_path / "cache" / "kernels").iterdir()
    return folder


def test_it_is_compiled_once_in_silence_with_one_line_of_log(builder, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, logger="megaresnorm")
    path, mask = os.environ["PATH"], os.umask(0o002)
    for each in (builder, again(builder)):
        assert load_extension(each, "1.0").answer() == 42
        assert each._loaded_ops["answer"].answer() == 42 and load_extension(each) is each._loaded_ops["answer"]
    assert os.umask(mask) == 0o002
    assert builder.compiled == 1 and "Time to load" not in "".join(capfd.readouterr())
    assert [record.message for record in caplog.records] == ["compiling DeepSpeed's answer (once; a minute or two)"]
    assert (os.environ["TORCH_EXTENSIONS_DIR"], os.environ["PATH"]) == ("/of/the/user", path)
    assert sorted(file.name for file in folder_of(tmp_path).iterdir()) == ["answer.so", "answer.so.sha256", "lock"]


def test_another_version_header_or_compiler_is_another_module(builder, monkeypatch, tmp_path):
    load_extension(builder, "1.0")
    header = builder._folder / "includes" / "answer.h"
    header.write_text("#define ANSWER 43\n")
    assert load_extension(again(builder), "1.0").answer() == 43
    load_extension(again(builder), "1.1")
    monkeypatch.setenv("CXX", "g++ -O1")
    load_extension(again(builder), "1.1")
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 4


def test_processes_that_start_together_compile_once_and_say_what_they_wait_for(builder, tmp_path):
    def process():
        extensions.log.addHandler(logging.FileHandler(tmp_path / f"log-{os.getpid()}"))
        extensions.log.setLevel(logging.INFO)
        os._exit(load_extension(builder).answer())

    builder.meanwhile = lambda: time.sleep(0.5)
    running = [fork.Process(target=process) for _ in range(3)]
    for one in running:
        one.start()
    for one in running:
        one.join(60)
    assert [one.exitcode for one in running] == [42] * 3 and builder.compiled == 1
    told = sorted(file.read_text().strip() for file in tmp_path.glob("log-*"))
    waiting = "waiting for another process that compiles DeepSpeed's answer"
    assert told == ["compiling DeepSpeed's answer (once; a minute or two)", waiting, waiting]


def test_a_process_killed_while_it_compiles_holds_up_no_other(builder, tmp_path):
    """Its ``lock`` and half an object lie in its folder, where a compiler that outlives it goes on writing."""

    def compile_for_ever():
        there = Path(os.environ["TORCH_EXTENSIONS_DIR"])
        (there / "answer" / "half.o").write_text("half")
        subprocess.Popen(["sh", "-c", "while touch answer/$$.o; do sleep 0.01; done"], cwd=there)
        (tmp_path / "in the middle").touch()
        time.sleep(60)

    builder.meanwhile = compile_for_ever
    killed = fork.Process(target=lambda: load_extension(builder))
    killed.start()
    while not (tmp_path / "in the middle").exists():
        time.sleep(0.01)
    (left,) = folder_of(tmp_path).glob("*.tmp")
    assert (left / "answer" / "lock").exists()
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert load_extension(again(builder)).answer() == 42 and builder.compiled == 2
    assert load_extension(again(builder)).answer() == 42 and builder.compiled == 2


def test_waiting_has_an_end(builder, tmp_path, monkeypatch):
    monkeypatch.setattr(extensions, "BUILD_SECONDS", 0.2)
    builder.meanwhile = lambda: (tmp_path / "in the middle").touch() or time.sleep(60)
    other = fork.Process(target=lambda: load_extension(builder))
    other.start()
    while not (tmp_path / "in the middle").exists():
        time.sleep(0.01)
    with pytest.raises(
        BuildError, match=r"another process is compiling DeepSpeed's answer and does not end; end it and"
    ):
        load_extension(again(builder))
    other.kill()
    other.join()


def test_a_compiler_that_fails_says_so_in_one_line_and_leaves_nothing(builder, tmp_path, capfd):
    (builder._folder / "includes" / "answer.h").write_text("#error no such answer\n")
    with pytest.raises(BuildError) as e:
        load_extension(builder)
    assert str(e.value).startswith("answer could not be compiled: ") and "error: #error no such answer" in str(e.value)
    assert "\n" not in str(e.value) and "Time to load" not in "".join(capfd.readouterr())
    assert [file.name for file in folder_of(tmp_path).iterdir()] == ["lock"]
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/of/the/user"


def test_a_compiler_that_does_not_say_its_version_is_named(builder, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match=r"^false --version fails .exit code 1.; unset CXX, or name a C\+\+ compiler$"):
        load_extension(builder)
    (tmp_path / "nothing").touch(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    with pytest.raises(BuildError, match=r"nothing cannot be started .*; set CXX to another compiler$"):
        load_extension(builder)


def test_what_others_could_have_written_is_not_loaded(builder, tmp_path):
    load_extension(builder)
    folder = folder_of(tmp_path)
    (folder / "answer.so").write_bytes(b"another's")
    assert load_extension(again(builder)).answer() == 42
    folder.chmod(0o777)
    with pytest.raises(BuildError, match=r"others can write to .*answer-.* or set MEGARESNORM_CACHE"):
        load_extension(again(builder))


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("c++", r"no C\+\+ compiler was found \(c\+\+\); install g\+\+, or name another compiler in CXX"),
        ("ninja", "ninja was not found, by which torch compiles C\\+\\+; pip install ninja"),
        ("quote", "CXX=g\\+\\+ ' is no command .No closing quotation.; unset CXX, or name a C\\+\\+ compiler"),
    ],
)
def test_what_is_missing_is_said_when_the_recipe_is_checked(missing, line, monkeypatch, tiny):
    from megaresnorm.opening import open_recipe

    monkeypatch.setattr(extensions.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(extensions.shutil, "which", lambda name, path=None: None if name == missing else name)
    if missing == "quote":
        monkeypatch.setenv("CXX", "g++ '")
    else:
        monkeypatch.delenv("CXX", raising=False)
    recipe = tiny(engine={"name": "deepspeed", "zero_stage": 2, "offload": "optimizer"})
    with pytest.raises(ConfigError, match=f"^engine.offload=optimizer: {line}; engine.offload=none needs no compiler$"):
        open_recipe(lambda: recipe)
    assert extensions.check_offload(EngineRecipe()) is None
