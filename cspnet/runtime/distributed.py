"""The processes of a run, one for each device: who this one is, and what all of them agree on.

torchrun starts them and says in the environment who is who. Every process knows the whole recipe
and takes its share of each step's groups; the first one writes. What the numbers depend on is
summed here, so that they are those of one process, to rounding. A world of one costs nothing.
"""

import contextlib
import inspect
import io
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from cspnet.errors import CspnetError, RankFailedError, RecipeError
from cspnet.nets.layers import GroupBatchNorm2d

# Longer than anything that one process does while the others wait for it: a save, a compilation.
PATIENCE = timedelta(minutes=10)

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Who this process is among how many; alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share_of(self, groups: int) -> range:
        """This process's groups of a step: a run of neighbours. The world's size divides them."""
        share = groups // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in place, wherever the tensor is."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """What each process gives, by rank."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, reason: str | None) -> str | None:
        """The reason of one process, if one has any; for all. Asks no device."""
        if self.size == 1:
            return reason
        if not self.sum_(torch.tensor(int(reason is not None))):
            return None
        return next(given for given in self.gather(reason) if given is not None)

    def by_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, where alone it is called; its error too."""
        if self.size == 1:
            return make()
        told: list = [None, None]
        if self.first:
            try:
                told[0] = make()
            except CspnetError as error:
                told[1] = error
        dist.broadcast_object_list(told)
        value, error = told
        if error:
            raise error
        return value

    def share(self, content: dict | None) -> dict:
        """The first process's content, a checkpoint's, for all; the others give None."""
        if self.size == 1:
            return content
        data = io.BytesIO()
        if self.first:
            torch.save(content, data)
        length = torch.tensor(data.getbuffer().nbytes)
        dist.broadcast(length, 0)
        block = torch.empty(int(length), dtype=torch.uint8)
        if self.first:
            block.copy_(torch.frombuffer(data.getbuffer(), dtype=torch.uint8))
        dist.broadcast(block, 0)
        if self.first:
            return content
        return torch.load(io.BytesIO(block.numpy()), map_location="cpu", weights_only=True)

    def together(self, net: nn.Module, device: torch.device) -> nn.Module:
        """The net, whose gradients come out of a backward pass as the sum over the processes."""
        if self.size == 1:
            return net
        # Its buckets would split the graphs that were tested whole.
        torch._dynamo.config.optimize_ddp = False
        parallel = DistributedDataParallel(
            net,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{_SYNC_BUFFERS: False},  # `Statistics` has them
        )
        parallel.register_comm_hook(None, _sum)
        return parallel


SINGLE_PROCESS = Processes()
# torch 2.15 has another name for it, and warns of the old one.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


def _sum(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    # A sum and no mean: the loss of a pass is its share of the step's already.
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def gradient_sync(last: bool, net: nn.Module) -> contextlib.AbstractContextManager:
    """Gradients stay in this process, unless it is the last pass of a step."""
    if last or not isinstance(net, DistributedDataParallel):
        return contextlib.nullcontext()
    return net.no_sync()


def find_processes() -> Processes:
    """What torchrun's environment says; a world of one without it. Raises RecipeError."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return SINGLE_PROCESS
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in os.environ]:
        raise RecipeError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set. Let torchrun start the "
            "processes: torchrun --nproc-per-node=N train.py --recipe …"
        )
    return Processes(*(int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", *names[1:3])))


@contextlib.contextmanager
def process_group(world: Processes, device: torch.device) -> Iterator[None]:
    """In the group of the world's processes. Raises Lost where one of them is gone, or hangs."""
    if world.size == 1:
        yield
        return
    # Tensors of the host go by Gloo in any case: agreeing makes no device wait.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, store=_meet(world), rank=world.rank, world_size=world.size, timeout=PATIENCE
        )
        yield
    except CspnetError:
        dist.destroy_process_group()  # its threads would break off the process at its exit
        raise
    except RuntimeError as error:
        if not is_process_group_error(error):
            raise
        raise RankFailedError(
            f"process {world.rank} of {world.size} cannot reach the others: one has ended, or has "
            f"done nothing for {PATIENCE.seconds // 60} minutes. Its own message says why; start "
            "all of them again with --resume."
        ) from None
    dist.destroy_process_group()


def _meet(world: Processes) -> dist.Store:
    """A store that is shared by the processes of this start, and by none of an earlier one.

    torch tells starts apart by torchrun's count of restarts. But each machine's torchrun counts the
    failures of its own processes only, and the store outlives them: after one has died, some would
    wait for the others under another number. So the first process gives the start a name, and
    answers those that greet it by that name.
    """
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=world.first and not served,
        timeout=PATIENCE,
        wait_for_workers=False,
    )
    own = uuid.uuid4().hex
    if world.first:
        store.set("cspnet/first", own)
        greetings = [f"cspnet/{own}/{rank}" for rank in range(1, world.size)]
        store.wait(greetings)
        for greeting in greetings:
            store.set(f"{greeting}/answer", store.get(greeting))
        return dist.PrefixStore(own, store)
    end = time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < end:
        first = store.get("cspnet/first").decode()
        greeting = f"cspnet/{first}/{world.rank}"
        store.set(greeting, own)
        time.sleep(0.05)
        answer = f"{greeting}/answer"
        if store.check([answer]) and store.get(answer).decode() == own:
            return dist.PrefixStore(first, store)
    raise dist.DistError(f"no answer within {PATIENCE}")


def is_process_group_error(error: Exception) -> bool:
    """Whether an exception says that another process of the run is gone, or hangs."""
    words = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe")
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)


class RunningStats:
    """BatchNorm's running statistics, and the loss, as one process would have them.

    A running average moves once per group, in order: r <- (1 - m) r + m s. That is linear. So each
    process moves its own by its own groups, and what this added is summed over the processes, each
    part faded by the groups that come after it. To be made when the net is as all processes have
    it, with `groups` as the number of each process's groups in a step.
    """

    def __init__(self, world: Processes, net: nn.Module, groups: int):
        self.world = world
        norms = [
            norm
            for norm in net.modules()
            if isinstance(norm, _BatchNorm) and norm.training and norm.track_running_stats
        ]
        self._tensors = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
        # GroupBatchNorm2d does not count its passes.
        self._counts = [n.num_batches_tracked for n in norms if type(n) is not GroupBatchNorm2d]
        self._uncounted = groups * (world.size - 1)
        fades = [torch.full_like(t, 1 - n.momentum) for n in norms for t in (n.running_mean,) * 2]
        fade = torch.cat(fades) if fades else torch.zeros(0)  # [sum of channels, twice]
        self._own, self._all = fade**groups, fade ** (groups * world.size)
        self._after = fade ** (groups * (world.size - 1 - world.rank))
        self._before = self._flat()

    @torch.no_grad()
    def settle(self, loss: torch.Tensor) -> torch.Tensor:
        """After a step's passes: sets the statistics; returns the loss summed over the processes.

        One sum over the processes, on the device; the host does not wait.
        """
        if self.world.size == 1 or not self._tensors:
            return self.world.sum_(loss)
        added = self._after * (self._flat() - self._own * self._before)
        total = self.world.sum_(torch.cat([added, loss.reshape(1).to(added)]))
        self._before = self._all * self._before + total[:-1]
        parts = self._before.split([tensor.numel() for tensor in self._tensors])
        torch._foreach_copy_(self._tensors, list(parts))
        if self._counts:
            torch._foreach_add_(self._counts, self._uncounted)
        return total[-1]

    def _flat(self) -> torch.Tensor:
        return torch.cat(self._tensors) if self._tensors else torch.zeros(0)
