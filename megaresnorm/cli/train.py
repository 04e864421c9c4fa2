"""megaresnorm train | schema."""

from __future__ import annotations

import argparse
import json
import os

from megaresnorm.cli.arguments import Commands, count, path_text
from megaresnorm.errors import ConfigError, LostRankError
from megaresnorm.parallel.environment import Environment, read_environment
from megaresnorm.resilience.launcher import Launcher, end_with
from megaresnorm.resilience.signals import StopSignals, end_on_purpose
from megaresnorm.text import say, shown, write


def add_train(commands: Commands) -> None:
    """Add the train command."""
    train = commands.add_parser(
        "train",
        help="train a recipe, or go on training it",
        description="Train the run of a recipe. If its output folder has a checkpoint, the run goes on from the newest "
        "one.",
        epilog="example: megaresnorm train configs/quickstart.yaml model.topology=keel train.steps=100",
    )
    train.add_argument("recipe", type=path_text, help="YAML file, as in configs/")
    train.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file"
    )
    train.add_argument(
        "--dry-run", action="store_true", help="check recipe and data, print the resolved recipe, and end"
    )
    train.add_argument(
        "--ranks",
        type=count,
        metavar="N",
        help="with --dry-run: check the layout for so many ranks [the fewest it needs]",
    )
    train.add_argument(
        "--no-fallback",
        action="store_true",
        help="end if the newest checkpoint is damaged, rather than go on from an older one",
    )
    train.set_defaults(run=_train)


def add_schema(commands: Commands) -> None:
    """Add the schema command."""
    schema = commands.add_parser("schema", help="print the JSON schema of a recipe, for editors")
    schema.set_defaults(run=_schema)


def _train(arguments: argparse.Namespace) -> int:
    from megaresnorm.telemetry.log import configure_logging, console

    environment = read_environment()
    if environment.launcher is not None or environment.agent_store:  # a child of torchrun
        end_with(os.getppid(), None if environment.launcher is None else Launcher(environment.launcher))
    configure_logging(environment.rank)
    console.quiet = environment.rank > 0
    if arguments.dry_run or arguments.ranks is not None:
        return 0 if environment.rank else _dry_run(arguments)
    with StopSignals(environment) as stop:  # before torch is imported, which takes seconds
        from megaresnorm.parallel.mesh import end_process_group, lost_contact

        try:
            exit_code = _train_and_report(arguments, environment, stop)
        except RuntimeError as e:
            reason = lost_contact(e)
            if reason is None:
                raise
            raise LostRankError(
                f"another rank is gone ({reason}); start again to go on from the newest checkpoint"
            ) from None
    end_process_group()
    return end_on_purpose(exit_code, environment)


def _train_and_report(arguments: argparse.Namespace, environment: Environment, stop: StopSignals) -> int:
    from megaresnorm.opening import idle, open_recipe, tell_idle_ranks
    from megaresnorm.recipe.load import dump_recipe, load_recipe
    from megaresnorm.run import Run
    from megaresnorm.telemetry.log import console, valid_figures
    from megaresnorm.trainer import Trainer

    opened = open_recipe(lambda: load_recipe(arguments.recipe, arguments.overrides), environment)
    if opened.idles:
        return idle(opened)
    with tell_idle_ranks(opened) as tell, Run(opened, fallback=not arguments.no_fallback) as run:
        console.print(
            f"recipe    {shown(run.output / 'recipe.yaml')}\n{dump_recipe(run.recipe).rstrip()}", markup=False
        )
        console.print("\n".join(run.describe()), markup=False)
        summary = Trainer(run).train(stop)
        tell(summary.exit_code)
        text = None if summary.exit_code else run.sample_text()
    if text is not None:
        console.print(f"\n--- sample ---\n{text}\n--------------\n", markup=False)
    if summary.evaluation is not None and summary.unigram_entropy is not None:
        gap = summary.unigram_entropy - summary.evaluation.loss
        verdict = "better" if gap > 0 else "worse"
        console.print(
            f"validation loss {summary.evaluation.loss:.4f} nats a token; unigram entropy "
            f"{summary.unigram_entropy:.4f}, so {abs(gap):.4f} nats {verdict} than knowing only how frequent each "
            f"token is\n{valid_figures(summary.evaluation.metrics())}"
        )
    if summary.checkpoint is not None:
        console.print(f"checkpoint {shown(summary.checkpoint)}\nweights    {summary.weights_digest}")
    return summary.exit_code


def _dry_run(arguments: argparse.Namespace) -> int:
    from megaresnorm.checkpoint.format import human_bytes
    from megaresnorm.data.training_data import open_data, open_samples, resolve_vocab
    from megaresnorm.layout import check_layout, split_stages
    from megaresnorm.memory import memory_per_rank
    from megaresnorm.model.lint import check
    from megaresnorm.model.parameters import parameter_table
    from megaresnorm.recipe.load import dump_recipe, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if not arguments.dry_run:
        raise ConfigError("--ranks is for --dry-run; ranks are started by bash launch/torchrun.sh")
    for finding in check(recipe):
        say(f"warning: {finding.message}")
    data = open_data(recipe.data)
    recipe = resolve_vocab(recipe, data)
    open_samples(data, recipe)
    parallel = recipe.parallel
    needed = parallel.pp * parallel.dp_shard * parallel.tp * (parallel.dp_replicate or 1)
    sizes = check_layout(recipe, arguments.ranks or needed)
    stages = [len(stage.blocks) for stage in split_stages(recipe.model, parallel)]
    parameters = sum(spec.num_elements for spec in parameter_table(recipe.model).values())
    memory = memory_per_rank(recipe, sizes)
    write(
        f"{dump_recipe(recipe)}# {parameters:,} parameters; recipe and data can be used on {sizes.num_ranks} "
        f"rank{'s' if sizes.num_ranks > 1 else ''}"
        + (f", with {stages} blocks in the stages" if sizes.pp > 1 else "")
        + f"\n# memory of a rank on CPUs: {human_bytes(memory.total)} ({memory.describe()})\n"
    )
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    print(json.dumps(recipe_schema(), indent=1))
    return 0


def recipe_schema() -> dict:
    """JSON schema of a recipe, with the names of the topologies."""
    from megaresnorm.model.topology import TOPOLOGIES
    from megaresnorm.recipe import Recipe

    schema = Recipe.model_json_schema()
    schema["$defs"]["ModelRecipe"]["properties"]["topology"]["enum"] = list(TOPOLOGIES)
    return schema
