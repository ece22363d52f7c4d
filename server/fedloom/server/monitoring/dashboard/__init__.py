"""The dashboard: a page that shows the runs of this coordinator's folder, served by a thread of its own."""
