"""Schedules of merging: how many tokens merge in each block."""
