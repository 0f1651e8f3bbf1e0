"""Videos, image sequences and captures into clip datasets, bounded pairs and cached conditioning."""
