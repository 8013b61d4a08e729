"""All queries. Every function works inside the caller's transaction and never commits."""
