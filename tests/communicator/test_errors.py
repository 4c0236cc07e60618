"""The exceptions: which builtin ones they are too, whom they name, how they name a call."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase, errors

# Each error, and what a caller may catch it as.
CAUGHT_AS: dict[type[errors.CommunicationError], tuple[type[Exception], ...]] = {
    errors.CommunicationError: (Exception,),
    errors.CollectiveError: (errors.CommunicationError, RuntimeError),
    errors.MismatchError: (errors.CollectiveError, RuntimeError),
    errors.ClosedError: (errors.CommunicationError, ConnectionError, RuntimeError),
    errors.CommunicationTimeoutError: (errors.CommunicationError, TimeoutError),
    errors.MessageExpiredError: (errors.CommunicationTimeoutError, TimeoutError),
    errors.PeerLostError: (errors.CommunicationError, ConnectionError),
    errors.AuthenticationError: (errors.CommunicationError, ValueError),
    errors.DecodeError: (errors.CommunicationError, ValueError),
    errors.JoinError: (errors.CommunicationError, ConnectionError),
    errors.JoinTimeoutError: (errors.JoinError, errors.CommunicationTimeoutError, TimeoutError),
}


def test_every_error_of_the_library_is_in_the_table():
    found = {
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.CommunicationError)
    }
    assert found == {*CAUGHT_AS}


@pytest.mark.parametrize("kind", CAUGHT_AS)
def test_an_error_is_the_builtin_one_too_and_names_its_peers(kind):
    error = kind("the text", peers=[2, 3])
    assert str(error) == "the text"
    assert error.peers == (2, 3)
    assert kind("the text").peers == ()
    for each in CAUGHT_AS[kind]:
        assert issubclass(kind, each)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.peers) == (kind, "the text", (2, 3))


def test_a_place_without_a_name_is_a_rank():
    assert errors.place(1, 4, "") == "rank 1 of 4"
    assert errors.place(1, 4, "sp:0") == "rank 1 of 4 in group 'sp:0'"


class OddError(ValueError):
    """An error of a caller whose constructor takes no text."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def of_the_caller(communicator: DeviceCommunicatorBase) -> None:
    def parameters() -> Iterator[torch.Tensor]:
        raise OddError(3)
        yield

    where = f"^reduce_gradients on rank {communicator.rank} of 2 in group 'test': $"
    with pytest.raises(ValueError, match=where) as caught:
        communicator.reduce_gradients(parameters())
    assert type(caught.value) is ValueError


def test_an_error_whose_constructor_takes_no_text_is_named_all_the_same(ranks: Ranks):
    ranks.run(2, of_the_caller)
