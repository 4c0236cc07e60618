"""The collectives of a group: they take a group and tensors and return tensors; no autograd."""
