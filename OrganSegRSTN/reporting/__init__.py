"""The parts of report.py: reading a data folder and its results, measures, pictures, the page."""
