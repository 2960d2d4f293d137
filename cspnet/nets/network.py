"""The base class of every network that cspnet trains, loads or exports."""

from torch import Tensor, nn


class Network(nn.Module):
    """An image classifier: [N, 3, H, W] -> logits [N, classes].

    Parameter and buffer names are timm's, so state dicts are interchangeable with timm.
    """

    name: str  # the recipe's model.name
    classes: int
    classifier_prefixes: tuple[str, ...]  # of the names of the classifier's parameters

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> logits [N, classes]"""
        raise NotImplementedError

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Feature maps for a detector, finest first. NotImplementedError if there are none."""
        raise NotImplementedError(f"{self.name} has no feature pyramid")

    def freeze(self, stages: int) -> None:
        """Freeze the first stages. NotImplementedError if the network has no such stages."""
        raise NotImplementedError(f"{self.name} cannot freeze its first {stages} stages")

    def classifier_keys(self) -> list[str]:
        """The names of the classifier's tensors in the state dict."""
        return [key for key in self.state_dict() if key.startswith(self.classifier_prefixes)]
