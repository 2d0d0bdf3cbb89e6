"""How good the answers are: scores against labels, scans against reports."""
