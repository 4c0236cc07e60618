"""Messages of several kinds that a rank has sent, and that nobody has read in time."""

import pytest
from stateless_ranks import run_own

from fastvideo_comm.errors import CommunicationTimeoutError, MessageExpiredError


def test_an_old_broadcast_and_an_old_round_of_one_rank_expire_both():
    def program(group):
        group.barrier()
        if group.rank == 0:
            group.broadcast_obj("old news", 0)
            with pytest.raises(CommunicationTimeoutError):
                group.all_gather_obj("mine", timeout=0.02)
            group.data_expiration_seconds = 0
            group.expire_data()
        group.barrier()
        if group.rank:
            with pytest.raises(MessageExpiredError):
                group.broadcast_obj(None, 0)
            with pytest.raises(MessageExpiredError):
                group.all_gather_obj("mine")

    run_own(2, program)
