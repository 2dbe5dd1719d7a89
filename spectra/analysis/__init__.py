"""One layer, from arrays to findings.  No paths."""
