"""The sampler, the patch format, and the maths both stand on: usable as a library of its own."""
