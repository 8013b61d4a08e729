"""Fault tests: real processes, a real Valkey and a real SQLite file under faults, and what must hold after.

`python -m tests.chaos` (or `make chaos`) runs them; `test_chaos.py` is the short form that `make test` runs.
"""
