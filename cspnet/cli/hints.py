"""Options that other trainers have, and that are fields of the recipe or other options here."""

from collections.abc import Iterator

from typer.core import TyperCommand

from cspnet.errors import RecipeError
from cspnet.recipe.aliases import alias_hint, format_override, leaf_name
from cspnet.shell import shell_quote

# By option: what others call it.
_OPTIONS = {
    "--data DIR": "data_dir data_path dataset data_root root source",
    "--recipe NAME": "config cfg conf",
    "--output DIR": "output_dir out_dir project name save_dir run_dir work_dir log_dir logdir exp",
    "--workers N": "num_workers threads num_threads nthreads",
    "--device cuda:N": "gpu gpus gpu_id device_id",
    "--resume with the --output of the run": "resume_from resume_from_checkpoint auto_resume",
}
_BY_NAME = {name: option for option, names in _OPTIONS.items() for name in names.split()}


class RecipeCommand(TyperCommand):
    """A command that takes overrides of the recipe.

    An unknown option that names a field, here or in another trainer, raises a RecipeError with the
    override; any other one is left to the parser.
    """

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # NoSuchOption; typer brings a click of its own, whose exceptions have no public name.
            if not hasattr(error, "possibilities"):
                raise
            known = {name for param in self.params for name in (*param.opts, *param.secondary_opts)}
            if not (problems := list(_unknown(given, known | {"--help", "-h"}))):
                raise
        one = len(problems) == 1
        raise RecipeError("no such option: " + problems[0] if one else _list(problems))


def _list(problems: list[str]) -> str:
    return "no such options:" + "".join(f"\n  - {problem}" for problem in problems)


def _unknown(arguments: list[str], options: set[str]) -> Iterator[str]:
    """A line for each unknown option that stands for something else."""
    for place, argument in enumerate(arguments):
        if argument == "--":
            return
        option, equals, value = argument.partition("=")
        if not option.startswith("-") or option in options:
            continue
        if not equals:
            following = arguments[place + 1 : place + 2]
            value = next((word for word in following if not word.startswith("--")), None)
            if value and "=" in value:  # an override
                value = None
        if text := _instead(option.lstrip("-"), value, options):
            yield f"{option}; {text}"


def _instead(name: str, value: str | None, options: set[str]) -> str:
    from cspnet.recipe.load import flatten
    from cspnet.recipe.schema import Recipe

    other, _, rest = _BY_NAME.get(leaf_name(name), "").partition(" ")
    if other in options:
        placeholder = rest.isupper() and value is not None
        return f"here it is {other} {shell_quote(value) if placeholder else rest}"
    if text := alias_hint(name, value):
        return text
    spelt = name.lower().replace("-", "_")
    fields = [key for key, _ in flatten(Recipe())]
    fields = [key for key in fields if spelt in (key, leaf_name(key))]
    if not fields:
        return ""
    return "it is a recipe field: " + " or ".join(format_override(key, value) for key in fields)
