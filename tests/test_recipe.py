import math

import pytest

from cspnet.errors import RecipeError
from cspnet.recipe import load as recipes
from cspnet.recipe import schema
from cspnet.recipe.aliases import renamed
from tests.conftest import ROOT

SHIPPED = sorted((ROOT / "recipes").glob("**/*.yaml"))


def problems(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        recipes.load_recipe(path, list(overrides))
    return str(caught.value)


def written(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_survives_a_round_trip(path):
    recipe = recipes.load_recipe(path, [])
    assert recipes.recipe_from_yaml(recipes.recipe_to_yaml(recipe)) == recipe


def test_overrides_win_over_the_file(tmp_path):
    path = written(tmp_path, "batch: 64\nmodel:\n  width: 0.5\n")
    recipe = recipes.load_recipe(
        path, ["model.width=2", "optim.weight_decay=1e-3", "data.root=a=b"]
    )
    assert (recipe.batch, recipe.model.width) == (64, 2.0)
    assert recipe.optim.weight_decay == 1e-3
    assert recipe.data.root == "a=b"


@pytest.mark.parametrize(
    "override, told",
    [
        ("augment.hues=1", "Did you mean 'augment.hue=1'"),
        ("hue=0.1", "Did you mean 'augment.hue=0.1'"),
        ("learning_rat=0.1", "Did you mean 'optim.learning_rate=0.1'"),
        ("model.nam=darknet53", "Did you mean 'model.name=darknet53'"),
        ("probability=1", "Did you mean 'mix.probability=1' or 'adversarial.probability=1'"),
        ("model.name=resnet", "must be one of cspdarknet53, darknet53"),
        ("model.name=cspdarknet35", "Did you mean 'cspdarknet53'"),
        ("model.freeze_stages=2", "set model.init_from"),
        (
            "data.start_image_size=100",
            "data.start_image_size (100) must be a multiple of 32 below data.image_size",
        ),
        (
            "data.start_image_size=256",
            "data.start_image_size (256) must be a multiple of 32 below data.image_size",
        ),
        ("data.full_size_from=0.5", "has no effect, since data.start_image_size is not given"),
        ("batch=big", "batch: Value 'big'"),
        ("batch=2.5", "batch: Value '2.5'"),
        ("batch", "not of the form section.key=value"),
        ("=3", "not of the form section.key=value"),
        ("mix=3", "mix is a section"),
        ("mix.cutmix.on=3", "unknown key 'mix.cutmix.on'"),
        ("augment.scale=1", "augment.scale"),
        ("augment.scale=[1,2,3]", "needs two numbers"),
        ("augment.scale=[2,1]", "the smaller bound comes first"),
        ("optim.momentum=1", "must be between 0 and 0.9999"),
        ("optim.learning_rate=nan", "must be between"),
        ("seed=-1", "seed is -1"),
        ("batch=100", "batch (100) is not a multiple of group (32): try group=25 or batch=96"),
        ("data.image_size=100", "must be a multiple of 32: try 96"),
        ("mix.images_per_draw=5", "not a multiple of mix.images_per_draw"),
        ("model.leaky_slope=0.2", "has no effect, since model.activation is mish"),
        ("model.classes=1", "must be at least 2 or auto"),
        ("adversarial.objective=mislead", "has no effect, since adversarial.step_size is 0"),
        ("group='${bach}'", "'bach' not found"),
        ("group=[", "override 'group=['"),
    ],
)
def test_wrong_override_is_told_with_its_key(override, told):
    assert told in problems(None, override)


@pytest.mark.parametrize("old, new", sorted(renamed().items()))
def test_an_old_key_is_answered_with_its_new_name(tmp_path, old, new):
    section, field = old.split(".")
    assert f"override: {old} was renamed {new}" in problems(None, f"{old}=1")
    path = written(tmp_path, f"{section}:\n  {field}: 1\n")
    assert f"{path}: {old} was renamed {new}" in problems(path)
    with pytest.raises(RecipeError, match=f"of another version: {old} was renamed"):
        recipes.recipe_from_yaml(path.read_text())
    assert new.partition(" ")[0] in dict(recipes.flatten(recipes.Recipe()))


def test_images_grow_to_their_full_size():
    recipe = recipes.load_recipe(recipes.find_recipe("cspdarknet53-budget"), [])
    sizes = [recipe.size_at(step) for step in range(0, 400_000, 1000)]
    assert [sizes.count(size) for size in (128, 160, 192, 224, 256)] == [80] * 5
    assert sizes == sorted(sizes) and recipe.size_at(399_999) == recipe.size_at(320_000) == 256
    assert recipe.size_at(319_999) == 224
    assert {recipes.load_recipe(None, []).size_at(step) for step in (0, 10**6)} == {256}


def test_every_problem_is_in_one_message(tmp_path):
    path = written(tmp_path, "batch: x\nmodel: {widht: 1}\n")
    text = problems(path, "seed=-1", "augment.hue=red", "nonsense")
    for told in (f"{path}: batch", "model.width", "augment.hue", "nonsense"):
        assert told in text


def test_an_idle_key_is_an_error_but_an_override_may_idle_the_file(tmp_path):
    mixing = "mix: {probability: 0.5, cutmix: true, cutmix_side: [0.2, 0.4]}\n"
    path = written(tmp_path, mixing)
    assert recipes.load_recipe(path, ["mix.probability=0"]).mix.probability == 0
    assert "mix.cutmix_side has no effect" in problems(
        path, "mix.cutmix=false", "mix.cutmix_side=[0.1,0.2]"
    )
    idle = written(tmp_path, mixing.replace("0.5,", "0,"))
    assert "mix.cutmix_side has no effect" in problems(idle)


@pytest.mark.parametrize("text", ["- a\n- b\n", "batch: [", "batch: 1\nbatch: 2\n", "\x00"])
def test_a_file_that_is_no_recipe(tmp_path, text):
    path = written(tmp_path, text)
    assert str(path) in problems(path)


def test_settings_that_idle_the_attack_are_told():
    short = problems(None, "adversarial.step_size=1", "schedule.steps=1000")
    assert "none of the 1,000 steps follows the warm-up" in short
    never = problems(None, "adversarial.step_size=1", "adversarial.probability=0")
    assert "adversarial.probability is 0" in never


def test_problems_of_every_kind_come_together():
    text = problems(None, "batch=100", "augment.rotation=999", "model.leaky_slope=0.3")
    for told in ("not a multiple of group", "augment.rotation is 999", "leaky_slope has no effect"):
        assert told in text


@pytest.mark.parametrize("root", ["2024_01_15", "1e3", "yes", "~", "a: b", "${x}", "a #b", "x=y"])
def test_a_data_root_is_taken_as_typed(root):
    recipe = recipes.load_recipe(None, [], root)
    assert recipe.data.root == root
    assert recipes.recipe_from_yaml(recipes.recipe_to_yaml(recipe)).data.root == root


def test_find_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = recipes.find_recipe("digits")
    assert shipped == recipes.find_recipe("digits.yaml") and shipped.stem == "digits"
    own = written(tmp_path, "batch: 64\n")
    assert recipes.find_recipe("r").resolve() == recipes.find_recipe(str(own)) == own
    with pytest.raises(RecipeError, match="Did you mean 'digits'"):
        recipes.find_recipe("digit")


def test_defaults_are_in_range_and_finite():
    recipe = recipes.load_recipe(None, [])
    for key, value in recipes.flatten(recipe):
        if isinstance(value, float):
            assert math.isfinite(value), key


def test_interpolation_keeps_two_numbers_together():
    recipe = recipes.load_recipe(None, ["batch=64", "group='${batch}'"])
    assert recipe.group == 64 and recipe.groups == 1


def rows_of_sources():
    """Field, value, recipes and source of each row of the first table of docs/recipe-sources.md."""
    text = (ROOT / "docs" / "recipe-sources.md").read_text()
    text = text.split("## Settings that are not recipe fields")[0]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and cells[0].startswith("`"):
            field, value, names, source = cells
            yield field.strip("`"), value.strip("`"), names, source


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_field_of_every_recipe_has_a_source(path):
    others = ("digits", "cifar10", "finetune", "cspdarknet53-budget")
    everything = [p.stem for p in SHIPPED if p.stem not in others]
    sources, said = {}, {}
    for field, value, names, source in rows_of_sources():
        listed = everything if names == "all for ImageNet" else names.split(", ")
        if path.stem in listed:
            assert source and field not in sources, f"{field} of {path.stem} has two rows, or none"
            sources[field], said[field] = value, source
    resolved = recipes.load_recipe(path, [])
    given = dict(recipes.flatten(recipes._read(path)))
    if path.stem in everything:  # "sourced line by line"
        section = ""
        for line in path.read_text().splitlines():
            key, _, rest = line.strip().partition(":")
            if not line.startswith((" ", "#")):
                section = f"{key}." if not rest else ""
            if rest and not line.startswith("#"):
                assert said[section + key] == rest.partition(" # ")[2].strip(), line
    for key, value in recipes.flatten(resolved):
        optional = schema.no_effect(resolved, key) or schema.is_off(key, value)
        assert key in given or optional, (
            f"{path.stem} does not give {key}: shipped recipes are complete"
        )
        if key in given:
            shown = str(list(value) if isinstance(value, tuple) else value)
            assert sources.get(key) == shown, f"{key}={shown} of {path.stem} has no source"


def test_the_published_recipes_differ_only_where_the_cfgs_do():
    plain, gamma, omega, sat = (
        dict(recipes.flatten(recipes.load_recipe(recipes.find_recipe(f"cspdarknet53-{name}"), [])))
        for name in ("plain", "gamma", "omega", "sat")
    )

    def different(a, b):
        return {key for key in a if a[key] != b[key]}

    assert different(plain, gamma) == {"mix.probability", "loss.label_smoothing", "schedule.steps"}
    assert different(gamma, omega) == {"model.activation"}
    assert different(omega, sat) == {"adversarial.step_size"}


@pytest.mark.parametrize("override", ["group=0", "batch=-1", "batch=0", "mix.images_per_draw=0"])
def test_numbers_that_others_are_divided_by(override):
    with pytest.raises(RecipeError, match=f"{override.partition('=')[0]} is .*, must be"):
        recipes.load_recipe(recipes.find_recipe("digits"), [override])
