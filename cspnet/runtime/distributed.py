"""The processes of a run, one per device, and their collective operations.

torchrun starts them and describes them in environment variables. Every process knows the whole
recipe and computes its share of the groups of each step; the main process writes all files. With
sums over the processes, results equal those of one process up to rounding. With a single process
every operation is a no-op.
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
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cspnet.errors import CspnetError, RankFailedError, RecipeError

# Longer than anything one process does while the others wait for it: a save, a compilation.
PATIENCE = timedelta(minutes=10)

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Rank of this process and number of processes; a single process by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the output of the run."""
        return self.rank == 0

    def own_groups(self, groups: int) -> range:
        """The consecutive groups of a step that this process computes. `size` divides `groups`."""
        count = groups // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum the tensor over the processes in place, on its device; return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, reason: str | None) -> str | None:
        """The first reason that any process gives, in all processes. Does not wait for a GPU."""
        if self.size == 1:
            return reason
        if not self.all_reduce(torch.tensor(int(reason is not None))):
            return None
        return next(given for given in self.gather(reason) if given is not None)

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` in the main process only; return its result, or raise its error, in all.

        Only a CspnetError is shared.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]  # result, error
        if self.is_main:
            try:
                outcome[0] = function()
            except CspnetError as raised:
                outcome[1] = raised
        dist.broadcast_object_list(outcome)
        result, error = outcome
        if error:
            raise error
        return result

    def broadcast_state(self, content: dict | None) -> dict:
        """The checkpoint content of the main process, in all processes; the others pass None."""
        if self.size == 1:
            assert content is not None
            return content
        data = io.BytesIO()
        if self.is_main:
            torch.save(content, data)
        length = torch.tensor(data.getbuffer().nbytes)
        dist.broadcast(length, 0)
        block = torch.empty(int(length), dtype=torch.uint8)
        if self.is_main:
            block.copy_(torch.frombuffer(data.getbuffer(), dtype=torch.uint8))
        dist.broadcast(block, 0)
        if content is not None:
            return content
        return torch.load(io.BytesIO(block.numpy().data), map_location="cpu", weights_only=True)

    def wrap_ddp(self, network: Any, device: torch.device) -> Any:
        """Wrap the network so that a backward pass sums the gradients over the processes."""
        if self.size == 1:
            return network
        # Its buckets would split the graphs that the self-test compiled as a whole.
        torch._dynamo.config.optimize_ddp = False
        parallel = DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **cast(dict[str, Any], {_SYNC_BUFFERS: False}),  # RunningStats synchronizes them
        )
        parallel.register_comm_hook(None, _sum_gradients)
        return parallel


SINGLE_PROCESS = Processes()
# torch 2.15 renamed the argument and warns about the old name.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


def _sum_gradients(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    # DDP's default is the mean, but the loss is divided by the batch of all processes already.
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def gradient_sync(last: bool, network: Any) -> contextlib.AbstractContextManager:
    """Synchronize gradients in the last micro-batch of a step only; accumulate locally before."""
    if last or not isinstance(network, DistributedDataParallel):
        return contextlib.nullcontext()
    return network.no_sync()


def find_processes() -> Processes:
    """The processes as torchrun's environment variables describe them; a single one without them.

    Raises RecipeError if some variables are missing.
    """
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
def process_group(processes: Processes, device: torch.device) -> Iterator[None]:
    """Join torch's process group for the block.

    Raises RankFailedError if another process ends or hangs.
    """
    if processes.size == 1:
        yield
        return
    # Host tensors always use Gloo, so that `agree` does not wait for the device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=_rendezvous(processes),
            rank=processes.rank,
            world_size=processes.size,
            timeout=PATIENCE,
        )
        yield
    except CspnetError:
        dist.destroy_process_group()  # its threads would abort the process at exit
        raise
    except RuntimeError as error:
        if not is_process_group_error(error):
            raise
        raise RankFailedError(
            f"process {processes.rank} of {processes.size} cannot reach the others: one has "
            f"ended, or has not responded for {PATIENCE.seconds // 60} minutes. Its own message "
            "says why. Restart all processes with --resume."
        ) from None
    dist.destroy_process_group()


def _rendezvous(processes: Processes) -> dist.Store:
    """A key-value store shared by the processes of this start, and by none of an earlier start.

    torch distinguishes starts by torchrun's restart count. But each machine's torchrun counts the
    failures of its own processes only, and the store outlives them: after one failure, processes
    would wait for each other under different counts. So the main process names the start, and
    acknowledges the processes that greet it by that name.
    """
    has_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=processes.is_main and not has_agent_store,
        timeout=PATIENCE,
        wait_for_workers=False,
    )
    own = uuid.uuid4().hex
    if processes.is_main:
        store.set("cspnet/first", own)
        greetings = [f"cspnet/{own}/{rank}" for rank in range(1, processes.size)]
        store.wait(greetings)
        for greeting in greetings:
            store.set(f"{greeting}/answer", store.get(greeting).decode())
        return dist.PrefixStore(own, store)
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < deadline:
        main = store.get("cspnet/first").decode()
        greeting = f"cspnet/{main}/{processes.rank}"
        store.set(greeting, own)
        time.sleep(0.05)
        answer = f"{greeting}/answer"
        if store.check([answer]) and store.get(answer).decode() == own:
            return dist.PrefixStore(main, store)
    raise dist.DistError(f"no answer within {PATIENCE}")


def is_process_group_error(error: Exception) -> bool:
    """Whether an exception means that another process of the run has ended or hangs."""
    words = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe")
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)
