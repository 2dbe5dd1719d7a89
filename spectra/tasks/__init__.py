"""One file a verb: paths in, a record out."""
