"""What `initialise` is made of: numbers that fit some shards, and the text around them."""
