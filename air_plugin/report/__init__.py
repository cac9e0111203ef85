"""From results on disk to tables and pages."""
