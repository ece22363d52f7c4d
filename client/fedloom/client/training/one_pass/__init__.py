"""Clients whose examples go through the model in one pass, step by step, each with an adapter of its own.

Each client's trainer does its round in a thread and on a twin of the model, as clients at once do: it draws its own
samples, clips, adds its own noise, and takes its own steps. Only where it needs the gradients of a sample does it wait
for the others, and one of them computes for all.
"""
