"""Batteries of tests for components, for pytest: subclass one and give it your component. One file for each group."""
