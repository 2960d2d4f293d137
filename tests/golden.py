"""A small training run that uses most of the method, and a digest of its results.

tests/test_golden.py compares the digest with the numbers in golden.json, which
`python -m tests.golden` writes anew after an intended change of the algorithm;
benchmarks/compare_commits.py compares the runs of two source trees bit for bit. Nothing is imported
from the package, and all is done through the command line: the numbers must not depend on names in
the source.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# The only place that names recipe keys. An epsilon this large keeps BatchNorm well-conditioned in
# small groups: with the usual 1e-5, eight steps amplify rounding errors to tens of percent.
RECIPE = [
    *("seed=3", "batch=32", "group=8", "log_every=1", "save_every=1"),
    *("model.width=0.125", "model.norm_momentum=0.1", "model.norm_eps=0.2"),
    *("data.start_image_size=64", "data.image_size=96", "data.full_size_from=0.7"),
    *("mix.probability=0.5", "mix.images_per_draw=2"),
    *("adversarial.step_size=300", "adversarial.probability=0.5"),
    *("optim.learning_rate=0.02", "schedule.steps=8", "schedule.warmup_steps=2"),
    *("ema.decay=0.3", "evaluate.every=4"),
]
ROOT = Path(__file__).parent.parent
STORED = Path(__file__).with_name("golden.json")
KILL_AFTER = 3  # saves; one follows each step, and one each validation

CLOCK = ("images_per_second", "data_wait", "memory_gb")  # of a metrics line; they vary

# Ends the process without warning after the given number of saves, then runs the command.
CHILD = """
import os, runpy, signal, sys
import torch
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
saves, replace = int(os.environ.pop("KILL_AFTER_SAVES", 0)), os.replace
def replace_and_die(source, target, *args, **kwargs):
    global saves
    replace(source, target, *args, **kwargs)
    if os.path.basename(os.fspath(target)) == "last.pt":
        saves -= 1
        if saves == 0:
            os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(
    tree: Path,
    output: Path,
    overrides: list[str],
    options: tuple[str, ...] = (),
    processes: int = 1,
    kill_after: int = 0,
) -> None:
    """Train the digits with the sources in `tree`, in new processes.

    With `kill_after`, the main process is killed after that many saves. RuntimeError if a run ends
    in another way than expected.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = []
    for rank in range(processes):
        environment = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **environment, "PYTHONDONTWRITEBYTECODE": "1"}
        if processes > 1:
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            variables |= {"LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
            environment |= {key: str(value) for key, value in variables.items()}
            environment["MASTER_ADDR"] = "127.0.0.1"
        if kill_after and rank == 0:
            environment["KILL_AFTER_SAVES"] = str(kill_after)
        command = [sys.executable, "-c", CHILD, str(tree / "train.py"), "--recipe", "digits"]
        command += ["--output", str(output), "--device", "cpu", *options, *overrides]
        children.append(
            subprocess.Popen(
                command,
                cwd=output.parent,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        texts = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    expected = -signal.SIGKILL if kill_after else 0
    if children[0].returncode != expected:
        raise RuntimeError(f"exit code {children[0].returncode}, not {expected}: " + texts[0])


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock decides."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in line if key not in CLOCK} for line in lines]


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """Tensors, numbers and texts in nested dictionaries and lists, by path."""
    if isinstance(node, dict):
        children = list(node.items())
    elif isinstance(node, list | tuple):
        children = list(enumerate(node))
    else:
        return {path.removeprefix("/"): node}
    found = {}
    for key, child in children:
        found |= leaves(child, f"{path}/{key}")
    return found


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors in a checkpoint, by path."""
    content = leaves(torch.load(file, map_location="cpu", weights_only=True))
    return {path: value for path, value in content.items() if isinstance(value, torch.Tensor)}


def digests(found: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Norm of related tensors taken together, and their product with a fixed sequence of signs.

    Related are those of one stage and kind, in the network, its average, or the optimizer.
    """
    related: dict[str, list[torch.Tensor]] = {}
    for path, tensor in found.items():
        if tensor.is_floating_point():
            parts = re.split(r"[./]", re.sub(r"/\d+/", "/", path))
            key = "/".join(dict.fromkeys([*parts[:3], *parts[-2:]]))
            related.setdefault(key, []).append(tensor.double().flatten())
    result = {}
    for key, flat in sorted((key, torch.cat(group)) for key, group in related.items()):
        signs = torch.tensor(random.Random(0).choices((-1.0, 1.0), k=4096), dtype=torch.double)
        product = flat @ signs.repeat(-(-len(flat) // 4096))[: len(flat)]
        result[key] = [float(f"{value:.8g}") for value in (flat.norm(), product)]
    return result


def summary(output: Path) -> dict[str, Any]:
    """What is stored of a run: its metrics, the digests of last.pt, and the step of best.pt."""
    files = {name: output / "checkpoints" / f"{name}.pt" for name in ("last", "best")}
    return {
        "metrics": metrics(output),
        "best_step": torch.load(files["best"], weights_only=True)["step"],
        "tensors": digests(tensors(files["last"])),
    }


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        train(ROOT, Path(folder) / "run", RECIPE)
        STORED.write_text(json.dumps(summary(Path(folder) / "run"), indent=1) + "\n")
