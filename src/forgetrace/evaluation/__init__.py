"""What the retrained models say: metrics per query, statistics over queries, tables."""
