"""What `show` draws: clips, agreement, statuses."""
