"""The import path that users of upstream's module know."""

from fastvideo_comm.autograd import DistributedAutograd
from fastvideo_comm.communicator import DeviceCommunicatorBase

__all__ = ["DeviceCommunicatorBase", "DistributedAutograd"]
