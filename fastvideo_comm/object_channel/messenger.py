"""How the calls of one group reach its store: object to message and back, one call at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fastvideo_comm.errors import ClosedError, DecodeError, MessageExpiredError
from fastvideo_comm.object_channel.call import GroupCall
from fastvideo_comm.object_channel.message_seal import Address
from fastvideo_comm.object_channel.outbox import Outbox
from fastvideo_comm.object_channel.settings import DESCRIPTION_BYTES, GroupSettings, to_seconds
from fastvideo_comm.object_channel.store import ObjectStore
from fastvideo_comm.object_channel.torch_transport import TorchTransport
from fastvideo_comm.object_channel.transport import StoreTransport, Transport

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


class Messenger:
    """A group's codec, transport and outbox; the group itself keeps the numbers of messages.

    Attributes:
        transport: Moves the messages; used between `begin` and the end of the call.
        outbox: The sent messages that may be unread; used between the same two.
        codec: The codec of the group.
        others: The ranks of the group except this one.
        closed: Whether new calls are refused.
    """

    def __init__(
        self,
        store: Store | ObjectStore,
        settings: GroupSettings,
        entries: deque[tuple[str, float]],
    ) -> None:
        """Reserve the group's name on the store; sent messages are noted in `entries`."""
        self._settings = settings
        self.codec = settings.codec
        self.transport: Transport = (
            StoreTransport(store, settings)
            if isinstance(store, ObjectStore)
            else TorchTransport(store, settings)
        )
        self.outbox = Outbox(entries, self.transport)
        self.others = tuple(r for r in range(settings.world_size) if r != settings.rank)
        self.closed = False

    def seconds(self, timeout: float | timedelta | None) -> float:
        """Return the timeout of a call in seconds; None means the group's timeout."""
        return self._settings.timeout if timeout is None else to_seconds("timeout", timeout)

    def call(self, op: str, peers: tuple[int, ...], timeout: float | timedelta | None) -> GroupCall:
        """Return a call whose clock runs; `begin` is called first inside its `with`."""
        return GroupCall(op, self._settings, peers, self.seconds(timeout))

    def begin(self, call: GroupCall) -> None:
        """Hold the transport until the call ends; ClosedError if the group is closed."""
        if self.closed:
            raise ClosedError("the group is closed")
        call.take_turn(self.transport.turn(call.deadline))

    def encode(self, obj: Any) -> list[bytes | memoryview]:
        """Return the object as buffers; ValueError where they are too large to be sent."""
        parts = self.codec.encode_parts(obj)
        size = sum(len(part) for part in parts)
        limit = self._settings.max_message_bytes
        if size > limit + DESCRIPTION_BYTES:
            raise ValueError(
                f"obj must encode to at most max_message_bytes={limit} bytes, got {size}"
            )
        return parts

    def send(self, address: Address, parts: list[bytes | memoryview], deadline: float) -> None:
        """Send an encoded object and note it in the outbox."""
        self.outbox.note(address)
        self.transport.send(address, parts, deadline)

    def receive(
        self, addresses: Sequence[Address], counters: dict[int, int], key: int, deadline: float
    ) -> list[Any]:
        """Return the objects of these messages, and add 1 to `counters[key]`.

        An expired message and one that cannot be decoded are counted as well. After an interrupt
        the same messages can be received again.
        """
        try:
            bodies = self.transport.receive(addresses, deadline)
        except (DecodeError, MessageExpiredError):  # a DecodeError of what is no message at all
            counters[key] += 1
            self.transport.discard(addresses)
            raise
        try:
            objects = [self.codec.decode(body) for body in bodies]
        except Exception:
            counters[key] += 1
            self.transport.discard(addresses)
            raise
        counters[key] += 1
        self.transport.discard(addresses)
        return objects
