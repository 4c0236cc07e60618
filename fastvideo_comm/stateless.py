"""StatelessProcessGroup: objects between ranks, without `init_process_group`.

A group sends settings, handles and other small objects, for example to set up a data plane. One
thread at a time uses a group; others wait. `docs/object-channel.md` says what is safe and what not.
"""

from __future__ import annotations

import dataclasses
import socket
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fastvideo_comm.object_channel.message_seal import EVERYONE, Address, Op
from fastvideo_comm.object_channel.messenger import Messenger
from fastvideo_comm.object_channel.settings import (
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_TIMEOUT_SECONDS,
    Codec,
    GroupSettings,
    check_rank,
    to_seconds,
)
from fastvideo_comm.object_channel.store import ObjectStore
from fastvideo_comm.object_channel.store_sockets import Heartbeat

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from typing_extensions import Self


@dataclasses.dataclass
class StatelessProcessGroup:
    """A group of ranks that exchange objects, independent of every other group.

    >>> with StatelessProcessGroup.create("127.0.0.1", 0, rank=0, world_size=1) as group:
    ...     group.send_obj({"shape": (1, 2)}, dst=0)
    ...     group.recv_obj(src=0)
    {'shape': (1, 2)}

    What a group from `create` promises:

    1. Order and exactly once. Each (src, dst) pair is a channel of its own, first in, first out,
       and so are the broadcasts of each rank; groups never mix. A message is removed when its last
       reader has it. `expire_data` removes only messages that are older than
       `data_expiration_seconds`; a rank that asks for one gets MessageExpiredError once, and does
       not wait.
    2. Every wait ends. A call returns or raises within its timeout + 1 s, also when rank 0's
       process is stopped or another program holds the port; Ctrl-C ends it within 1 s. The error
       names op, group, rank, the ranks waited for, message number and seconds. A receiving call
       that timed out may be repeated and finds what came late. A `send_obj` that timed out may
       still arrive.
    3. A dead rank is known. When a rank dies, the present or next call of every other rank raises
       PeerLostError within 5 s, and so do all later calls. A rank that is slow or stopped is not
       dead. A rank whose machine is gone counts as dead after
       `heartbeat_interval` * (`heartbeat_limit` + 1) s. `close` lets rank 0 leave last. A process
       that ends without `close` still says goodbye; that of rank 0 waits up to 30 s for the others.
       A call that needs a rank which has left raises PeerLostError too, but the group goes on.
    4. No stranger's code runs. Objects travel as msgpack, see `ObjectCodec` for the types; nothing
       received is unpickled, imported or called, except functions given to `register_type`. An
       object that cannot be sent raises a TypeError on the sender, which gives the path to the part
       that is not supported. `codec="pickle"` is refused without a secret.
    5. No stranger's message is accepted, where there is a `secret`: connections begin with a mutual
       proof, and a seal covers version, group, op, src, dst, number, length and body of every
       message. A message that does not match raises AuthenticationError and is never decoded. With
       the package `cryptography` no stranger can read a body (AES-256-GCM); sizes, times, ranks and
       names of groups stay visible. Without that package nothing is encrypted (HMAC-SHA256). Rank 0
       listens on the host's address only. Whoever reaches the port can still delay a join.
    6. Too large an object fails on the sender: an object that encodes to more than
       `max_message_bytes` raises ValueError.
    7. Joining is checked. A wrong or taken rank, different world sizes, settings, secrets or
       protocol versions, and a port that another program uses raise JoinError or
       AuthenticationError on the ranks concerned. As soon as the time of one waiting rank is up,
       all waiting ranks raise JoinTimeoutError, which names the missing ranks.

    A torch store may be given instead: `StatelessProcessGroup(rank, world_size, store)`. Promises
    1, 4 and 6 hold then. Each group needs a name that is not used again in this store, and the file
    of a FileStore only grows. Promise 5 holds for messages within the life of one store, but the
    store itself takes whatever anybody writes. Promise 2 holds as far as polling can keep it: a
    call hangs in torch while the server of a TCPStore is stopped. Of promise 3, only this holds: a
    dead TCPStore server raises PeerLostError. Of promise 7, a taken rank and different settings
    raise an error, on the rank that comes later.

    Attributes:
        rank: This process's place in the group.
        world_size: How many ranks there are.
        store: An `ObjectStore` from `create`, or a torch store.
        data_expiration_seconds: How long an unread message is kept.
        send_dst_counter: Number of the next message to each rank.
        recv_src_counter: Number of the next message from each rank.
        broadcast_send_counter: Number of this rank's next broadcast.
        broadcast_recv_src_counter: Number of the next broadcast of each rank.
        entries: Key and `time.perf_counter()` of messages that this rank sent and that may still
            be unread.
        timeout: Seconds or timedelta, for every call that is given no timeout.
        secret: Shared by all ranks; `FASTVIDEO_COMM_SECRET` where it is None.
        codec: An `ObjectCodec` with registered types, "msgpack" or "pickle".
        max_message_bytes: The largest encoded object.
        group: The group's name, in keys, seals and errors.
        encryption: "auto", "required" or "off".
        run_id: The name of the run; torchrun's name where it is None.
    """

    rank: int
    world_size: int
    store: Store | ObjectStore
    data_expiration_seconds: int = 3600

    send_dst_counter: dict[int, int] = dataclasses.field(default_factory=dict)
    recv_src_counter: dict[int, int] = dataclasses.field(default_factory=dict)
    broadcast_send_counter: int = 0
    broadcast_recv_src_counter: dict[int, int] = dataclasses.field(default_factory=dict)
    entries: deque[tuple[str, float]] = dataclasses.field(default_factory=deque, repr=False)

    timeout: float | timedelta = dataclasses.field(default=DEFAULT_TIMEOUT_SECONDS, kw_only=True)
    secret: bytes | None = dataclasses.field(default=None, kw_only=True, repr=False)
    codec: Codec | str = dataclasses.field(default="msgpack", kw_only=True, repr=False)
    max_message_bytes: int = dataclasses.field(default=DEFAULT_MAX_MESSAGE_BYTES, kw_only=True)
    group: str = dataclasses.field(default="default", kw_only=True)
    encryption: str = dataclasses.field(default="auto", kw_only=True)
    run_id: str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the arguments and reserve the group's name on the store."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.kw_only}
        settings = GroupSettings.checked(self.rank, self.world_size, **options)
        self.secret, self.codec, self.run_id = settings.secret, settings.codec, settings.run_id
        self._messenger = Messenger(self.store, settings, self.entries)
        self.send_dst_counter = dict.fromkeys(range(self.world_size), 0)
        self.recv_src_counter = dict.fromkeys(range(self.world_size), 0)
        self.broadcast_recv_src_counter = dict.fromkeys(range(self.world_size), 0)
        self._gather_counter = {EVERYONE: 0}
        self._gathers_begun = self._barrier_counter = 0
        self._owns_store = False

    @classmethod
    def create(
        cls,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        data_expiration_seconds: int = 3600,
        store_timeout: float | timedelta | None = None,
        *,
        timeout: float | timedelta = DEFAULT_TIMEOUT_SECONDS,
        secret: bytes | None = None,
        codec: Codec | str = "msgpack",
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        group: str = "default",
        encryption: str = "auto",
        run_id: str | None = None,
        heartbeat_interval: float = 1.0,
        heartbeat_limit: int = 3,
        listen_socket: socket.socket | None = None,
    ) -> Self:
        """Form a group over TCP, without touching torch's global process group.

        Args:
            host: The address of rank 0; it listens there and nowhere else. IPv4, IPv6 or a name.
            port: The port of rank 0.
            rank: The rank of this process, from 0.
            world_size: How many ranks join; the call returns when all have.
            data_expiration_seconds: How long an unread message is kept.
            store_timeout: For the join and the methods of `store`; `timeout` where it is None.
            timeout: For every later call that is given no timeout; seconds or timedelta.
            secret: Shared by all ranks, at least 16 bytes, best `secrets.token_bytes(32)`; the
                variable `FASTVIDEO_COMM_SECRET` where it is None. Without a secret there is no
                protection.
            codec: An `ObjectCodec` with registered types, "msgpack" or "pickle".
            max_message_bytes: The largest encoded object; the same on every rank.
            group: The group's name; the same on every rank.
            encryption: "auto" encrypts where there is a secret and the package cryptography is
                installed, "required" also raises where it cannot, "off" authenticates only.
            run_id: The name of this run on every rank; torchrun's name where it is None. Ranks
                of another run are refused.
            heartbeat_interval: Whole seconds between two probes of an idle connection.
            heartbeat_limit: How many unanswered probes mean that the other machine is gone.
            listen_socket: Rank 0 only: a listening socket to use instead of a new one.

        Raises:
            ValueError: An argument breaks its rule; pickle or a wildcard host without a secret.
            TypeError: An argument has the wrong type.
            AuthenticationError: The ranks hold different secrets.
            JoinError: This rank is refused, or another program uses the port.
            JoinTimeoutError: Not every rank came within the timeout, of this rank or another.
        """
        options: dict[str, Any] = {
            "timeout": timeout,
            "secret": secret,
            "codec": codec,
            "max_message_bytes": max_message_bytes,
            "group": group,
            "encryption": encryption,
            "run_id": run_id,
        }
        settings = GroupSettings.checked(rank, world_size, **options)
        heartbeat = Heartbeat.checked(heartbeat_interval, heartbeat_limit)
        seconds = to_seconds("store_timeout", timeout if store_timeout is None else store_timeout)
        store = ObjectStore.join(host, port, settings, heartbeat, listen_socket, seconds)
        created = cls(rank, world_size, store, data_expiration_seconds, **options)
        created._owns_store = True
        return created

    def register_type(
        self,
        cls: type,
        *,
        name: str | None = None,
        to_fields: Callable[[Any], Any] | None = None,
        from_fields: Callable[[Any], Any] | None = None,
    ) -> None:
        """Allow instances of a class in messages, see `ObjectCodec.register_type`.

        Raises:
            TypeError: The codec is pickle, or the class needs the two functions.
            ValueError: The class is supported already, or the name is taken.
        """
        codec = self._messenger.codec
        register = getattr(codec, "register_type", None)
        if register is None:
            raise TypeError(f"codec must be msgpack to register types, got {codec.name!r}")
        register(cls, name=name, to_fields=to_fields, from_fields=from_fields)

    def send_obj(self, obj: Any, dst: int, *, timeout: float | timedelta | None = None) -> None:
        """Send an object to one rank; returns when the store has it, not when it is read.

        Args:
            obj: What to send, of types that the codec supports.
            dst: The rank that receives it, this one included.
            timeout: Seconds or timedelta; the group's where it is None.

        Raises:
            TypeError: Something in `obj` cannot be sent; the message gives the path to it.
            ValueError: `dst` is no rank, or the object too large.
            CommunicationTimeoutError: The store did not take it in time; it may still arrive.
            PeerLostError: `dst` has left, or a rank died.
        """
        check_rank("dst", dst, self.world_size)
        parts = self._messenger.encode(obj)
        with self._messenger.call("send_obj", (dst,), timeout) as call:
            self._messenger.begin(call)
            call.number = self.send_dst_counter[dst]
            self._send(Address(Op.SEND, self.rank, dst, call.number), parts, call.deadline)

    def recv_obj(self, src: int, *, timeout: float | timedelta | None = None) -> Any:
        """Return the next object from one rank, waiting for it if need be.

        Args:
            src: The rank that sends it.
            timeout: Seconds or timedelta; the group's where it is None.

        Raises:
            ValueError: `src` is no rank.
            CommunicationTimeoutError: No object came in time; the next call may still find it.
            MessageExpiredError: The object expired unread; the next call is for the one after it.
            PeerLostError: `src` has left and sent nothing more, or a rank died.
            AuthenticationError: What came is not from a holder of the secret.
            DecodeError: What came is not an object that this rank can build; it is skipped.
        """
        check_rank("src", src, self.world_size)
        with self._messenger.call("recv_obj", (src,), timeout) as call:
            self._messenger.begin(call)
            call.number = self.recv_src_counter[src]
            address = Address(Op.SEND, src, self.rank, call.number)
            return self._messenger.receive([address], self.recv_src_counter, src, call.deadline)[0]

    def broadcast_obj(
        self, obj: Any | None, src: int, *, timeout: float | timedelta | None = None
    ) -> Any:
        """Return the object of `src` on every rank; `src` does not wait for the others.

        Args:
            obj: What to send, on `src`; ignored elsewhere.
            src: The rank that sends.
            timeout: Seconds or timedelta; the group's where it is None.

        Raises:
            TypeError: On `src`, see `send_obj`.
            ValueError: `src` is no rank, or the object too large.
            CommunicationError: See `send_obj` on `src`, `recv_obj` elsewhere.
        """
        check_rank("src", src, self.world_size)
        if self.rank != src:
            with self._messenger.call("broadcast_obj", (src,), timeout) as call:
                self._messenger.begin(call)
                call.number = self.broadcast_recv_src_counter[src]
                address = Address(Op.BROADCAST, src, EVERYONE, call.number)
                return self._messenger.receive(
                    [address], self.broadcast_recv_src_counter, src, call.deadline
                )[0]
        parts = self._messenger.encode(obj)
        with self._messenger.call("broadcast_obj", self._messenger.others, timeout) as call:
            self._messenger.begin(call)
            call.number = self.broadcast_send_counter
            self._send(Address(Op.BROADCAST, src, EVERYONE, call.number), parts, call.deadline)
        return obj

    def all_gather_obj(self, obj: Any, *, timeout: float | timedelta | None = None) -> list[Any]:
        """Return the objects of all ranks in rank order; this rank's own object is not copied.

        After a timeout, call it again with the same object to finish the same round: the others
        get the object that this rank gave first.

        Args:
            obj: This rank's object.
            timeout: Seconds or timedelta; the group's where it is None.

        Raises:
            TypeError: Something in `obj` cannot be sent; the message gives the path to it.
            ValueError: The object is too large.
            CommunicationError: See `recv_obj`; `peers` are the ranks whose objects are missing.
        """
        parts = self._messenger.encode(obj)
        with self._messenger.call("all_gather_obj", self._messenger.others, timeout) as call:
            self._messenger.begin(call)
            call.number = number = self._gather_counter[EVERYONE]
            if self._gathers_begun == number:
                self._send(Address(Op.GATHER, self.rank, EVERYONE, number), parts, call.deadline)
            others = self._messenger.others
            addresses = [Address(Op.GATHER, rank, EVERYONE, number) for rank in others]
            objects = self._messenger.receive(
                addresses, self._gather_counter, EVERYONE, call.deadline
            )
        return [*objects[: self.rank], obj, *objects[self.rank :]]

    def barrier(self, *, timeout: float | timedelta | None = None) -> None:
        """Return when every rank has called it.

        Args:
            timeout: Seconds or timedelta; the group's where it is None.

        Raises:
            CommunicationTimeoutError: `peers` are the ranks that did not come; call it again to
                wait on in the same barrier.
            PeerLostError: A rank that has not come has left, or a rank died.
        """
        with self._messenger.call("barrier", self._messenger.others, timeout) as call:
            self._messenger.begin(call)
            call.number = self._barrier_counter
            self._messenger.transport.barrier(call.number, call.deadline)
            self._barrier_counter += 1

    def expire_data(self, *, timeout: float | timedelta | None = None) -> None:
        """Remove what this rank sent more than `data_expiration_seconds` ago and nobody read.

        Sending calls do this first.

        Args:
            timeout: Seconds or timedelta; the group's where it is None.

        Raises:
            CommunicationTimeoutError: The store did not answer in time.
            PeerLostError: A rank died.
        """
        with self._messenger.call("expire_data", (), timeout) as call:
            self._messenger.begin(call)
            self._messenger.outbox.expire(self.data_expiration_seconds, call.deadline)

    def close(self, *, timeout: float | timedelta | None = None) -> None:
        """Leave the group; idempotent. Rank 0 returns when all have left, or at the timeout.

        In a group from `create`, a call of another thread then ends with ClosedError. Messages that
        were sent stay readable for as long as rank 0 serves. A store given by the caller is left
        open, and a call of another thread on it runs to its end.

        Args:
            timeout: Seconds or timedelta; the group's where it is None.
        """
        seconds = self._messenger.seconds(timeout)
        self._messenger.closed = True
        if self._owns_store and isinstance(self.store, ObjectStore):
            self.store.close(seconds)

    def __enter__(self) -> StatelessProcessGroup:
        """Return the group, for `with`."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close the group."""
        self.close()

    def _send(self, address: Address, parts: list[bytes | memoryview], deadline: float) -> None:
        self._messenger.outbox.expire(self.data_expiration_seconds, deadline)
        transport = self._messenger.transport
        num_begun = transport.num_begun
        try:
            self._messenger.send(address, parts, deadline)
        finally:
            # No two messages share a number, and an interrupt before the first byte uses none up.
            if transport.num_begun != num_begun:
                if address.op is Op.SEND:
                    self.send_dst_counter[address.dst] += 1
                elif address.op is Op.BROADCAST:
                    self.broadcast_send_counter += 1
                else:
                    self._gathers_begun += 1
