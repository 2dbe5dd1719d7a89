"""One base weight at a time with all its fine-tunes: here, in workers, or resumed."""
