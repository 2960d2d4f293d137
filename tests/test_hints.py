"""Options and overrides of other trainers are answered with ours."""

import pytest

from cspnet.errors import RecipeError
from cspnet.recipe import load as recipes
from cspnet.recipe.aliases import alias_hint, aliased_fields
from tests.conftest import call

KNOWN = {key for key, _ in recipes.flatten(recipes.Recipe())}
# What people type who come from timm, torchvision's references, Ultralytics or Darknet.
OPTIONS = [
    ("--lr 0.05", "optim.learning_rate=0.05"),
    ("--lr=0.05", "optim.learning_rate=0.05"),
    ("-lr 0.05", "optim.learning_rate=0.05"),
    ("--lr0 0.01", "optim.learning_rate=0.01"),
    ("--learning-rate 0.05", "optim.learning_rate=0.05"),
    ("--wd 1e-4", "optim.weight_decay=1e-4"),
    ("--weight-decay 1e-4", "optim.weight_decay=1e-4"),
    ("--momentum 0.8", "optim.momentum=0.8"),
    ("--batch-size 64", "batch=64"),
    ("--batch 64", "batch=64"),
    ("-b 64", "batch=64"),
    ("--img-size 224", "data.image_size=224"),
    ("--imgsz 224", "data.image_size=224"),
    ("--model resnet50", "model.name=resnet50"),
    ("--arch resnet50", "model.name=resnet50"),
    ("--pretrained", "model.init_from"),
    ("--num-classes 10", "model.classes=10"),
    ("--smoothing 0.2", "loss.label_smoothing=0.2"),
    ("--label-smoothing 0.2", "loss.label_smoothing=0.2"),
    ("--seed 3", "seed=3"),
    ("--steps 100", "schedule.steps=100"),
    ("--epochs 90", "schedule.steps=N with N = 90 × training images / batch"),
    ("--epochs", "schedule.steps=N with N = epochs × training images / batch"),
    ("--warmup-epochs 5", "schedule.warmup_steps=N with N = 5 × training images / batch"),
    ("--amp", "precision=auto"),
    ("--no-amp", "precision=auto"),
    ("--ema-decay 0.99", "ema.decay=0.99"),
    ("--opt adamw", "the optimizer is SGD with momentum"),
    ("--sched cosine", "the schedule is a polynomial decay"),
    ("--decay 0.0005", "the weight decay is optim.weight_decay"),
    ("--model.init_from 'a b.pt'", "'model.init_from=a b.pt'"),
    ("--probability 1", "mix.probability=1 or adversarial.probability=1"),
]


@pytest.fixture
def told(capsys):
    """Runs a command that must fail; its message on stderr, with nothing on stdout."""

    def run(line: str) -> str:
        assert call(line) == 2
        output, errors = capsys.readouterr()
        assert output == "" and errors.startswith("error: ") and "Traceback" not in errors
        return errors

    return run


@pytest.mark.parametrize("option, override", OPTIONS)
def test_an_option_of_another_trainer_is_answered_with_the_override(told, option, override):
    name = option.partition(" ")[0].partition("=")[0]
    errors = told(f"cspnet-train --recipe digits {option}")
    assert f"no such option: {name}; " in errors and override in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "command", ["cspnet-train", "cspnet train", "cspnet plan", "cspnet preview"]
)
def test_every_command_with_a_recipe_gives_hints(told, command):
    assert "optim.learning_rate=0.05" in told(f"{command} --recipe digits --lr 0.05")


def test_all_such_options_come_in_one_message(told):
    errors = told("cspnet-train -r digits --epochs 9 optim.momentum=0.8 --lr 0.1 --batch-size=64")
    assert errors.startswith("error: no such options:")
    assert [line.split(";")[0].strip() for line in errors.splitlines()[1:]] == [
        "- --epochs",
        "- --lr",
        "- --batch-size",
    ]


