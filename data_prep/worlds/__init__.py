"""Renderers of the procedural worlds, one file a kind of scene; `data_prep.procedural` is the way in."""
