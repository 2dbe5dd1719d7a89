"""Pure functions from a :class:`~spectra.report.Report` to what people and programs read."""
