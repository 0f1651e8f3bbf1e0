"""Generation, export and everything else done with a finished patch."""
