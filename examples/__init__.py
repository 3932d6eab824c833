"""A small trained model, and the decode loop that runs it."""
