"""What `verify` and `replay_key` share: stored rows, chosen and made again."""
