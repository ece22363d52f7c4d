"""How a simulation splits one data set among its clients: one file for each way."""
