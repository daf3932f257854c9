"""Everything that knows of Ray: connecting, planning, streaming blocks through workers, writing shards."""
