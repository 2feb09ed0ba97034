"""Studies: which cells there are, where their trials run, and the loop that drives them."""
