"""One training function: the stages of a run, then its evaluation, on one worker or many."""
