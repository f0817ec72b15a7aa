"""Tables, plots and pictures for a person."""
