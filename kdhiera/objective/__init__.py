"""What the student is asked for: targets and losses."""
