"""Behaviour at the public boundary: what upstream got wrong, and every error's words."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, Ranks

import fastvideo_comm
from fastvideo_comm import DeviceCommunicatorBase, DistributedAutograd
from fastvideo_comm.collective.validation import check_device
from fastvideo_comm.device_communicators import base_device_communicator
from fastvideo_comm.errors import ClosedError, CommunicationError
from fastvideo_comm.kernels import strided_copy_
from fastvideo_comm.utils import near_even_sizes


def attributes(communicator: DeviceCommunicatorBase) -> dict[str, Any]:
    assert communicator.cpu_group is communicator.device_group
    assert communicator.device == torch.device("cpu")
    return {
        name: getattr(communicator, name)
        for name in (
            "unique_name",
            "rank",
            "rank_in_group",
            "world_size",
            "ranks",
            "global_rank",
            "global_world_size",
        )
    }


def test_attributes_are_those_of_upstream(ranks: Ranks):
    assert ranks.run((1, 3), attributes) == [
        {
            "unique_name": "test",
            "rank": rank,
            "rank_in_group": rank,
            "world_size": 2,
            "ranks": [1, 3],
            "global_rank": (1, 3)[rank],
            "global_world_size": 4,
        }
        for rank in range(2)
    ]


def test_names_and_signatures_are_those_of_upstream():
    assert base_device_communicator.DeviceCommunicatorBase is DeviceCommunicatorBase
    assert base_device_communicator.DistributedAutograd is DistributedAutograd
    expected = {
        DeviceCommunicatorBase: ["cpu_group", "device", "device_group", "unique_name"],
        DeviceCommunicatorBase.all_gather: ["self", "input_", "dim"],
        DeviceCommunicatorBase.all_reduce: ["self", "input_", "op"],
        DeviceCommunicatorBase.all_to_all_4D: ["self", "input_", "scatter_dim", "gather_dim"],
        DeviceCommunicatorBase.gather: ["self", "input_", "dst", "dim"],
        DeviceCommunicatorBase.send: ["self", "tensor", "dst"],
        DeviceCommunicatorBase.recv: ["self", "size", "dtype", "src"],
        DeviceCommunicatorBase.slice: ["self", "input_", "dim"],
        DeviceCommunicatorBase.reduce_scatter: ["self", "input_", "dim"],
        DeviceCommunicatorBase.broadcast: ["self", "input_", "src"],
        DeviceCommunicatorBase.barrier: ["self"],
        DeviceCommunicatorBase.destroy: ["self"],
        DistributedAutograd.AllReduce.forward: ["ctx", "group", "input_", "op"],
        DistributedAutograd.AllGather.forward: ["ctx", "group", "input_", "world_size", "dim"],
        DistributedAutograd.AllToAll4D.forward: [
            *("ctx", "group", "input_", "world_size", "scatter_dim", "gather_dim")
        ],
        DistributedAutograd.Slice.forward: [
            *("ctx", "group", "input_", "world_size", "dim", "scale_grad")
        ],
        DistributedAutograd.AllToAll4D.backward: ["ctx", "grad_output"],
    }
    for function, names in expected.items():
        parameters = inspect.signature(function).parameters.values()
        positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        assert positional == names, function
    assert inspect.signature(DeviceCommunicatorBase.all_reduce).parameters["op"].default == (
        dist.ReduceOp.SUM
    )
    for name in fastvideo_comm.__all__:
        assert hasattr(fastvideo_comm, name)


def group_only(communicator: DeviceCommunicatorBase) -> float:
    assert DeviceCommunicatorBase(communicator.cpu_group).device_group is communicator.cpu_group
    return communicator.all_reduce(torch.ones(2))[0].item()


def test_device_group_none_means_cpu_group_and_not_world(ranks: Ranks):
    assert ranks.run((1, 3), group_only) == [2.0, 2.0]


def none_is_sum(communicator: DeviceCommunicatorBase) -> float:
    return communicator.all_reduce(torch.full((), 3.0), None).item()


def test_all_reduce_with_op_none_is_sum_also_of_a_0d_tensor(ranks: Ranks):
    assert ranks.run(3, none_is_sum) == [9.0] * 3


def alone(communicator: DeviceCommunicatorBase) -> None:
    x = torch.rand(2, 3, 5, 4).transpose(1, 2).requires_grad_()
    for output in (
        communicator.all_to_all_4D(x),
        communicator.all_to_all_4D(x, 1, 2),
        communicator.all_gather(x),
        communicator.all_reduce(x),
        communicator.slice(x, 1, scale_grad=True),
        communicator.reduce_scatter(x, 1),
        communicator.broadcast(x),
    ):
        assert output is x
    gathered = communicator.gather(x)
    assert gathered.data_ptr() == x.data_ptr()
    assert not gathered.requires_grad
    with pytest.raises(ValueError, match=r"\(2, 1\) or \(1, 2\), got \(1, 3\)"):
        communicator.all_to_all_4D(x, 1, 3)
    with pytest.raises(ValueError, match="must have 4 dims"):
        communicator.all_to_all_4D(x[0])
    with pytest.raises(ValueError, match="dim must be in"):
        communicator.all_gather(x, 4)
    with pytest.raises(ValueError, match="dst must be a rank of the group"):
        communicator.gather(x, 1)
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        communicator.all_reduce([1.0])
    with pytest.raises(ValueError, match="dst must be another rank than this one, got 0"):
        communicator.send(x)


def test_world_size_1_validates_and_then_returns_the_input_itself(ranks: Ranks):
    ranks.run((2,), alone)


def no_gradient(communicator: DeviceCommunicatorBase) -> None:
    x = torch.rand(2, 3, requires_grad=True)
    gathered = communicator.gather(x, dst=1)
    assert communicator.rank == 0 or not gathered.requires_grad
    if communicator.rank == 0:
        communicator.send(x)
    else:
        assert not communicator.recv(x.shape, x.dtype).requires_grad


def test_gather_send_and_recv_carry_no_gradient(ranks: Ranks):
    ranks.run(2, no_gradient)


X = torch.zeros(1, 4, 6, 2)
# op, arguments, error, message; on 4 ranks.
MISTAKES = [
    ("all_to_all_4D", (X,), ValueError, r"size at scatter_dim=2 that world_size=4 divides, got 6"),
    ("all_to_all_4D", (X[:, :3], 1, 2), ValueError, r"scatter_dim=1 that world_size=4 divides"),
    ("all_to_all_4D", (X, 2, 2), ValueError, r"must be \(2, 1\) or \(1, 2\), got \(2, 2\)"),
    ("all_to_all_4D", (X, 0, 1), ValueError, r"must be \(2, 1\) or \(1, 2\), got \(0, 1\)"),
    ("all_to_all_4D", (X, -9, 1), ValueError, r"must be \(2, 1\) or \(1, 2\), got \(-9, 1\)"),
    ("all_to_all_4D", (X, "2", 1), TypeError, "scatter_dim must be an int, got str"),
    ("all_to_all_4D", (X, 2, True), TypeError, "gather_dim must be an int, got bool"),
    ("all_to_all_4D", (X[0],), ValueError, r"4 dims \[B, S, H, D\], got shape \[4, 6, 2\]"),
    ("all_to_all_4D", (None,), TypeError, "input_ must be a tensor or several, got NoneType"),
    ("all_to_all_4D", (X.to_sparse(),), TypeError, "dense tensor, got layout torch.sparse_coo"),
    ("all_to_all_4D", (X[..., :4, :].to("meta"),), ValueError, "communicator's cpu, got meta"),
    ("all_gather", (torch.tensor(1.0),), ValueError, "at least 1 dim, got a 0-d tensor"),
    ("all_gather", (X, 4), ValueError, r"dim must be in \[-4, 3\] .*, got 4"),
    ("all_gather", (X, -5), ValueError, r"dim must be in \[-4, 3\] .*, got -5"),
    ("all_gather", (X, 1.0), TypeError, "dim must be an int, got float"),
    ("all_gather", (X.to("meta"),), ValueError, "communicator's cpu, got meta"),
    ("slice", (X, 2), ValueError, r"size at dim=2 that world_size=4 divides, got 6"),
    ("slice", (X, 7), ValueError, r"dim must be in \[-4, 3\]"),
    ("all_reduce", (X, "sum"), ValueError, "op must be one of ReduceOp.SUM, AVG, .*, got sum"),
    ("all_reduce", (X, dist.ReduceOp.BOR), TypeError, "must not be bitwise for torch.float32"),
    ("all_reduce", (X.int(), dist.ReduceOp.AVG), TypeError, "must not be AVG for torch.int32"),
    ("all_reduce", (X.to(torch.complex64), dist.ReduceOp.MAX), TypeError, "SUM or AVG for torch"),
    ("all_reduce", (X.cfloat(), dist.ReduceOp.PRODUCT), TypeError, "SUM or AVG for torch"),
    ("all_reduce", (X.to(torch.float8_e4m3fn),), TypeError, "backends reduce, got torch.float8"),
    ("all_reduce", (X.to(torch.int16),), TypeError, "backends reduce, got torch.int16"),
    ("reduce_scatter", (X, 2), ValueError, r"size at dim=2 that world_size=4 divides, got 6"),
    ("reduce_scatter", (X, 7), ValueError, r"dim must be in \[-4, 3\] .*, got 7"),
    ("reduce_scatter", (X.bool(), 1), TypeError, "backends reduce, got torch.bool"),
    ("reduce_scatter", (None,), TypeError, "input_ must be a tensor, got None"),
    ("broadcast", (X, 4), ValueError, r"src must be a rank of the group in \[0, 3\], got 4"),
    ("broadcast", (X, -1), ValueError, r"src must be a rank of the group in \[0, 3\], got -1"),
    ("broadcast", (X, 1.0), TypeError, "src must be an int, got float"),
    ("broadcast", (X.to_sparse(),), TypeError, "dense tensor, got layout torch.sparse_coo"),
    ("broadcast", (X.to("meta"),), ValueError, "communicator's cpu, got meta"),
    ("gather", (X, 4), ValueError, r"dst must be a rank of the group in \[0, 3\], got 4"),
    ("gather", (X, 0, 9), ValueError, "dim must be in"),
    ("gather", (X, -1), ValueError, r"dst must be a rank of the group in \[0, 3\], got -1"),
    ("send", (X, 4), ValueError, r"dst must be a rank of the group in \[0, 3\], got 4"),
    ("send", (3, 0), TypeError, "tensor must be a tensor, got int"),
    ("recv", (X.shape, X.dtype, 4), ValueError, r"src must be a rank of the group in \[0, 3\]"),
    ("recv", (X.shape, "float32"), TypeError, r"dtype must be a torch.dtype, got str"),
]


def mistake(communicator: DeviceCommunicatorBase, index: int) -> None:
    op, arguments, error, message = MISTAKES[index]
    rank = communicator.rank
    where = rf"^{op} on rank {rank} of 4 in group 'test': .*"
    with pytest.raises(error, match=where + message):
        getattr(communicator, op)(*arguments)


def still_usable(communicator: DeviceCommunicatorBase) -> None:
    assert communicator.all_reduce(torch.ones(1)).item() == communicator.world_size


@pytest.mark.parametrize("index", range(len(MISTAKES)), ids=lambda i: f"{MISTAKES[i][0]}-{i}")
def test_a_mistake_is_named_on_its_rank_before_anything_is_sent(ranks: Ranks, index):
    ranks.run(4, mistake, index)
    ranks.run(4, still_usable)


def self_send(communicator: DeviceCommunicatorBase) -> None:
    for call in (
        lambda: communicator.send(X, communicator.rank),
        lambda: communicator.recv(X.shape, X.dtype, communicator.rank),
    ):
        with pytest.raises(ValueError, match="must be another rank than this one, got"):
            call()


def test_sending_to_oneself_is_an_error_and_not_a_hang(ranks: Ranks):
    ranks.run(2, self_send)


def constructed(communicator: DeviceCommunicatorBase) -> None:
    with pytest.raises(TypeError, match="cpu_group must be a ProcessGroup that this process is in"):
        DeviceCommunicatorBase(dist.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(TypeError, match="cpu_group must be a ProcessGroup"):
        DeviceCommunicatorBase(None)
    with pytest.raises(ValueError, match=r"device_group must have cpu_group's ranks \[0, 1\]"):
        DeviceCommunicatorBase(communicator.cpu_group, device_group=dist.group.WORLD)
    assert DeviceCommunicatorBase(communicator.cpu_group, "cpu").device == torch.device("cpu")


def test_groups_that_cannot_work_are_refused(ranks: Ranks):
    ranks.run(2, constructed)


def destroyed(communicator: DeviceCommunicatorBase) -> None:
    gone = DeviceCommunicatorBase(communicator.cpu_group, unique_name="gone")
    x = torch.rand(1, 2, 4, 2, requires_grad=True)
    graph = gone.all_to_all_4D(x)
    gone.destroy()
    gone.destroy()
    for call in (
        lambda: gone.all_to_all_4D(x),
        lambda: gone.all_gather(x),
        lambda: gone.all_reduce(x),
        lambda: gone.reduce_scatter(x),
        lambda: gone.broadcast(x),
        lambda: gone.barrier(),
        lambda: gone.slice(x),
        lambda: gone.gather(x),
        lambda: gone.send(x),
        lambda: gone.recv(x.shape, x.dtype),
    ):
        with pytest.raises(ClosedError, match=r"on rank \d of 2 in group 'gone': .* was destroyed"):
            call()
    assert issubclass(ClosedError, CommunicationError | ConnectionError)
    assert gone.world_size == 2
    assert not hasattr(gone, "cpu_group")  # let go of, lest it outlives the interpreter's threads
    with pytest.raises(ClosedError, match="destroyed before a backward that needs it"):
        graph.sum().backward()
    assert communicator.all_reduce(x).shape == x.shape  # the group is the caller's


def test_destroy_may_be_repeated_and_use_after_it_is_an_error(ranks: Ranks):
    ranks.run(2, destroyed)


def one_of_a_kind(communicator: DeviceCommunicatorBase) -> None:
    named = DeviceCommunicatorBase(communicator.cpu_group, unique_name="sp")
    place = f"rank {named.rank} of {named.world_size} in group 'sp'"
    assert repr(named) == f"<DeviceCommunicatorBase: {place} on cpu>"
    assert copy.deepcopy({"held": [named]})["held"][0] is copy.copy(named) is named
    with pytest.raises(TypeError, match=f"must stay in the process .*, got <.*{place} on cpu> to"):
        pickle.dumps(named)
    named.destroy()
    assert repr(named) == f"<DeviceCommunicatorBase: {place}, destroyed>"


def test_a_copy_of_a_communicator_is_itself_and_none_is_pickled(ranks: Ranks):
    ranks.run(2, one_of_a_kind)


def nested(communicator: DeviceCommunicatorBase) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors may change
        x = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
    for call in (communicator.all_gather, lambda x: strided_copy_(x, x)):
        with pytest.raises(TypeError, match="must be a dense tensor, got a nested one"):
            call(x)


def test_nested_tensors_are_refused(ranks: Ranks):
    ranks.run(2, nested)


def empty(communicator: DeviceCommunicatorBase) -> None:
    size = communicator.world_size
    for shape in ([0, 2, size, 4], [2, 0, size, 4], [1, 3, 0, 4], [1, 3, size, 0]):
        x = torch.rand(shape, requires_grad=True)
        y = communicator.all_to_all_4D(x)
        assert list(y.shape) == [shape[0], shape[1] * size, shape[2] // size, shape[3]]
        z = communicator.all_to_all_4D(y, 1, 2)
        assert z.shape == x.shape
        gathered = communicator.all_gather(x, 1)
        assert gathered.shape[1] == shape[1] * size
        (z.sum() + gathered.sum() + communicator.all_reduce(x).sum()).backward()
        assert x.grad.shape == x.shape
        assert communicator.slice(x, 2).shape[2] == shape[2] // size
        on_dst = communicator.gather(x, 0, 1)
        assert on_dst is None or on_dst.shape[1] == shape[1] * size
    communicator.send(torch.empty(0, 3)) if communicator.rank == 0 else None
    if communicator.rank == 1:
        assert communicator.recv((0, 3), torch.float32).shape == (0, 3)


def test_zero_size_tensors_keep_their_shapes(ranks: Ranks):
    ranks.run(2, empty)


def layouts(communicator: DeviceCommunicatorBase) -> None:
    x = torch.rand(2, 8, 4, 6)
    wide = x.to(memory_format=torch.channels_last)
    assert torch.equal(communicator.all_to_all_4D(wide), communicator.all_to_all_4D(x))
    assert torch.equal(communicator.all_gather(wide, 2), communicator.all_gather(x, 2))
    assert communicator.all_gather(wide, 2).is_contiguous()
    assert communicator.all_reduce(wide).is_contiguous()
    assert torch.equal(communicator.all_to_all_4D(x, -2, -3), communicator.all_to_all_4D(x))
    negative = torch.view_as_complex(torch.rand(2, 2, 2, 2, 2)).conj().imag  # lazily negated
    assert negative.is_neg()
    assert torch.equal(
        communicator.all_gather(negative, 0), communicator.all_gather(negative.clone(), 0)
    )


def test_channels_last_and_lazily_negated_inputs_give_the_same_values(ranks: Ranks):
    ranks.run(2, layouts)


def lazy_parts(communicator: DeviceCommunicatorBase) -> None:
    """Contiguous tensors whose memory does not hold their values."""
    ranks, rank = communicator.world_size, communicator.rank
    sizes, heads = [3, 0, 2][:ranks], near_even_sizes(4, ranks)
    number = torch.complex(*(torch.rand(1, sum(sizes), heads[rank], 2) for _ in range(2)))
    for lazy in (number.conj(), torch._neg_view(number.real.contiguous())):
        assert lazy.is_contiguous()
        got, expected = (
            communicator.all_to_all_4D(each, 1, 2, scatter_sizes=sizes, gather_sizes=heads)
            for each in (lazy, lazy.resolve_conj().resolve_neg())
        )
        assert torch.equal(got, expected)


def test_lazily_conjugated_and_negated_parts_are_sent_with_their_values(ranks: Ranks):
    ranks.run(3, lazy_parts)


def raises(communicator: DeviceCommunicatorBase) -> None:
    if communicator.rank == 1:
        raise KeyError("on purpose")


def test_a_job_that_fails_on_one_rank_fails_the_test(ranks: Ranks):
    """The harness itself: without this, no test of ranks could fail."""
    with pytest.raises(RankError, match="on purpose"):
        ranks.run(2, raises)


@pytest.mark.parametrize(
    ("own", "given", "fits"),
    [
        ("cuda", "cuda:1", True),
        ("cuda:1", "cuda:1", True),
        ("cuda:0", "cuda:1", False),
        ("cuda:0", "cpu", False),
        ("cpu", "cpu", True),
    ],
)
def test_a_device_without_an_index_stands_for_every_device_of_its_type(own, given, fits):
    tensor = SimpleNamespace(device=torch.device(given))
    with nullcontext() if fits else pytest.raises(ValueError, match=f"{own}, got {given}"):
        check_device("input_", tensor, torch.device(own))
