"""What a group needs of a store (`Transport`), and a group on the library's own store."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from fastvideo_comm.errors import (
    AuthenticationError,
    CommunicationTimeoutError,
)
from fastvideo_comm.object_channel.message_seal import EVERYONE, Address, Op
from fastvideo_comm.object_channel.settings import GroupSettings
from fastvideo_comm.object_channel.store import ObjectStore
from fastvideo_comm.object_channel.store_link import Kind
from fastvideo_comm.object_channel.store_messages import pack_address, pack_number, unpack_number

Buffer = bytes | bytearray | memoryview


class Transport(Protocol):
    """Moves sealed messages of one group; every method is called inside `turn`.

    A timeout raises CommunicationTimeoutError with the missing ranks as `peers`. No message is lost
    then: what has arrived is kept for the next `receive` of the same addresses, until `discard`.
    The same holds after an interrupt, and after PeerLostError for a rank that has left.
    """

    @property
    def num_begun(self) -> int:
        """Grows when a message begins to go out; the number of that message is then used up."""

    def turn(self, deadline: float) -> AbstractContextManager[None]:
        """Keep other threads out; raise the error that has ended the group, if there is one."""

    def send(self, address: Address, parts: Sequence[bytes | memoryview], deadline: float) -> None:
        """Put a message where its readers find it."""

    def receive(self, addresses: Sequence[Address], deadline: float) -> list[Buffer]:
        """Return the bodies of these messages, or raise."""

    def discard(self, addresses: Sequence[Address]) -> None:
        """Let go of messages that were received."""

    def barrier(self, number: int, deadline: float) -> None:
        """Wait until every rank is in barrier `number`."""

    def expire(self, address: Address, deadline: float) -> None:
        """Remove the unread messages of this channel up to this one."""

    def is_read(self, address: Address) -> bool:
        """Whether all readers are known to have read this message."""


class StoreTransport:
    """A group on an `ObjectStore`."""

    def __init__(self, store: ObjectStore, settings: GroupSettings) -> None:
        """Reserve the group's name on the store.

        Raises:
            ValueError: The group has other ranks than the store, or allows larger messages.
            JoinError: The name is in use.
        """
        ranks = (store.rank, store.world_size)
        if (settings.rank, settings.world_size) != ranks:
            raise ValueError(
                f"rank and world_size must be those of the store, {ranks}, "
                f"got {(settings.rank, settings.world_size)}"
            )
        if settings.max_message_bytes > store.max_message_bytes:
            raise ValueError(
                f"max_message_bytes must be at most the store's {store.max_message_bytes}, "
                f"got {settings.max_message_bytes}"
            )
        store.claim(settings.group)
        self._client = store.client
        self._seal = store.seal(settings.group, settings.encryption)
        self._group = settings.group.encode()
        self._first_unread: dict[tuple[Op, int], int] = {}
        self._opened: dict[Address, Buffer] = {}
        self._opening: Address | None = None  # the message whose opening has not ended

    @property
    def num_begun(self) -> int:
        """See `Transport`."""
        return self._client.num_requests

    def turn(self, deadline: float) -> AbstractContextManager[None]:
        """See `Transport`."""
        return self._client.turn(deadline)

    def send(self, address: Address, parts: Sequence[bytes | memoryview], deadline: float) -> None:
        """See `Transport`; returns when the store has the message."""
        sealed = self._seal.seal(address, parts)
        meta = pack_address(address, self._group)
        try:
            self._acknowledged(address, self._client.ask(Kind.SEND, meta, sealed), deadline)
        except BaseException:
            self._client.own_unsent()
            raise

    def receive(self, addresses: Sequence[Address], deadline: float) -> list[Buffer]:
        """See `Transport`."""
        idents = [
            self._client.ask_once(Kind.RECV, pack_address(address, self._group))
            for address in addresses
        ]
        waiting = self._client.wait(idents, deadline)
        if waiting:
            peers = [a.src for a, ident in zip(addresses, idents, strict=True) if ident in waiting]
            raise CommunicationTimeoutError("timed out", peers=peers)
        frames = self._client.answers(idents)
        return [
            self._open(address, memoryview(frame.body))
            for address, frame in zip(addresses, frames, strict=True)
        ]

    def discard(self, addresses: Sequence[Address]) -> None:
        """See `Transport`."""
        for address in addresses:
            self._client.forget_question(Kind.RECV, pack_address(address, self._group))
            self._opened.pop(address, None)

    def _open(self, address: Address, sealed: memoryview) -> Buffer:
        opened = self._opened.get(address)
        if opened is not None:
            return opened
        was_interrupted = self._opening == address
        self._opening = address
        try:
            try:
                body = self._seal.open(address, sealed)
            except AuthenticationError:
                if not was_interrupted:
                    raise
                # The interrupted attempt may have decrypted the message in place. AES in counter
                # mode is its own inverse, so the attempt that failed has restored what came.
                body = self._seal.open(address, sealed)
        except AuthenticationError as error:
            self._client.refuse(error)
            raise
        self._opened[address] = body
        self._opening = None
        return body

    def barrier(self, number: int, deadline: float) -> None:
        """See `Transport`; one round trip."""
        ident = self._client.ask_once(Kind.BARRIER, pack_number(number, self._group))
        if self._client.wait([ident], deadline):
            peers = self._client.missing(self._group)
            raise CommunicationTimeoutError("timed out", peers=peers)
        self._client.take([ident])

    def expire(self, address: Address, deadline: float) -> None:
        """See `Transport`."""
        meta = pack_address(address, self._group)
        self._acknowledged(address, self._client.ask(Kind.EXPIRE, meta), deadline)

    def is_read(self, address: Address) -> bool:
        """See `Transport`; known from the latest acknowledgement in the channel."""
        return address.number < self._first_unread.get((address.op, address.dst), 0)

    def _acknowledged(self, address: Address, ident: int, deadline: float) -> None:
        if self._client.wait([ident], deadline):
            self._client.forget(ident)
            raise CommunicationTimeoutError("timed out before the store had it", peers=(0,))
        number, _rest = self._client.read(ident, lambda f: unpack_number(f.meta))
        self._first_unread[address.op, address.dst] = number


def readers_of(address: Address, world_size: int) -> int:
    """Return how many ranks read a message."""
    return world_size - 1 if address.dst == EVERYONE else 1
