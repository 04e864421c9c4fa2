"""For tools that look for it. Everything is in pyproject.toml, but for one step: configs/ travels in the wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies the recipes and their schema into the package that is built; an editable one finds them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "megaresnorm" / "configs"
        folder.mkdir(parents=True, exist_ok=True)
        for file in (*Path("configs").glob("*.yaml"), Path("configs/recipe.schema.json")):
            shutil.copyfile(file, folder / file.name)


setup(cmdclass={"build_py": BuildWithRecipes})
