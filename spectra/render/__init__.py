"""Pure functions from the records to what people and programs read."""
