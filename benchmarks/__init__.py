"""What backs every number in the documents; ``python -m benchmarks`` runs all of it."""
