"""The processes that train one guide together, found by what `accelerate launch` writes into the environment.

A rank is one of W processes. Each keeps the whole state of the training: guide, optimizer, critic, random state, history. They
differ in which completions they draw and score, and in that rank 0 alone calls callbacks and writes files. What they exchange
is exchanged by the operations of `accelerate`, so it works on every backend that `accelerate` knows; the package is imported
when a group is found, and never otherwise.

    gathered   parts of different sizes are padded to one size, gathered, and cut: no row is dropped
    summed     the sum over ranks, the same to the bit on all of them
    together   an error on one rank is raised on all, so that none waits for one that is gone
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from bayes_klrl.errors import BayesKLRLError, needs

__all__ = ["ALONE", "AccelerateRanks", "Ranks", "launched_ranks"]

_BUCKET = 2**24  # floats that are summed by one call
Value = TypeVar("Value")


class Ranks:
    """A group of ranks as one of them sees it; this class is the group of one, in which nothing has to be exchanged.

    A subclass for a larger group has `gathered_equal`, `summed`, `objects` and `fully_shard` of its own.

    Parameters
    ----------
    rank, size
        The number of this rank, from 0, and W, the number of ranks.
    spreads
        Whether each rank keeps a part of the parameters only (FSDP), instead of a copy of the model.

    Examples
    --------
    Seven completions on three ranks:

    >>> [Ranks(rank, 3).share(7) for rank in range(3)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
    """

    def __init__(self, rank: int = 0, size: int = 1, *, spreads: bool = False) -> None:
        self.rank, self.size, self.spreads = rank, size, spreads

    @property
    def is_first(self) -> bool:
        """Whether this rank calls callbacks and writes files."""
        return self.rank == 0

    def share(self, total: int, rank: int | None = None) -> slice:
        """Return which of `total` rows a rank computes, this one if None; the shares of all ranks are all rows, in order."""
        rank = self.rank if rank is None else rank
        return slice(total * rank // self.size, total * (rank + 1) // self.size)

    def gathered(self, part: Any, total: int) -> Any:
        """Return the rows of all ranks, (total, ...), a tensor without a gradient.

        Parameters
        ----------
        part
            This rank's rows, those of `share(total)`, a tensor.
        total
            The number of rows of all ranks together.
        """
        if self.size == 1:
            return part.detach()
        shares = [self.share(total, rank) for rank in range(self.size)]
        longest = max(share.stop - share.start for share in shares)
        padded = part.new_zeros((longest, *part.shape[1:]))
        padded[: len(part)] = part.detach()
        found = self.gathered_equal(padded)
        rows = [found[longest * k : longest * k + share.stop - share.start] for k, share in enumerate(shares)]
        return _cat(rows)

    def gathered_equal(self, part: Any) -> Any:
        """Return the tensors of all ranks, which have one shape, behind one another: (n, ...) to (W n, ...)."""
        return part

    def summed(self, tensor: Any) -> Any:
        """Return the sum over ranks of a tensor of one shape."""
        return tensor

    def fully_shard(self, module: Any) -> None:
        """Spread the parameters of a module over the ranks, in place; in a group of one they stay where they are."""

    def objects(self, value: Value) -> list[Value]:
        """Return a small object of each rank, in order."""
        return [value]

    def of_first(self, value: Value) -> Value:
        """Return the value that rank 0 gives; the others' are not used."""
        return self.objects(value)[0]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on one rank or more."""
        return any(self.objects(bool(flag)))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of one rank on all of them: its own there, and one that names the rank on the others.

        Its attribute `known_to_first` is True: whoever shows errors may leave that to rank 0.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            error = found
        if not self.any(error is not None):
            return
        said = self.objects(None if error is None else f"{type(error).__name__}: {error}")
        for rank, words in enumerate(said):
            if error is None and words is not None:
                error = BayesKLRLError(f"Rank {rank} of {self.size} raised {words}")
        assert error is not None
        with suppress(AttributeError):  # an error with slots has no room
            error.known_to_first = True  # type: ignore[attr-defined]
        raise error

    def sum_gradients(self, parameters: Iterable[Any]) -> None:
        """Replace the gradient of each parameter by its sum over ranks; None stays where no rank has one."""
        if self.size == 1:
            return
        parameters = list(parameters)
        if self.spreads:  # the backward pass has left their mean
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.size)
            return
        having = self.objects([parameter.grad is not None for parameter in parameters])
        wanted = [parameter for parameter, has in zip(parameters, zip(*having, strict=True), strict=True) if any(has)]
        for bucket in _buckets(wanted):
            own = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in bucket]
            total = self.summed(_cat(own))
            for parameter, values in zip(bucket, total.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = values.reshape(parameter.shape)

    def follow_first(self, tensors: Iterable[Any]) -> None:
        """Write rank 0's values into tensors, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            values = tensor.detach()
            values.copy_(self.summed(values if self.is_first else values.new_zeros(values.shape)))


def _cat(parts: list[Any]) -> Any:
    """Return tensors behind one another."""
    import torch

    return torch.cat(parts)


def _buckets(parameters: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield the parameters in order, as many at once as are summed by one call; those of a bucket have one type and place."""
    bucket: list[Any] = []
    for parameter in parameters:
        alike = not bucket or (parameter.dtype, parameter.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


class AccelerateRanks(Ranks):
    """The group that `accelerate launch` has started; its collectives are those of `accelerate.utils`.

    Parameters
    ----------
    state
        The `accelerate.PartialState` of this process.
    """

    def __init__(self, state: Any, *, spreads: bool = False) -> None:
        super().__init__(int(state.process_index), int(state.num_processes), spreads=spreads)
        self._device = state.device
        self._sharding: dict[str, Any] | None = None

    def fully_shard(self, module: Any) -> None:
        """Spread the parameters of a module over the ranks, in place, by torch's `fully_shard`.

        Of the launcher's options, `fsdp_reshard_after_forward` and `fsdp_offload_params` count.
        """
        from torch.distributed.device_mesh import init_device_mesh

        try:
            from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
        except ImportError as error:
            raise BayesKLRLError("FSDP 2 needs torch 2.6 or newer: pip install -U torch") from error
        if self._sharding is None:
            offloads = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
            self._sharding = {
                "mesh": init_device_mesh(self._device.type, (self.size,)),
                "reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true",
                "offload_policy": CPUOffloadPolicy() if offloads else OffloadPolicy(),
            }
        fully_shard(module, **self._sharding)

    def gathered_equal(self, part: Any) -> Any:
        """See `Ranks.gathered_equal`."""
        from accelerate.utils import gather

        return gather(part.to(self._device)).to(part.device)

    def summed(self, tensor: Any) -> Any:
        """See `Ranks.summed`."""
        from accelerate.utils import reduce

        return reduce(tensor.detach().to(self._device), "sum").to(tensor.device)

    def objects(self, value: Value) -> list[Value]:
        """See `Ranks.objects`."""
        from accelerate.utils import gather_object

        found: list[Value] = gather_object([value])
        return found

    def any(self, flag: bool) -> bool:
        """See `Ranks.any`; one small sum, since it is asked in every part of a step."""
        import torch

        return bool(self.summed(torch.tensor(float(flag), device="cpu")) > 0)


ALONE = Ranks()
"""The group of one process, as it is without `accelerate launch`."""


def launched_ranks(environ: Mapping[str, str] | None = None) -> Ranks:
    """Return the group that this process was started in by `accelerate launch`; `ALONE` if it was not.

    Processes of torchrun alone do not take part, nor do worker processes that a rank has started itself: what they do may be
    work of their own.

    Parameters
    ----------
    environ
        The environment; None: that of the process.

    Raises
    ------
    BayesKLRLError
        If `accelerate` is not installed here, or finds other ranks than the environment says.

    Examples
    --------
    >>> launched_ranks({}).size, launched_ranks({"WORLD_SIZE": "2", "RANK": "0"}).size
    (1, 1)
    """
    environ = os.environ if environ is None else environ
    size = max(_number(environ.get(name)) for name in _SIZES)
    by_accelerate = any(name.startswith("ACCELERATE_") for name in environ)
    is_worker = multiprocessing.parent_process() is not None and "FORK_LAUNCHED" not in environ
    if size < 2 or not by_accelerate or is_worker:
        return ALONE
    _check_options(environ)
    with needs(f"This process, one of {size} that `accelerate launch` started,", "accelerate", "accelerate"):
        from accelerate import PartialState
    was_joined = _is_joined()
    state = PartialState(cpu=_on_cpu(environ))
    if not was_joined and _is_joined():
        atexit.register(_leave)
    if state.num_processes != size:
        raise BayesKLRLError(
            f"accelerate started {size} processes, but its state knows of {state.num_processes} ({state.distributed_type}). "
            "On a machine without an accelerator leave out options for one; see docs/ranks.md for commands that work."
        )
    return AccelerateRanks(state, spreads=_is_set(environ, "ACCELERATE_USE_FSDP"))


def _is_joined() -> bool:
    """Return whether this process is in a group of torch."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _leave() -> None:
    """Close the group before Python ends: threads of a backend that still run then abort the process (seen with gloo)."""
    import torch.distributed as dist

    if _is_joined():
        dist.destroy_process_group()


_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # torch's launcher, and those of MPI


def _is_set(environ: Mapping[str, str], name: str) -> bool:
    """Return whether a variable says yes."""
    return environ.get(name, "false").lower() in ("1", "true", "yes", "y", "on")


def _check_options(environ: Mapping[str, str]) -> None:
    """Refuse what the launcher was asked for and the training would not do."""
    for name, words in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if _is_set(environ, f"ACCELERATE_USE_{name}"):
            raise BayesKLRLError(
                f"`accelerate launch` was asked for {words}, which SVI cannot use. Start the ranks with --multi_gpu, or with "
                "FSDP 2 for a model that does not fit on one device (docs/ranks.md)."
            )
    if _is_set(environ, "ACCELERATE_USE_FSDP") and environ.get("FSDP_VERSION", "1") != "2":
        raise BayesKLRLError(
            "`accelerate launch` was asked for the first version of FSDP, and SVI uses the second. Set fsdp_version: 2."
        )
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", ""):
        raise BayesKLRLError(
            f"`accelerate launch` was asked for mixed_precision={precision}, and SVI computes in the precision of the prior. "
            "Leave it out, or load the prior in another one: bk.TorchLM.from_pretrained(..., dtype=...)."
        )


def _number(text: str | None) -> int:
    """Return the number that a variable holds; 1 if it holds none."""
    return int(text) if text is not None and text.isdigit() else 1


def _on_cpu(environ: Mapping[str, str]) -> bool:
    """Return whether the ranks are on CPUs: they are asked to be, or there is no accelerator that has collectives."""
    import torch

    if _is_set(environ, "ACCELERATE_USE_CPU"):
        return True
    if not hasattr(torch, "accelerator"):  # before torch 2.6
        return not torch.cuda.is_available()
    device = torch.accelerator.current_accelerator()
    return device is None or device.type == "mps" or not torch.accelerator.is_available()
