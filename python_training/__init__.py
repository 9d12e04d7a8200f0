"""Training and speaker-independent evaluation of avser_fast models (needs torch; the ``[train]`` extra)."""
