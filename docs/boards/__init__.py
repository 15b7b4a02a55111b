"""What `dashboards.py` builds from: the panels of each dashboard as plain data."""
