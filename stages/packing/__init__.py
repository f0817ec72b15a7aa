"""What `pack` is made of: the order of the videos, their shards, and the journal."""
