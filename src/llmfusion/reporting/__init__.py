"""What a study took and found: tables, statistics, costs."""
