"""Layouts: a layer's shards turned into the tensors a kernel wants to read."""
