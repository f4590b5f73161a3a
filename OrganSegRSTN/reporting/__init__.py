"""The parts of report.py: result folders, measures, pictures, the page."""
