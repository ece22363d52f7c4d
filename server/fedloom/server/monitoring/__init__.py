"""Run status, metrics, traces, recorders and the dashboard."""
