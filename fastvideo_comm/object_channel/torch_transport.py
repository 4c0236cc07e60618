"""A group on a store of torch (TCPStore, FileStore, HashStore, PrefixStore), by its basic methods.

Every message has its own key, is deleted by its last reader, and travels in values of at most
4 MiB (TCPStore hangs up on values over 8 MiB). A wait polls, so that its timeout and Ctrl-C can end
it. A call that hangs inside torch, because the server is stopped, cannot be interrupted from here.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections.abc import Iterator, Sequence

from torch._C._distributed_c10d import Store

from fastvideo_comm.errors import (
    AuthenticationError,
    CommunicationTimeoutError,
    DecodeError,
    JoinError,
    MessageExpiredError,
    PeerLostError,
)
from fastvideo_comm.object_channel.message_seal import EVERYONE, Address, MessageSeal, Op
from fastvideo_comm.object_channel.settings import DESCRIPTION_BYTES, GroupSettings
from fastvideo_comm.object_channel.store_sockets import seconds_left
from fastvideo_comm.object_channel.transport import Buffer, readers_of

_CHUNK_BYTES = 4 * 1024 * 1024
_WHOLE, _IN_CHUNKS = b"\0", b"\1"
_TOTAL = struct.Struct("<Q")
_FIRST_PAUSE = 0.0001
_LONGEST_PAUSE = 0.01


class TorchTransport:
    """See `Transport`; the limits are those of the store."""

    def __init__(self, store: Store, settings: GroupSettings) -> None:
        """Claim this rank of the group in the store.

        Raises:
            JoinError: The rank is taken, or the group was begun with other settings.
            PeerLostError: The store does not answer.
        """
        self._store = store
        self._group = settings.group
        self._rank = rank = settings.rank
        self._world_size = settings.world_size
        self._seal = MessageSeal(settings.secret, settings.group, kind=settings.seal_kind)
        self._max_bytes = settings.max_message_bytes + DESCRIPTION_BYTES + self._seal.overhead
        self._inbox: dict[Address, Buffer] = {}
        self._lock = threading.Lock()
        self._lost: str | None = None
        self.num_begun = 0  # see `Transport`
        self._told = -1  # the last barrier that the others were told of
        with self._guard():
            begun = store.compare_set(self._name("settings"), "", settings.words).decode()
            claims = store.add(self._name(f"rank/{rank}"), 1)
        if begun != settings.words:
            raise JoinError(f"rank {rank} has {settings.words}, an earlier rank had {begun}")
        if claims != 1:
            raise JoinError(f"{settings.place} is already taken in this store")

    @contextlib.contextmanager
    def turn(self, deadline: float) -> Iterator[None]:
        """See `Transport`."""
        if not self._lock.acquire(timeout=seconds_left(deadline)):
            raise CommunicationTimeoutError("another thread is using this group")
        try:
            if self._lost is not None:
                raise PeerLostError(self._lost)
            yield
        finally:
            self._lock.release()

    def send(self, address: Address, parts: Sequence[bytes | memoryview], deadline: float) -> None:
        """See `Transport`; a TCPStore does not acknowledge what it is given."""
        if not readers_of(address, self._world_size):
            self.num_begun += 1
            return
        data = b"".join(self._seal.seal(address, parts))
        key = self._name(address.key)
        with self._guard():
            if len(data) <= _CHUNK_BYTES:
                value = _WHOLE + data
            else:
                for index, start in enumerate(range(0, len(data), _CHUNK_BYTES)):
                    if not seconds_left(deadline):
                        raise CommunicationTimeoutError("timed out before the store had it")
                    self._set(f"{key}/{index}", data[start : start + _CHUNK_BYTES])
                value = _IN_CHUNKS + _TOTAL.pack(len(data))
            # Nobody reads the chunks before this: until then the number can be used again. No
            # signal handler runs between these two: Python looks for signals after calls.
            self.num_begun += 1
            self._store.set(key, value)  # type: ignore[arg-type] # the stub knows of str only

    def receive(self, addresses: Sequence[Address], deadline: float) -> list[Buffer]:
        """See `Transport`."""
        for index, address in enumerate(addresses):
            if address not in self._inbox:
                try:
                    self._inbox[address] = self._fetch(address, deadline)
                except CommunicationTimeoutError as error:
                    rest = [a for a in addresses[index:] if a not in self._inbox]
                    peers = [other.src for other in rest if self.is_read(other)]
                    raise type(error)(str(error), peers=peers) from None
                with self._guard():
                    self._discard(address)
        return [self._inbox[address] for address in addresses]

    def discard(self, addresses: Sequence[Address]) -> None:
        """See `Transport`."""
        for address in addresses:
            self._inbox.pop(address, None)

    def barrier(self, number: int, deadline: float) -> None:
        """See `Transport`; every rank tells every other one."""
        own = Address(Op.BARRIER, self._rank, EVERYONE, number)
        if number > self._told:
            num_begun = self.num_begun
            try:
                self.send(own, [b""], deadline)
            finally:
                if self.num_begun != num_begun:  # else an interrupt came first
                    self._told = number
        ranks = [rank for rank in range(self._world_size) if rank != self._rank]
        addresses = [own._replace(src=rank) for rank in ranks]
        self.receive(addresses, deadline)
        self.discard(addresses)

    def expire(self, address: Address, deadline: float) -> None:
        """See `Transport`."""
        mark = self._expiry_address(address)
        with self._guard():
            for number in range(address.number, -1, -1):
                unread = address._replace(number=number)
                if self.is_read(unread) or not seconds_left(deadline):
                    return
                # The note is set first, so that no reader can wait for a message that is gone.
                note = _TOTAL.pack(number + 1)
                if number == address.number:
                    self._set(self._name(mark.key), b"".join(self._seal.seal(mark, [note])))
                self._delete(unread)

    def is_read(self, address: Address) -> bool:
        """See `Transport`."""
        with self._guard():
            return not self._store.check([self._name(address.key)])

    def _fetch(self, address: Address, deadline: float) -> Buffer:
        key = self._name(address.key)
        self._wait(key, address, deadline)
        with self._guard():
            head = self._store.get(key)
        if head[:1] == _IN_CHUNKS and len(head) == 1 + _TOTAL.size:
            data = self._fetch_chunks(key, address, _TOTAL.unpack_from(head, 1)[0], deadline)
        elif head[:1] == _WHOLE and len(head) <= self._max_bytes + 1:
            data = bytearray(head[1:])
        else:
            raise self._malformed(address)
        return self._seal.open(address, data)

    def _fetch_chunks(self, key: str, address: Address, total: int, deadline: float) -> bytearray:
        if not _CHUNK_BYTES < total <= self._max_bytes:
            raise self._malformed(address)
        data = bytearray()
        for index, start in enumerate(range(0, total, _CHUNK_BYTES)):
            self._wait(f"{key}/{index}", address, deadline)
            with self._guard():
                chunk = self._store.get(f"{key}/{index}")
            if len(chunk) != min(_CHUNK_BYTES, total - start):
                raise self._malformed(address)
            data += chunk
        return data

    def _wait(self, key: str, address: Address, deadline: float) -> None:
        pause = _FIRST_PAUSE
        while True:
            with self._guard():
                if self._store.check([key]):
                    return
                if self._is_expired(address):
                    raise MessageExpiredError("the message expired unread", peers=(address.src,))
            if not seconds_left(deadline):
                raise CommunicationTimeoutError("timed out", peers=(address.src,))
            time.sleep(min(pause, seconds_left(deadline)))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _is_expired(self, address: Address) -> bool:
        mark = self._expiry_address(address)
        if not self._store.check([self._name(mark.key)]):
            return False
        note = bytes(self._seal.open(mark, self._store.get(self._name(mark.key))))
        return len(note) == _TOTAL.size and address.number < _TOTAL.unpack(note)[0]

    def _discard(self, address: Address) -> None:
        """Delete a message if this was its last reader."""
        num_readers = readers_of(address, self._world_size)
        if num_readers > 1:
            counter = self._name(f"{address.key}/readers")
            if self._store.add(counter, 1) < num_readers:
                return
            self._store.delete_key(counter)
        self._delete(address)

    def _delete(self, address: Address) -> None:
        key = self._name(address.key)
        head = self._store.get(key)
        self._store.delete_key(key)
        if head[:1] == _IN_CHUNKS and len(head) == 1 + _TOTAL.size:
            total = min(_TOTAL.unpack_from(head, 1)[0], self._max_bytes)
            for index in range(-(-total // _CHUNK_BYTES)):
                self._store.delete_key(f"{key}/{index}")

    def _malformed(self, address: Address) -> AuthenticationError | DecodeError:
        text = f"{address.key} must be a message of this group"
        error = AuthenticationError if self._seal.overhead else DecodeError
        return error(text, peers=(address.src,))

    @staticmethod
    def _expiry_address(address: Address) -> Address:
        return Address(Op.EXPIRY, address.src, address.dst, address.op)

    def _set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)  # type: ignore[arg-type] # the stub knows of str only

    def _name(self, key: str) -> str:
        return f"fastvideo_comm/{self._group}/{key}"

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Turn a failure of the store into an error that every later call raises too."""
        try:
            yield
        except RuntimeError as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._lost = f"the store failed: {first_line}"
            raise PeerLostError(self._lost) from error
