"""Video bytes: shards of samples, decoders, and the children that run them."""
