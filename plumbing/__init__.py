"""What carries the method: files, processes, models. Nothing in here is in the paper."""
