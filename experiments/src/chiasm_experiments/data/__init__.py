"""Data sets read from files, and the order in which samples are drawn."""
