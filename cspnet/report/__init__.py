"""Reports on runs: report page, comparison, status, preview."""
