"""What a generated data set is worth: metrics, curation, and a report."""
