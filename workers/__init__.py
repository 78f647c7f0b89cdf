"""The workers: each streams answers to thousands of clients from one selectors loop."""
