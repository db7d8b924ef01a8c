"""The demo: a digits classifier in three versions, and the run that shows the whole agent."""
