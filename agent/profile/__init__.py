"""What a model costs on this device: sweeps, a recommendation, and a report to keep."""
