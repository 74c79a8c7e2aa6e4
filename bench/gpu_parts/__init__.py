"""What bench/gpu.py measures: parts.py lists the parts, process.py runs each in a process of its own, report.py sums up."""
