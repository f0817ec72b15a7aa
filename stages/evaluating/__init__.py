"""What `evaluate` is made of: labelled clips, models, features, and every number once."""
