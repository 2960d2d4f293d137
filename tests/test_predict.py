"""What a net says of given files, and what the command makes of it."""

import csv
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import torch

from cspnet.errors import DataError
from cspnet.images import decode
from cspnet.inference.evaluate import evaluate_network
from cspnet.inference.predict import predict_files, predictions_to_csv, predictions_to_json
from cspnet.recipe.load import load_recipe
from cspnet.runtime.device import Precision
from cspnet.sources.folder import Files, Folder, find_images
from cspnet.weights.export import export_network
from cspnet.weights.trained import Trained, build_net
from tests.conftest import picture

FP32 = Precision("fp32", "")
DIGITS = [str(digit) for digit in range(10)]


def trained(classes=DIGITS, *overrides):
    """A net with BatchNorm statistics and a classifier that tell images apart."""
    recipe = load_recipe(None, ["data.image_size=32", "model.width=0.125", "seed=5", *overrides])
    net = build_net(recipe, len(classes))
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.3
    with torch.no_grad():
        for seed in range(6):
            net.train()(torch.rand(32, 3, 32, 32, generator=generator) * (seed + 1) / 6)
        net.head.fc.weight *= 8
        net.head.fc.bias.normal_(generator=generator)
    return Trained(net, recipe, classes, 70, True, 70 * 128)


@pytest.fixture
def photos(tmp_path):
    """Seven photos of different shapes, not in the order of their names; the fourth is torn."""
    paths = []
    for seed in (3, 1, 6, 0, 5, 2, 4):
        path = tmp_path / f"{seed}.png"
        image = picture(seed, height=40 + 9 * seed, width=90 - 7 * seed)
        cv2.imwrite(str(path), image[:, :, ::-1])
        paths.append(str(path))
    torn = Path(paths[3])
    torn.write_bytes(torn.read_bytes()[:20])
    return paths


@pytest.mark.parametrize(
    "normalize, resize", [("none", "align_corners"), ("imagenet", "antialias")]
)
@pytest.mark.parametrize("batch, workers", [(None, 0), (3, 2), (1, 0)])
def test_probabilities_order_and_names_are_those_of_one_image_at_a_time(
    photos, normalize, resize, batch, workers
):
    out = trained(DIGITS, f"data.normalize={normalize}", f"evaluate.interpolation={resize}")
    out = replace(
        out, recipe=replace(out.recipe, evaluate=replace(out.recipe.evaluate, crop_pct=0.8))
    )
    got = list(predict_files(out, Files(photos), FP32, workers, top=10, batch=batch))
    assert [prediction.file for prediction in got] == photos
    assert [prediction.error for prediction in got] == [*[None] * 3, got[3].error, *[None] * 3]
    assert "not a readable image" in got[3].error and got[3].guesses == []
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    firsts = set()
    for prediction in got[:3] + got[4:]:
        image = decode.decode(Path(prediction.file).read_bytes())
        view = torch.from_numpy(decode.evaluation_view(image, 32, out.recipe.evaluate)) / 255
        if normalize == "imagenet":
            view = (view - mean) / deviation
        with torch.no_grad():
            logits = out.net.eval()(view.permute(2, 0, 1)[None])[0]
        expected = torch.exp(logits) / torch.exp(logits).sum()
        probabilities = [guess.probability for guess in prediction.guesses]
        assert probabilities == sorted(probabilities, reverse=True)
        for guess in prediction.guesses:
            assert guess.name == guess.label
            assert guess.probability == pytest.approx(float(expected[int(guess.label)]), abs=1e-5)
        firsts.add(prediction.guesses[0])
    assert len(firsts) == 6, "the net must tell the photos apart"


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.02)])
def test_it_is_what_evaluate_scores(folder, precision, tolerance):
    """Top-1 and the mean of -log p of the right class, on a folder that both read."""
    source = Folder(folder / "val")
    out = trained(source.classes)
    scores = evaluate_network(out.net, source, out.recipe, Precision(precision, ""), 0, batch=4)
    files = Files(find_images([str(folder / "val")]))
    got = list(predict_files(out, files, Precision(precision, ""), 0, top=3, batch=4))
    assert [item.file for item in got] == [source.name(index) for index in range(9)]
    right = [Path(prediction.file).parent.name for prediction in got]
    hits = [item.guesses[0].label == label for item, label in zip(got, right, strict=True)]
    assert 100 * sum(hits) / 9 == pytest.approx(scores.top1)
    loss = 0.0
    for prediction, label in zip(got, right, strict=True):
        probabilities = {guess.label: guess.probability for guess in prediction.guesses}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-6), "softmax is in float32"
        loss -= torch.tensor(probabilities[label]).log().item() / 9
    assert loss == pytest.approx(scores.loss, rel=tolerance)


def test_names_of_synsets_and_of_classes_without_names(photos):
    out = trained(["n01440764", "n02012849", "n03126707"])  # the bird and the machine are cranes
    (got,) = predict_files(out, Files(photos[:1]), FP32, 0, top=99)
    assert {guess.label: guess.name for guess in got.guesses} == {
        "n01440764": "tench",
        "n02012849": "crane",
        "n03126707": "crane",
    }
    (bare,) = predict_files(replace(out, classes=None), Files(photos[:1]), FP32, 0, top=2)
    order = [str(sorted(out.classes).index(guess.label)) for guess in got.guesses]
    assert [guess.label for guess in bare.guesses] == order[:2] == [g.name for g in bare.guesses]