def test_an_override_is_not_taken_for_the_value_of_an_option(told):
    assert "optim.learning_rate\n" in told("cspnet-train -r digits --lr seed=1")


@pytest.mark.parametrize(
    "option, told_instead",
    [
        ("--data-path 'a b'", "use --data 'a b'"),
        ("--num-workers 4", "use --workers 4"),
        ("--output-dir out", "use --output out"),
        ("--gpu 0", "use --device cuda:N"),
        ("--resume-from last.pt", "use --resume with the --output of the run"),
    ],
)
def test_an_option_that_has_another_name_here(told, option, told_instead):
    assert told_instead in told(f"cspnet-train -r digits {option}")


def test_an_option_that_the_command_lacks_is_not_suggested(capsys):
    assert call("cspnet preview -r digits --num-workers 4") == 2
    assert "--workers" not in capsys.readouterr().err.replace("--num-workers", "")


def test_a_renamed_command_is_answered_with_the_new_name(told):
    expected = "error: no such command: data; it was renamed: use cspnet prepare\n"
    assert told("cspnet data imagenet --to data") == expected


@pytest.mark.parametrize(
    "override, wanted",
    [
        ("lr=0.05", "optim.learning_rate=0.05"),
        ("optim.lr=0.05", "optim.learning_rate=0.05"),
        ("train.lr=0.05", "optim.learning_rate=0.05"),
        ("momentum=0.8", "optim.momentum=0.8"),
        ("weight_decay=0.001", "optim.weight_decay=0.001"),
        ("train.batch_size=64", "batch=64"),
        ("batch_size=64", "batch=64"),
        ("img-size=64", "data.image_size=64"),
        ("schedule.epochs=90", "schedule.steps=N with N = 90 × training images / batch"),
        ("epochs=90", "schedule.steps=N with N = 90 × training images / batch"),
        ("warmup_epochs=5", "schedule.warmup_steps=N with N = 5 × training images / batch"),
        ("amp=true", "precision=auto"),
        ("cutmix=true", "mix.cutmix=true"),
        ("resize=[1,2]", "augment.scale=[1,2]"),
        ("model=darknet53", "model.name=darknet53"),
    ],
)
def test_an_override_of_another_trainer_is_answered_with_ours(override, wanted):
    with pytest.raises(RecipeError) as caught:
        recipes.load_recipe(None, [override])
    assert wanted in str(caught.value)


def test_a_key_in_a_file_is_answered_with_the_field(tmp_path):
    (tmp_path / "r.yaml").write_text("optim:\n  lr: 0.1\n")
    with pytest.raises(RecipeError, match=r"'optim.lr'; .* recipe field: optim.learning_rate$"):
        recipes.load_recipe(tmp_path / "r.yaml", [])


def test_hints_name_fields_that_exist():
    assert aliased_fields() <= KNOWN
    assert alias_hint("optim.learning_rate") == "" and alias_hint("no_such_name") == ""


@pytest.mark.parametrize(
    "line, option, new",
    [
        ("cspnet-train -r digits --passes 4", "--passes", "--micro-batch, in images"),
        ("cspnet plan -r digits --passes=auto", "--passes", "--micro-batch, in images"),
        ("cspnet-train -r digits --memory fit", "--memory", "--recompute none, light or full"),
        ("cspnet-train -r digits --check", "--check", "--dry-run"),
        ("cspnet-train -r digits --stop-when-full", "--stop-when-full", "--stop-on-full-disk"),
        ("cspnet preview -r digits --out a.png", "--out", "--output"),
        ("cspnet prepare cifar10 --to data", "--to", "--output"),
        ("cspnet pack data --short 256", "--short", "--short-side"),
        ("cspnet export --checkpoint a.pt --cut 105", "--cut", "--first-layers"),
        ("cspnet report run --record-only", "--record-only", "--no-evaluate"),
    ],
)
def test_a_renamed_option_is_answered_with_the_new_one(told, line, option, new):
    assert told(line) == f"error: no such option: {option}; it was renamed: use {new}\n"
