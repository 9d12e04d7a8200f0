"""Speed of avser_fast beside what else could be used, measured in one process (``pytest benchmarks
--benchmark-only``)."""
