"""Messages in general: commands that can be copied into a shell, and one full stop at an end."""

import ast
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest

from cspnet.cli.training import _result_lines
from cspnet.datasets import download
from cspnet.recipe import load as recipes
from cspnet.report.evaluation import evaluate_run
from cspnet.run.reader import read_run
from cspnet.shell import command_line, shell_quote
from cspnet.sources import messages
from cspnet.sources.data_root import DataRoot
from cspnet.sources.tar_members import TarError
from cspnet.sources.tar_set import TarSource
from cspnet.text import end_sentence
from cspnet.weights.export import export_network
from cspnet.weights.trained import Trained, build_net
from tests.conftest import ROOT, TINY, call

ODD = 'it\'s my $HOME; `a` & "b" *'
WORDS = [
    "plain",
    "with blank",
    ODD,
    "",
    "-dash",
    "~",
    "ümläut",
    "tab\there",
    "two\nlines",
    "esc\x1b[31m",
]
WORDS += ["back\\slash\nand 'quote'", b"not utf-8 \xff\xfe".decode("utf-8", "surrogateescape")]


def copied(text: str, first: str = "cspnet") -> list[str]:
    """The words of the command in a text, as a shell reads them."""
    return shlex.split(
        re.search(rf"(?<!\S)`?({first}[ -].*?)`?(?= makes| does| saves|\.?$)", text)[1]
    )


def test_a_shell_reads_every_quoted_word_back():
    line = "printf '%s\\0' " + " ".join(map(shell_quote, WORDS))
    done = subprocess.run(["bash", "-c", line.encode()], capture_output=True, check=True)
    read = done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]
    assert read == WORDS


def test_a_quoted_word_has_nothing_that_a_terminal_would_obey():
    for word in WORDS:
        assert shell_quote(word).isprintable() and shell_quote(word).encode("utf-8")


def test_a_plain_command_stays_plain():
    line = "cspnet-eval --checkpoint runs/a/checkpoints/best.pt --data data/imagenet"
    assert command_line(*line.split()) == line
    assert command_line("cspnet", "report", Path("r un")) == "cspnet report 'r un'"


def test_the_commands_after_training():
    recipe = recipes.load_recipe(None, [], "da ta")
    *_, one, other = _result_lines(recipe, Path(ODD), None)
    best = f"{ODD}/checkpoints/best.pt"
    assert copied(one) == ["cspnet-eval", "--checkpoint", best, "--data", "da ta"]
    assert copied(other) == ["cspnet", "report", ODD]


def test_the_command_after_training_as_it_is_printed(command, tmp_path):
    steps = ["schedule.steps=1", "schedule.warmup_steps=0"]
    arguments = ["--recipe", "digits", "--device", "cpu", "--output", "r un", *TINY, *steps]
    done = command("main_train", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cspnet-eval --checkpoint 'r un/checkpoints/best.pt' --data digits\n" in done.stdout
    assert done.stdout.startswith("# resolved recipe"), "which comes first of what is printed"


def test_the_command_after_a_download(command, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "prepare_dataset", lambda *_: True)
    done = command("main", "prepare", "imagenette", "--output", "my data", cwd=tmp_path)
    assert copied(done.stdout.strip()) == ["cspnet", "check", "my data"]


def test_the_command_that_runs_an_export_in_darknet(tmp_path):
    recipe = recipes.load_recipe(None, ["model.width=0.125", "data.image_size=32"])
    names = [str(number) for number in range(10)]
    net = Trained(build_net(recipe, 10).eval(), recipe, names, 1, False, 128)
    file = tmp_path / "my net.weights"
    line = next(line for line in export_network(net, file) if line.startswith("darknet "))
    files = [str(file.with_suffix(suffix)) for suffix in (".data", ".cfg", ".weights")]
    assert copied(line, "darknet") == ["darknet", "classifier", "predict", *files]


def test_the_command_that_unpacks_imagenet(tmp_path):
    root = tmp_path / "my data"
    root.mkdir()
    (root / "ILSVRC2012_img_train.tar").touch()
    assert copied(messages.no_training_folder(root))[-2:] == ["--output", str(root)]


def test_the_command_that_makes_an_index(folder, capsys):
    root = folder.rename(folder.with_name("my data"))
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(root / split, split)
        (root / split).rename(folder.with_name(split))
    TarSource(DataRoot(str(root)).splits["train"])
    told = "".join(capsys.readouterr())
    assert copied(told.strip().splitlines()[-1]) == ["cspnet", "index", str(root)]


def test_a_sentence_ends_in_one_full_stop():
    assert (
        end_sentence("one") == "one."
        and end_sentence("one.") == "one."
        and end_sentence("one. ") == "one."
    )
    assert end_sentence("one?") == "one?" and end_sentence(ValueError("one …")) == "one …"


def test_tar_files_that_cannot_be_used_end_in_one_full_stop():
    assert str(TarError("here", ["wrong."])) == "here: wrong."
    assert str(TarError("here", ["wrong", "and this"])).startswith("here: wrong. And 1 more")


def test_a_report_without_data_has_single_full_stops(tmp_path):
    run = ["cspnet-train", "--recipe", "digits", "--device", "cpu", "--output", tmp_path / "run"]
    steps = ["schedule.steps=1", "schedule.warmup_steps=0"]
    assert call(command_line(*run, *TINY, *steps)) == 0
    found = read_run(tmp_path / "run")
    recipe = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()
    for name in ("best.pt", "last.pt"):
        file = tmp_path / "run" / "checkpoints" / name
        file.unlink()
        file.write_bytes(recipe[:100])
    _, remarks = evaluate_run(found, device="cpu")
    assert remarks and not any(".." in remark for remark in remarks), remarks


def sources():
    for path in sorted((ROOT / "cspnet").rglob("*.py")):
        yield path, ast.walk(ast.parse(path.read_text()))


def test_no_command_is_put_together_without_quoting():
    names = "train|eval|predict|prepare|check|index|pack|plan|status|preview|export|report|compare"
    begun = re.compile(rf"(cspnet ({names})|cspnet-(train|eval)|darknet [a-z]+) [^`\n]*$")
    for path, nodes in sources():
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                text = ""
                for part in node.values:
                    if isinstance(part, ast.FormattedValue):
                        line = f"{path.name}:{node.lineno}"
                        quoted = re.match(r"(shlex\.)?(quote|command)\(", ast.unparse(part.value))
                        told = f"{line}: use cspnet.shell.command_line"
                        assert quoted or not begun.search(text), told
                        text += "\0"
                    else:
                        text += part.value


def test_no_full_stop_is_put_after_an_error():
    """It may end in one: `sentence` adds none then."""
    for path, nodes in sources():
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                for part, following in zip(node.values, node.values[1:], strict=False):
                    named = isinstance(part, ast.FormattedValue) and ast.unparse(part.value)
                    stop = isinstance(following, ast.Constant) and following.value.startswith(".")
                    line = f"{path.name}:{node.lineno}"
                    assert not (named == "error" and stop), f"{line}: use cspnet.text.end_sentence"


@pytest.mark.parametrize("ending", ["", "."])
def test_a_save_that_failed_is_told_with_one_full_stop(ending, tmp_path):
    from types import SimpleNamespace

    from cspnet.train.reporter import Reporter

    told = []
    report = SimpleNamespace(
        _state=SimpleNamespace(step=3),
        _output=SimpleNamespace(print=lambda text, style: told.append(text)),
    )
    Reporter.save_failed(report, f"the disk is full{ending}")
    assert "the disk is full. The run continues" in told[0]
