"""What many runs over one cache came to: their records, what they are asked, the report."""
