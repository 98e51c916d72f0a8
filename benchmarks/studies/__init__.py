"""Whole models: `python -m benchmarks.studies.NAME`; each writes results/NAME.json."""
