"""Hints for options of other trainers and of earlier versions of cspnet."""

from collections.abc import Iterator

from typer.core import TyperCommand, TyperGroup

from cspnet.errors import RecipeError
from cspnet.recipe.aliases import alias_hint, format_override, leaf_name
from cspnet.shell import shell_quote

# Option of cspnet: its names in other trainers.
_OPTIONS = {
    "--data DIR": "data_dir data_path dataset data_root root source",
    "--recipe NAME": "config cfg conf",
    "--output DIR": "output_dir out_dir project name save_dir run_dir work_dir log_dir logdir exp",
    "--workers N": "num_workers threads num_threads nthreads",
    "--device cuda:N": "gpu gpus gpu_id device_id",
    "--resume with the --output of the run": "resume_from resume_from_checkpoint auto_resume",
}
# Options of earlier versions: what replaces them.
_RENAMED = {
    "passes": "--micro-batch, in images",
    "memory": "--recompute none, light or full",
    "stop_when_full": "--stop-on-full-disk",
    "check": "--dry-run",
    "out": "--output",
    "to": "--output",
    "cut": "--first-layers",
    "short": "--short-side",
    "record_only": "--no-evaluate",
}
_BY_NAME = {name: option for option, names in _OPTIONS.items() for name in names.split()}


class HintCommand(TyperCommand):
    """A command whose unknown options are answered with their equivalent.

    Options of earlier versions and of other trainers raise a RecipeError that names the option to
    use. All other errors are left to the parser.
    """

    takes_overrides = False

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # NoSuchOption. typer bundles its own click, whose exceptions have no public name.
            if not hasattr(error, "possibilities"):
                raise
            known = {name for param in self.params for name in (*param.opts, *param.secondary_opts)}
            if not (problems := list(self._unknown(given, known | {"--help", "-h"}))):
                raise
        if len(problems) == 1:
            raise RecipeError(f"no such option: {problems[0]}")
        raise RecipeError("no such options:" + "".join(f"\n  - {line}" for line in problems))

    def _unknown(self, arguments: list[str], options: set[str]) -> Iterator[str]:
        """Yield a hint for each unknown option that has an equivalent."""
        for position, argument in enumerate(arguments):
            if argument == "--":
                return
            option, equals, assigned = argument.partition("=")
            value: str | None = assigned
            if not option.startswith("-") or option in options:
                continue
            if not equals:
                following = arguments[position + 1 : position + 2]
                value = next((word for word in following if not word.startswith("--")), None)
                if value and "=" in value:  # a recipe override, not the option's value
                    value = None
            if hint_text := self._equivalent(option.lstrip("-"), value, options):
                yield f"{option}; {hint_text}"

    def _equivalent(self, name: str, value: str | None, options: set[str]) -> str:
        """How to write an unknown option in cspnet, or an empty string."""
        if new := _RENAMED.get(name.replace("-", "_")):
            option = new.partition(",")[0].partition(" ")[0]
            if option in options:
                return f"it was renamed: use {new}"
        return _override(name, value, options) if self.takes_overrides else ""


class RecipeCommand(HintCommand):
    """A command that accepts recipe overrides: fields of the recipe are suggested, too."""

    takes_overrides = True


def _override(name: str, value: str | None, options: set[str]) -> str:
    """The option or the recipe override that an option of another trainer stands for."""
    from cspnet.recipe.load import flatten
    from cspnet.recipe.schema import Recipe

    other, _, rest = _BY_NAME.get(leaf_name(name), "").partition(" ")
    if other in options:
        return f"use {other} {shell_quote(value) if rest.isupper() and value is not None else rest}"
    if alias := alias_hint(name, value):
        return alias
    normalized = name.lower().replace("-", "_")
    fields = [key for key, _ in flatten(Recipe())]
    fields = [key for key in fields if normalized in (key, leaf_name(key))]
    if not fields:
        return ""
    return "it is a recipe field: " + " or ".join(format_override(key, value) for key in fields)


class CommandGroup(TyperGroup):
    """The commands of `cspnet`. Names of earlier versions raise a RecipeError with the new name."""

    def resolve_command(self, ctx, args: list[str]):
        if new := RENAMED_COMMANDS.get(args[0]):
            raise RecipeError(f"no such command: {args[0]}; it was renamed: use cspnet {new}")
        return super().resolve_command(ctx, args)


RENAMED_COMMANDS = {"data": "prepare"}
