"""The method section: attention, the table of methods, and the loop that reads them from one forward pass."""
