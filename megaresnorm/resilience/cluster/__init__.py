"""Preflight: what a job needs of its hosts, links and devices, measured on all ranks before step 0."""
