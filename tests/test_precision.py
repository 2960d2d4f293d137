"""The precision that `auto` becomes on a GPU, by its compute capability and its name."""

import pytest
import torch

from cspnet.errors import RecipeError
from cspnet.runtime.device import choose_precision, inference_precision

CUDA = torch.device("cuda", 0)
WITHOUT_TENSOR_CORES = [
    "NVIDIA GeForce GTX 1660 Ti",
    "NVIDIA GeForce GTX 1660 SUPER",
    "GeForce GTX 1660",
    "NVIDIA GeForce GTX 1650",
    "NVIDIA GeForce GTX 1650 with Max-Q Design",
    "NVIDIA GeForce GTX 1630",
    "NVIDIA GeForce MX450",
    "NVIDIA GeForce MX550",
    "NVIDIA T400 4GB",
    "NVIDIA T500",
    "NVIDIA T550 Laptop GPU",
    "NVIDIA T600 Laptop GPU",
    "NVIDIA T1000 8GB",
    "Quadro T1000 with Max-Q Design",
    "NVIDIA T1200 Laptop GPU",
    "Quadro T2000",
    "NVIDIA CMP 30HX",
]
WITH_TENSOR_CORES = [
    "NVIDIA GeForce RTX 2070",
    "NVIDIA GeForce RTX 2060 SUPER",
    "NVIDIA GeForce RTX 2080 Ti",
    "NVIDIA GeForce RTX 2050 Laptop GPU",
    "NVIDIA TITAN RTX",
    "Quadro RTX 4000",
    "Tesla T4",
    "NVIDIA T4G",
]


@pytest.fixture
def card(monkeypatch):
    """Makes torch report a GPU of a name and a compute capability."""

    def pretend(name: str, capability: tuple[int, int] = (7, 5)) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


@pytest.mark.parametrize("name", WITHOUT_TENSOR_CORES)
def test_auto_is_fp32_on_turing_without_tensor_cores(card, name):
    card(name)
    found = choose_precision("auto", CUDA)
    assert found.name == "fp32" and not found.scales_loss
    assert name in found.reason and "no tensor cores" in found.reason and "NaN" in found.reason


@pytest.mark.parametrize("name", WITH_TENSOR_CORES)
def test_auto_is_fp16_on_turing_with_tensor_cores(card, name):
    card(name)
    found = choose_precision("auto", CUDA)
    assert found.name == "fp16" and found.scales_loss and "fp16 tensor cores" in found.reason


@pytest.mark.parametrize(
    "name, capability, precision",
    [
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), "fp32"),
        ("Tesla V100-SXM2-16GB", (7, 0), "fp16"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "bf16"),
        ("NVIDIA GeForce MX570", (8, 6), "bf16"),
        ("NVIDIA T1000 of a later chip", (8, 6), "bf16"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "bf16"),
    ],
)
def test_auto_on_other_generations(card, name, capability, precision):
    card(name, capability)
    assert choose_precision("auto", CUDA).name == precision


def test_fp16_that_is_asked_for_is_kept_with_a_warning(card):
    card("NVIDIA GeForce GTX 1660 Ti")
    found = choose_precision("fp16", CUDA)
    assert found.name == "fp16"
    assert "WARNING" in found.reason and "precision=fp32 is safe" in found.reason
    card("NVIDIA GeForce RTX 2070")
    assert "WARNING" not in choose_precision("fp16", CUDA).reason


def test_bf16_is_refused_with_the_precision_that_the_card_can_use(card):
    for name, capability, other in (
        ("NVIDIA GeForce RTX 2070", (7, 5), "fp16"),
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), "fp32"),
        ("NVIDIA GeForce GTX 1080", (6, 1), "fp32"),
    ):
        card(name, capability)
        with pytest.raises(RecipeError, match=f"Use precision={other}"):
            choose_precision("bf16", CUDA)


def test_a_net_trained_in_fp16_is_evaluated_in_fp32_without_tensor_cores(card):
    card("NVIDIA GeForce GTX 1660 Ti")
    assert inference_precision("fp16", CUDA).name == "fp32"
    assert inference_precision("bf16", CUDA).name == "fp32"
    card("NVIDIA GeForce RTX 2070")
    assert inference_precision("fp16", CUDA).name == "fp16"
