"""The class Run, its inputs, its saved states, and the ways to train, rewind, fork and resume it."""
