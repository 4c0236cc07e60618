"""What comes out of an exchange by memory is an ordinary tensor; what differs is in the docs."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import mortal_ranks
import pytest
import torch
import torch.multiprocessing
from memory_ranks import exchange, exchanged, fresh, num_mappings, numbered
from ranks import Ranks
from test_collectives import same
from torch.utils.data import DataLoader, Dataset

from fastvideo_comm import DeviceCommunicatorBase


def outputs_of(c: DeviceCommunicatorBase) -> dict[str, torch.Tensor]:
    """One of every op, each with the values 0, 1, .. of its `numel`."""
    ranks, rank = c.world_size, c.rank
    whole = torch.arange(2.0 * ranks * ranks * 3).view(1, 2 * ranks, ranks, 3)
    row = torch.arange(6.0)
    outputs = {
        "all_to_all_4D": c.all_to_all_4D(whole.chunk(ranks, 1)[rank]),
        "asynchronous": c.all_to_all_4D(whole.chunk(ranks, 1)[rank], async_op=True).wait(),
        "all_gather": c.all_gather(whole.chunk(ranks, 1)[rank], 1),
        "all_reduce": c.all_reduce(row),
        "all_reduce of many": c.all_reduce(torch.arange(20_000.0)),
    }
    gathered = c.gather(row, 0, 0)
    if gathered is not None:
        outputs["gather"] = gathered
        c.send(row, 1)
    elif rank == 1:
        outputs["recv"] = c.recv((6,), torch.float32, 0)
    return outputs


def written_to(x: torch.Tensor) -> None:
    assert x.is_contiguous()
    assert x.storage_offset() == 0
    assert not x.requires_grad
    assert x.device == torch.device("cpu")
    before = x.clone()
    x.add_(1).mul_(2)
    x[..., 0] = 7
    before.add_(1).mul_(2)
    before[..., 0] = 7
    same(x, before)
    x.untyped_storage().fill_(0)
    assert not x.any()


def resized(x: torch.Tensor) -> None:
    """To more elements it is an error, as with the memory of a NumPy array."""
    before, shape, view = x.clone(), x.shape, x.detach()
    with pytest.raises(RuntimeError, match="resize storage that is not resizable"):
        view.resize_(x.numel() + 1)
    with pytest.raises(RuntimeError, match="not resizable"):
        x.untyped_storage().resize_(x.nbytes * 2)
    same(x, before)
    same(x.clone().resize_(0), torch.empty(0))
    x.resize_(1)  # a smaller one needs no memory
    same(x.resize_(shape), before)


def copied(x: torch.Tensor) -> None:
    expected = x.clone()
    buffer = io.BytesIO()
    torch.save({"x": x, "view": x[..., :1]}, buffer)
    assert len(buffer.getvalue()) < x.nbytes + 4096, "its own bytes, not those of the segment"
    buffer.seek(0)
    loaded = torch.load(buffer)
    pickled = pickle.loads(pickle.dumps(x))
    for other in (loaded["x"], pickled, copy.deepcopy(x), copy.copy(x).clone()):
        same(other, expected)
        if other is not x:
            other.fill_(-1)
    same(loaded["view"], torch.full_like(expected[..., :1], -1))  # of the same storage
    same(x, expected)


def as_array(x: torch.Tensor) -> None:
    array = x.numpy()
    array[...] = 5
    assert (x == 5).all()
    values = x.tolist()
    del x
    gc.collect()
    assert array.tolist() == values, "the array holds the memory"
    assert torch.from_numpy(array).sum() == 5 * array.size


def made_shared(x: torch.Tensor) -> None:
    expected = x.clone()
    assert not x.is_shared()
    same(x.share_memory_(), expected)
    assert x.is_shared()
    x.fill_(3)


def pinned(x: torch.Tensor) -> None:
    if torch.cuda.is_available():
        same(x.pin_memory(), x)
        return
    with pytest.raises(RuntimeError) as error:
        x.pin_memory()
    with pytest.raises(RuntimeError) as of_another:
        torch.ones(2).pin_memory()
    assert str(error.value) == str(of_another.value)
    assert not x.is_pinned()


def differentiated(x: torch.Tensor) -> None:
    leaf = torch.full_like(x, 2.0).requires_grad_()
    product = leaf * x
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # noqa: PT012
        x.add_(1)
        product.sum().backward()
    x.sub_(1).requires_grad_()
    (x * 3).sum().backward()
    assert (x.grad == 3).all()
    x.data = torch.zeros(1)


def viewed(x: torch.Tensor) -> None:
    expected = x.clone()
    view, as_bytes = x.mT if x.dim() > 1 else x[::2], x.view(torch.uint8)
    transposed = expected.mT if expected.dim() > 1 else expected[::2]
    del x
    gc.collect()
    same(view, transposed)
    same(as_bytes, expected.view(torch.uint8))
    same(torch.utils.dlpack.from_dlpack(view), transposed)


USES: dict[str, Callable[[torch.Tensor], None]] = {
    function.__name__: function
    for function in (
        *(written_to, resized, copied, as_array, made_shared, pinned, differentiated, viewed),
    )
}


def used(communicator: DeviceCommunicatorBase, name: str) -> None:
    with fresh(communicator) as other:
        for op, output in outputs_of(other).items():
            try:
                USES[name](output)
            except BaseException as error:
                error.add_note(op) if hasattr(error, "add_note") else None
                raise
        del output
        exchange(other, 1)
        assert other.memory_stats().high_water_bytes > 0
        gc.collect()
        assert other.memory_stats().bytes_in_use == 0, "every block has come back"


@pytest.mark.parametrize("name", USES)
def test_outputs_are_ordinary_tensors(ranks: Ranks, name):
    ranks.run(2, used, name, ways=["memory"])


class Rows(Dataset):
    """Rows of a tensor, which workers have by fork."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tensor[index].clone()


