"""Sample quality: evaluators, feature extraction, reports."""
