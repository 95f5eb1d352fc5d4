"""Dispatch and combine beside their peers, in one run, as ratios."""