def other_process(tensors: Any, answer: Any) -> None:
    tensor = tensors.get(timeout=60)
    answer.put(float(tensor.sum()))
    tensor.fill_(-1)
    answer.put("written")


def sent_to_others(communicator: DeviceCommunicatorBase) -> None:
    """DataLoader workers, and torch.multiprocessing by its queues."""
    warnings.simplefilter("ignore", DeprecationWarning)
    output = communicator.all_gather(torch.arange(12.0).view(3, 4) + 12 * communicator.rank, 0)
    expected = torch.arange(24.0).view(6, 4)
    for number in (0, 2):
        rows = torch.cat(list(DataLoader(Rows(output), batch_size=2, num_workers=number)))
        same(rows, expected)
    if communicator.rank == 0:
        context = torch.multiprocessing.get_context("forkserver")
        tensors, answer = context.Queue(), context.Queue()
        child = context.Process(target=other_process, args=(tensors, answer))
        child.start()
        tensors.put(output)
        assert answer.get(timeout=60) == float(expected.sum())
        assert answer.get(timeout=60) == "written"
        child.join()
        # As with every tensor: who sends it by torch.multiprocessing shares it.
        assert output.is_shared()
        assert (output == -1).all()
    exchange(communicator, 1)


def test_data_loaders_and_torch_multiprocessing_take_them():
    mortal_ranks.run(2, sent_to_others)


def seen_by_a_child(communicator: DeviceCommunicatorBase) -> list[float]:
    """What the docs say of forks: a child sees what its parent does to the memory later."""
    output = exchange(communicator, 0).clone().double()
    held = communicator.all_gather(torch.ones(4), 0)
    own = held.clone()
    ours, theirs = multiprocessing.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        theirs.recv()
        theirs.send([float(held[0]), float(own[0])])
        held[1] = 5
        own[1] = 5
        theirs.send(None)
        os._exit(0)
    held[0] = own[0] = 3
    ours.send(None)
    seen = ours.recv()
    ours.recv()
    os.waitpid(child, 0)
    assert output.sum() == exchanged(communicator, 0).sum()
    return [*seen, float(held[1]), float(own[1])]


def test_a_forked_child_shares_outputs_with_its_parent_and_not_their_clones():
    for answer in mortal_ranks.run(2, seen_by_a_child):
        assert answer == [3.0, 1.0, 5.0, 1.0]


def in_modes(communicator: DeviceCommunicatorBase) -> None:
    with fresh(communicator) as other:
        x = numbered(other, 1)
        with torch.inference_mode():
            first = other.all_to_all_4D(x)
            same(first, exchanged(other, 1))
            inside = other.all_reduce(torch.ones(2))
        same(other.all_to_all_4D(x), exchanged(other, 1))
        with torch.inference_mode():
            same(other.all_to_all_4D(x), exchanged(other, 1))
            first.add_(1)
            inside.add_(1)
        leaf = torch.ones(1, 2, other.world_size, 2, requires_grad=True)
        with torch.no_grad():
            assert not other.all_to_all_4D(leaf).requires_grad
        with torch.device("meta"):
            there = other.all_to_all_4D(x)
            everyone = other.all_gather(torch.tensor([other.rank], device="cpu"), 0)
            total = other.all_reduce(torch.ones(20_000, device="cpu"))
        same(there, exchanged(other, 1))
        assert everyone.tolist() == list(range(other.world_size))
        assert total.sum() == 20_000 * other.world_size
        torch.set_default_dtype(torch.float64)
        try:
            assert other.all_reduce(torch.ones(1, dtype=torch.float32)).dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)


def test_inference_mode_and_the_default_device_and_dtype(ranks: Ranks):
    ranks.run(2, in_modes, ways=["memory"])


def let_go(communicator: DeviceCommunicatorBase) -> None:
    gc.collect()
    before = num_mappings()
    with fresh(communicator) as other:
        held = exchange(other, 1)
        assert num_mappings() == before + other.world_size
        leaf = torch.rand(1, 2, other.world_size, 2, requires_grad=True)
        graph = other.all_to_all_4D(leaf) ** 2
    assert num_mappings() <= before + 1, "its own, which somebody holds"
    same(held, exchanged(communicator, 1))
    assert graph.sum() > 0
    del held, graph
    assert num_mappings() == before


def test_memory_is_let_go_with_the_last_who_holds_a_tensor(ranks: Ranks):
    ranks.run(2, let_go, ways=["memory"])


def counted(communicator: DeviceCommunicatorBase) -> None:
    """`memory_stats` says what is held, and the most that was."""
    with fresh(communicator) as other:
        assert other.memory_stats() == (0, 0, 0, "")
        size = 1 << 20
        first = other.all_gather(torch.zeros(size // other.world_size, dtype=torch.uint8), 0)
        assert other.memory_stats() == (size, size, 1, "")
        second = other.all_gather(torch.zeros(size, dtype=torch.uint8), 0)
        held = size * (1 + other.world_size)
        assert other.memory_stats() == (held, held, 1, "")
        del second
        assert other.memory_stats() == (size, held, 1, "")
        large = other.all_gather(torch.zeros(300 << 20, dtype=torch.uint8)[:, None][:1], 0)
        assert other.memory_stats().segments == 1
        del first, large
        assert other.memory_stats().bytes_in_use == 0
    assert other.memory_stats() == (0, 0, 0, "the communicator was destroyed")
    with fresh(communicator, "off") as other:
        exchange(other, 0)
        assert other.memory_stats() == (0, 0, 0, "rank 0: it is switched off there")


def test_memory_stats_count_what_is_held(ranks: Ranks):
    ranks.run(2, counted, ways=["memory"])
