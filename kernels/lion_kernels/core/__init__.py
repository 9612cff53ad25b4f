"""What every operator shares: how one is defined, which backend runs it, its sizes, costs and specifications."""
