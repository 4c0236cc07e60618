"""The parts of `StatelessProcessGroup`: codec, seal, store and the transports over a store.

In order from the object to the wire: `codec` (with `encoder`, `decoder`, `format`, `array_codec`
and `type_registry`) turns objects into bytes. `message_seal` authenticates the bytes. `transport`
and `torch_transport` move them through a store. `store` is the library's own store, and the
`store_*` modules are its two ends. `messenger` uses all of these for one group, with `settings`,
`call` and `outbox`.
"""

from fastvideo_comm.object_channel.codec import ObjectCodec

__all__ = ["ObjectCodec"]
