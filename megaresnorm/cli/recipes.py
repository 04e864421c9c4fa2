"""megaresnorm recipe | schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from megaresnorm.cli.arguments import examples
from megaresnorm.text import say, write


def _names(incomplete: str) -> list[str]:
    from megaresnorm.recipe.shipped import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def add_to(app: typer.Typer) -> None:
    """Add the commands recipe and schema."""
    app.command(epilog=examples("megaresnorm recipe quickstart > my.yaml"))(recipe)
    app.command()(schema)


def recipe(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="which one; without it all are listed", autocompletion=_names)
    ] = None,
) -> None:
    """Print a recipe that comes with the package, to change it."""
    from megaresnorm.recipe.shipped import read_shipped, shipped_recipes, title_of

    if name is not None:
        write(read_shipped(name))
        return
    found = shipped_recipes()
    for one in found:
        say(f"{one:{max(map(len, found))}}  {title_of(one)}")


def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    print(json.dumps(recipe_schema(), indent=1))


def recipe_schema() -> dict:
    """JSON schema of a recipe, with the names of the topologies and the short form of recompute."""
    from megaresnorm.model.topology import TOPOLOGIES
    from megaresnorm.recipe import Recipe

    found = Recipe.model_json_schema()
    found["$defs"]["ModelRecipe"]["properties"]["topology"]["enum"] = list(TOPOLOGIES)
    section = found["properties"]["recompute"]
    policies = found["$defs"]["RecomputeRecipe"]["properties"]["policy"]["enum"]
    alone = {"enum": [policy for policy in policies if policy != "every"]}  # which needs a number
    found["properties"]["recompute"] = {"anyOf": [{"$ref": section.pop("$ref")}, alone], **section}
    return found
