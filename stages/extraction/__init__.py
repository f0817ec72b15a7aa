"""What `extract_teachers` is made of: the plan, the workers, and how a cache is gone on with."""
