"""This process as a node of the cluster, and the sessions that it holds for others (`placement=\"owner\"`)."""
