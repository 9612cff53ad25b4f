"""The basis of every operator: its definition, choice of backend, sizes, costs and kernel configurations."""
