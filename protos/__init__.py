"""Wire contracts: the Open Inference Protocol and gatelet's control API between its processes."""
