"""Collectives of a group: group and tensors in, tensors out, no autograd."""
