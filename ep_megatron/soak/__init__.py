"""Hours of random calls with pauses and faults, every result compared with its definition."""