def test_folders_are_searched_to_any_depth_and_nothing_comes_twice(tmp_path, monkeypatch):
    for name in ("b/z.JPG", "b/a/deep/y.png", "b/a/notes.txt", "b/.x.jpg", "odd.dat", "c/1.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert find_images(["odd.dat", "b", "./odd.dat", "b/z.JPG", str(tmp_path / "c")]) == [
        *("odd.dat", "b/a/deep/y.png", "b/z.JPG", str(tmp_path / "c" / "1.webp"))
    ]
    assert find_images(["c/1.webp", "c/../c"]) == ["c/1.webp"]
    assert find_images(["."]) == ["b/a/deep/y.png", "b/z.JPG", "c/1.webp"]
    with pytest.raises(DataError, match=r"^no such file or folder: gone\.jpg, b/gone$"):
        find_images(["b", "gone.jpg", "b/gone"])
    (tmp_path / "c" / "1.webp").unlink()
    (tmp_path / "c" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"^c contains no image .* it contains: notes\.txt$"):
        find_images(["b", "c"])


def test_names_of_files_survive_every_format(photos, tmp_path):
    """Quotes, commas, line ends, and bytes that are no UTF-8."""
    odd = os.fsdecode(b'a "b", c\n\xff.png')
    odd = os.path.join(tmp_path, odd)
    os.rename(photos[0], odd)
    (got,) = predict_files(trained(), Files([odd]), FP32, 0, top=2)
    assert json.loads(predictions_to_json([got]))[0]["file"] == odd
    assert [row["file"] for row in csv.DictReader(predictions_to_csv([got]).splitlines(True))] == [
        odd,
        odd,
    ]


def test_the_command_in_all_its_formats(photos, tmp_path, process):
    export_network(trained(), tmp_path / "net.safetensors")
    wrong = tmp_path / os.fsdecode(b"\xff.jpg")
    wrong.write_text("no image")
    call = ("main", "predict", *photos, wrong, "--checkpoint", "net.safetensors")
    how = {"cwd": tmp_path, "errors": "surrogateescape"}
    table = process(*call, "--top", 3, **how)
    files = process(*call, "--top", 3, "--json", "out.json", "--csv", "-", **how)
    for done in (table, files):
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"{photos[3]}: not a readable image" in done.stderr
        assert "\\udcff.jpg: not a readable image" in done.stderr
        assert done.stderr.endswith("error: 2 of 8 images could not be read\n")
        assert "preprocessing: 32x32" in done.stderr and "preprocessing" not in done.stdout
    content = json.loads((tmp_path / "out.json").read_text())
    assert [entry["file"] for entry in content] == [*photos, str(wrong)]
    assert [set(entry) - {"file"} for entry in content] == [
        {"error"} if number in (3, 7) else {"predictions"} for number in range(8)
    ]
    flat, shown = [], []
    for entry in content:
        if "error" in entry:
            flat.append((entry["file"], "", "", "", "", entry["error"]))
        for rank, guess in enumerate(entry.get("predictions", []), 1):
            assert guess["class"] == guess["name"] in DIGITS
            flat.append((entry["file"], str(rank), *map(str, guess.values()), ""))
            cells = [guess["name"], f"{100 * guess['probability']:.2f}", "%"]
            shown.append([entry["file"], *cells] if rank == 1 else cells)
    rows = list(csv.reader(files.stdout.splitlines()))
    assert rows[0] == ["file", "rank", "class", "name", "probability", "error"]
    assert [tuple(row) for row in rows[1:]] == flat
    lines = [line.split() for line in table.stdout.splitlines()]
    assert lines == [["file", "class", "probability"], *shown]


def test_json_alone_on_stdout_with_more_ranks_than_classes(photos, tmp_path, command):
    export_network(trained(), tmp_path / "net.safetensors")
    deep = tmp_path / "album" / "2024"
    deep.mkdir(parents=True)
    os.rename(photos[0], deep / "first.png")
    done = command(
        *("main", "predict", "album", "--checkpoint", "net.safetensors"),
        *("--top", 1000, "--json", "-"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(done.stdout)
    assert entry["file"] == "album/2024/first.png"
    assert sorted(guess["class"] for guess in entry["predictions"]) == DIGITS


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["gone.jpg"], "no such file or folder: gone.jpg"),
        (["empty"], "empty contains no image"),
        (["a.jpg", "--top", "0"], "Invalid value for '--top'"),
        (
            ["a.jpg", "--json", "no/out.json"],
            "--json no/out.json: must be a file in an existing folder",
        ),
        (["a.jpg", "--json", "-", "--csv", "-"], "--json and --csv name the same file -"),
    ],
)
def test_wrong_use_is_told_before_the_net_is_opened(command, tmp_path, arguments, told):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    done = command("main", "predict", *arguments, "--checkpoint", "none.pt", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    message = re.sub(r"[\s│]+", " ", done.stderr)
    assert told in message and "Traceback" not in message and "none.pt" not in message
    assert message.lower().count("error") == 1
