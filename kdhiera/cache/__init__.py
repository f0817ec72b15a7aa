"""The teacher cache: identity, encoding, writing, committing, reading."""
