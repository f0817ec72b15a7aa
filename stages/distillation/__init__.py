"""What `distill` is made of: where it reads, and the processes that train."""
