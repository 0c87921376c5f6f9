"""Decoders that the frontend's library lacks or builds differently from transformers.

One module per family; each says why it is here. All give the graph that the library gives for the
others: standard operators, one attention per layer with a cache of its own, nodes marked with the
layer they belong to.
"""
