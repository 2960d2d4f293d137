import cv2
import numpy as np
import torch
from rich.console import Console

from cspnet.data.augment import augment, sample_params
from cspnet.data.loader import TrainGroups
from cspnet.report import preview
from cspnet.runtime.options import RunOptions
from cspnet.sources.data_root import display_names, open_training
from cspnet.train import setup
from cspnet.train.step import TrainStep
from cspnet.weights.trained import build_net
from tests.conftest import TINY


def tile(page, number, size, factor):
    """The number-th tile of the first row, made small again."""
    left = preview.GAP + number * (size * factor + preview.GAP)
    top = 2 * preview.GAP + preview.LINE
    block = page[top : top + size * factor, left : left + size * factor]
    return block[::factor, ::factor]


def test_the_sheet_shows_the_very_tensor_of_the_step(tiny, folder, tmp_path, command):
    done = command(
        "main",
        *("preview", "--recipe", "digits", "--data", folder, "--step", 3, "--output", "look.png"),
        *(o for o in TINY if "norm" not in o),
        "model.classes=3",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    page = cv2.imread(str(tmp_path / "look.png"))[:, :, ::-1]
    assert cv2.imread(str(tmp_path / "look-schedule.png")).shape[2] == 3
    recipe = tiny(f"data.root={folder}", "model.classes=3")
    batch = TrainGroups(open_training(str(folder)), recipe)[3, 0]
    draws = sample_params(recipe, 3, range(1))
    images, _ = augment(batch.images, batch.labels, draws, recipe, 3)
    for number in range(8):
        expected = (images[number].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        assert np.array_equal(tile(page, number, 32, 4), expected)


def test_captions_are_the_mixture_with_smoothing_undone():
    targets = torch.tensor([[0.62, 0.0, 0.38], [0.0, 1.0, 0.0]])
    smooth = 0.05 + targets * (1 - 0.1 - 0.05)
    captions = preview.mixtures(smooth, ["tench", "dog", "golf ball"], 0.1)
    assert captions == [["0.62 tench", "0.38 golf ball"], ["1.00 dog"]]


def test_synsets_get_their_words_and_other_names_stay():
    assert display_names(["n01440764", "n03445777"]) == ["tench", "golf ball"]
    assert display_names(["n01440764", "cat"]) == ["n01440764", "cat"]


def test_rows_before_and_after_the_attack(tiny, tmp_path):
    recipe = tiny("adversarial.step_size=50")
    work = setup.prepare(recipe, RunOptions(tmp_path, device="cpu"), Console(quiet=True))
    net = build_net(recipe, 10)
    net(torch.rand(8, 3, 32, 32))  # running statistics with which logits are not all alike
    step = TrainStep(work, net)
    images, targets, changed = step.augmented_batch(0)
    assert changed is not None and not torch.equal(images, changed)
    names = [str(n) for n in range(10)]
    plain = preview.render_sheet(images, targets, None, names, 0.1, "")
    rows = preview.render_sheet(images, targets, changed, names, 0.1, "")
    side = 128 + preview.LINE + 2 * preview.GAP
    assert rows.shape[0] == plain.shape[0] + 3 * side
    after = rows[plain.shape[0] + preview.GAP + side :]
    expected = (changed[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    block = after[: 4 * 32 : 4, preview.GAP : preview.GAP + 4 * 32 : 4]
    assert np.array_equal(block, expected)
    assert step.augmented_batch(0)[1].shape == (8, 10)


def test_preview_of_nonsense(command, tmp_path):
    for arguments, told in (
        (["--output", "no/such/x.png"], "must be a .png file in an existing folder"),
        (["--output", "x.jpg"], "must be a .png file"),
        (["--step", "600"], "the last one is 599"),
        (["--data", "nowhere"], "does not exist"),
        (["--checkpoint", "none.pt"], "does not exist"),
    ):
        done = command("main", "preview", "--recipe", "digits", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and told in done.stderr, done.stderr
        assert not list(tmp_path.iterdir())
