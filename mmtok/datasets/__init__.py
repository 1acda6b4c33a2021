"""Token datasets: documents as ids in memory-mapped shards."""
