"""A whole federation on one machine: the only part that joins the coordinator and the clients."""
